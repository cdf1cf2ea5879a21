"""A task's keys, checked one by one. Knows what they mean; builds no prompt and reads no data.

Every key is either done as lm-evaluation-harness 0.4.13 does it, or known to change nothing, or refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexeval.benchmark.lm_eval.files import find_tasks, load
from flexeval.benchmark.lm_eval.keys import Keys, short
from flexeval.benchmark.lm_eval.scoring import Filter, MatchOptions, Pipeline
from flexeval.benchmark.lm_eval.task import Examples, Form, Task

_IGNORED = ("task_alias", "tag", "metadata", "should_decontaminate", "doc_to_decontamination_query", "group_alias")
"""Change neither prompts nor metrics."""
_MULTIPLE_CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")
_GENERATION_METRICS = ("exact_match",)
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_TOKENS = 256
_FILTERS = ("regex", "remove_whitespace", "lowercase", "uppercase")
_SAMPLERS = ("default", "first_n")


def read_task(root: Path, name: str, *, num_fewshot: int | None = None) -> Task:
    """Read and check a task; `num_fewshot` takes the place of its own.

    Raises:
        ConfigError: A key is unknown, or asks for something that is not done here.
    """
    return _TaskKeys(load(root, name), f"task {name} of {root}").task(root, name, num_fewshot)


class _TaskKeys(Keys):
    """Those of a task."""

    def task(self, root: Path, name: str, num_fewshot: int | None) -> Task:
        for key in ("task", *_IGNORED):
            self.left.pop(key, None)
        self.refuse_functions()
        output_type = self.take("output_type", str, "generate_until")
        if output_type not in ("multiple_choice", "generate_until"):
            raise self.refuse(f"output_type: {output_type} is not supported, only multiple_choice and generate_until")
        if (repeats := self.take("repeats", int, 1)) != 1:
            raise self.refuse(f"repeats: {repeats} is not supported, only 1")
        if self.take("unsafe_code", bool, False):
            raise self.refuse("unsafe_code: true asks to run what a model writes")
        kwargs = self.below("dataset_kwargs")
        kwargs.take("trust_remote_code", bool)  # never passed on
        data_files = kwargs.take("data_files", (str, list, dict))
        kwargs.end()
        process = self.function("process_docs")
        form = self._form(None)
        splits = {kind: self.take(f"{kind}_split", str) for kind in ("training", "validation", "test")}
        if not (splits["test"] or splits["validation"]):
            raise self.refuse("neither test_split nor validation_split is given")
        is_choice = output_type == "multiple_choice"
        if is_choice and form.choice is None:
            raise self.refuse("multiple_choice needs doc_to_choice")
        until, max_tokens = self._generation(form) if not is_choice else ((), 0)
        metrics, match = self._metrics(_MULTIPLE_CHOICE_METRICS if is_choice else _GENERATION_METRICS)
        task = Task(
            name=name,
            where=self.where,
            folder=root if root.is_dir() else root.parent,
            base=find_tasks(root)[name].parent,
            dataset_path=self.take("dataset_path", str, ""),
            dataset_name=self.take("dataset_name", str),
            data_files=data_files,
            splits=splits,
            output_type=output_type,
            description=self.take("description", str, ""),
            form=form,
            examples=self._examples(form, process),
            process=process,
            num_fewshot=self._num_fewshot(num_fewshot),
            metrics=metrics,
            match=match,
            pipelines=() if is_choice else self._pipelines(),
            until=until,
            max_tokens=max_tokens,
        )
        self.end()
        return task

    def _form(self, base: Form | None) -> Form:
        """`doc_to_text` and so on; of examples, over those of questions."""
        form = Form(
            text=self.spec("doc_to_text", (str, int), base.text if base else None),
            target=self.spec("doc_to_target", (str, int, list), base.target if base else None),
            choice=self.spec("doc_to_choice", (str, list, dict), base.choice if base else None),
            gen_prefix=self.take("gen_prefix", str, base.gen_prefix if base else None),
            target_delimiter=self.take("target_delimiter", str, base.target_delimiter if base else " "),
            fewshot_delimiter=self.take("fewshot_delimiter", str, base.fewshot_delimiter if base else "\n\n"),
        )
        if form.text is None:
            raise self.refuse("doc_to_text is missing")
        if not isinstance(form.text, str) and not callable(form.text):
            raise self.refuse("doc_to_text is not a text: several inputs for one question are not supported")
        if form.target is None:
            raise self.refuse("doc_to_target is missing")
        return form

    def _examples(self, form: Form, process: Any) -> Examples:
        split = self.take("fewshot_split", str)
        below = self.below("fewshot_config")
        sampler = below.take("sampler", str, "default")
        if sampler not in _SAMPLERS:
            raise self.refuse(f"sampler: {sampler} is not supported, only {' and '.join(_SAMPLERS)}")
        samples = below.spec("samples", list, None)
        if isinstance(samples, list) and not all(isinstance(sample, dict) for sample in samples):
            raise self.refuse("samples is not a list of mappings")
        examples = Examples(
            split=below.take("split", str, split),
            samples=samples,
            process=below.function("process_docs", process),
            sampler=sampler,
            form=below._form(form),
        )
        below.end()
        return examples

    def _num_fewshot(self, wanted: int | None) -> int:
        own = self.take("num_fewshot", int)
        if wanted is not None and own == 0 and wanted != 0:
            mend = "Leave num_fewshot out, or choose other tasks with task="
            raise self.refuse("the task says num_fewshot: 0, which lm-evaluation-harness lets nobody change", mend)
        num = wanted if wanted is not None else own or 0
        if num < 0:
            raise self.refuse(f"num_fewshot: {num} is negative")
        return int(num)

    def _generation(self, form: Form) -> tuple[tuple[str, ...], int]:
        below = self.below("generation_kwargs")
        until = below.take("until", (str, list), [form.fewshot_delimiter])
        until = [until] if isinstance(until, str) else until
        if not all(isinstance(stop, str) for stop in until):
            raise self.refuse(f"until: {short(until)} is not a list of texts")
        do_sample, temperature = below.take("do_sample", bool), below.take("temperature", (int, float))
        if (do_sample and temperature != 0) or (do_sample is None and (temperature or 0) > 0):
            raise self.refuse("sampled answers are not supported, only greedy ones (do_sample: false)")
        given = [value for key in _MAX_TOKENS_KEYS if (value := below.take(key, int)) is not None]
        below.end()
        if given and given[0] < 1:
            raise self.refuse(f"max_gen_toks: {given[0]} is not a positive number")
        return tuple(stop for stop in until if stop), given[0] if given else _DEFAULT_MAX_TOKENS

    def _metrics(self, known: tuple[str, ...]) -> tuple[tuple[str, ...], MatchOptions]:
        default = [{"metric": name} for name in known[:2]]
        names, match = [], MatchOptions()
        for item in self.take("metric_list", list, default):
            if not isinstance(item, dict):
                raise self.refuse(f"metric_list holds {short(item)}")
            keys = Keys(item, f"metric_list of {self.where}")
            name = keys.take("metric", str, "")
            if name not in known:
                raise self.refuse(f"the metric {name!r} is not supported here, only {', '.join(known)}")
            if (aggregation := keys.take("aggregation", str, "mean")) != "mean":
                raise self.refuse(f"aggregation: {aggregation} is not supported, only mean")
            if not keys.take("higher_is_better", bool, True) or keys.take("hf_evaluate", bool, False):
                raise self.refuse(f"{name} with higher_is_better: false or hf_evaluate: true is not supported")
            if known is _MULTIPLE_CHOICE_METRICS:
                keys.take("weight_by_size", bool)  # of the group's average
            if name == "exact_match":
                match = MatchOptions(
                    regexes_to_ignore=tuple(keys.take("regexes_to_ignore", list, [])),
                    ignore_case=keys.take("ignore_case", bool, False),
                    ignore_punctuation=keys.take("ignore_punctuation", bool, False),
                    ignore_numbers=keys.take("ignore_numbers", bool, False),
                )
                match.check(self.where)
            keys.end()
            names.append(name)
        if not names:
            raise self.refuse("metric_list is empty")
        return tuple(dict.fromkeys(names)), match

    def _pipelines(self) -> tuple[Pipeline, ...]:
        found: list[Pipeline] = []
        for item in self.take("filter_list", list, [{"name": "none", "filter": [{"function": "take_first"}]}]):
            keys = Keys(item if isinstance(item, dict) else {"item": item}, f"filter_list of {self.where}")
            name, steps = keys.take("name", str, ""), keys.take("filter", list, [])
            keys.end()
            if not name or not name.isprintable() or any(one.name == name for one in found):
                raise self.refuse(f"filter_list needs different names, not {name!r}")
            if not steps or steps[-1] != {"function": "take_first"}:
                raise self.refuse(f"the filter {name} does not end with take_first")
            found.append(Pipeline(name=name, filters=tuple(self._filter(step) for step in steps[:-1])))
        return tuple(found)

    def _filter(self, step: Any) -> Filter:
        keys = Keys(step if isinstance(step, dict) else {"item": step}, f"filter_list of {self.where}")
        function = keys.take("function", str, "")
        if function not in _FILTERS:
            raise self.refuse(f"the filter {function!r} is not supported here, only {', '.join(_FILTERS)}, take_first")
        made = Filter(function=function)
        if function == "regex":
            made = Filter(
                function=function,
                pattern=keys.take("regex_pattern", str, r"#### (\-?[0-9\.\,]+)"),
                group_select=keys.take("group_select", int, 0),
                fallback=keys.take("fallback", str, "[invalid]"),
            )
        keys.end()
        made.check(self.where)
        return made
