"""Suites: which questions to ask, as HELM run entries with defaults. Knows the `.conf` files; must not know HELM.

A suite file is a HELM run-entries file (HOCON, `entries: [{description, priority, groups}]`), so stock
`helm-run --conf-paths` reads it too: HELM passes over the keys beside `entries`, which are ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyhocon import ConfigFactory, ConfigTree  # type: ignore[import-untyped]

from flexeval.benchmark.data import PACKAGED
from flexeval.benchmark.lm_eval.files import PREFIX, read_reference
from flexeval.benchmark.resources import resource_folders
from flexeval.errors import ConfigError
from flexeval.files import is_plain_name

_SUFFIX = ".conf"
_NOT_A_NAME = re.compile(r"[^\w.-]+")
_ENTRY_KEYS = {"description", "priority", "groups"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A named list of run entries with the defaults they are run with."""

    name: str
    """File name without `.conf`; HELM's suite of the same name receives the runs."""
    path: Path
    """The file it was read from."""
    entries: tuple[str, ...]
    """HELM run entry descriptions, such as `mmlu:model=text,subject=anatomy`, in the order to run them."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Additional run groups of an entry, by description."""
    description: str = ""
    """What it is for, in a sentence."""
    max_eval_instances: int | None = None
    """Questions per run, sampled by HELM; None asks all. An entry's own `max_eval_instances=` comes first."""
    num_train_trials: int | None = None
    """How often a run is repeated with other in-context examples; None leaves it to the run spec."""
    chat_template: bool = False
    """Whether models that have a chat template are asked in it."""
    packaged_data: tuple[str, ...] = ()
    """Scenarios whose files are laid out from pinned packages instead of HELM's download: names in `data.PACKAGED`."""


def load_suite(name_or_path: str) -> Suite:
    """Read a suite by name (a file in a `run_specs` folder), by the path of its `.conf` file, or as `lm-eval:PATH`.

    Raises:
        ConfigError: There is no such suite, or its file is not a suite file.
    """
    if name_or_path.startswith(PREFIX):
        return _lm_eval_suite(name_or_path)
    path = _find(name_or_path)
    try:
        tree = ConfigFactory.parse_string(path.read_text(encoding="utf-8"), basedir=str(path.parent))
    except Exception as error:  # the reader raises whatever a wrong file leads to
        what = f"not a suite file: {error or type(error).__name__}"
        raise ConfigError(what, where=str(path), mend="Write it in HOCON") from error
    return _read(tree, path)


def suite_names() -> list[str]:
    """Return the names of the suites that exist."""
    return sorted({path.stem for folder in resource_folders("run_specs") for path in folder.glob(f"*{_SUFFIX}")})


def _lm_eval_suite(text: str) -> Suite:
    """One run entry for each of lm-evaluation-harness's tasks that `text` names."""
    reference = read_reference(text)
    options = "".join(f",{key}={value}" for key, value in reference.options.items())
    stem = _NOT_A_NAME.sub("-", reference.path.stem).strip("-.") or "tasks"
    return Suite(
        name=f"lm-eval-{stem}",
        path=reference.path,
        entries=tuple(f"lm_eval:model=text,path={reference.path},task={task}{options}" for task in reference.tasks),
        description=f"Tasks of lm-evaluation-harness in {reference.path}",
    )


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(_SUFFIX) and Path(name_or_path).is_file():
        return Path(name_or_path)
    for folder in resource_folders("run_specs"):
        path = folder / f"{name_or_path}{_SUFFIX}"
        if is_plain_name(name_or_path) and path.is_file():
            return path
    known = ", ".join(suite_names()) or "none"
    raise ConfigError(
        f"unknown suite {name_or_path!r}", mend=f"Suites are: {known}; or name a {_SUFFIX} file of HELM run entries"
    )


def _read(tree: Any, path: Path) -> Suite:
    def refuse(what: str, mend: str) -> ConfigError:
        return ConfigError(what, where=str(path), mend=mend)

    if not isinstance(tree, ConfigTree) or not isinstance(tree.get("entries", None), list):
        raise refuse("a suite file needs a list called entries", "Write entries: [{description: ...}]")
    known = {"description", "max_eval_instances", "num_train_trials", "packaged_data", "chat_template"}
    if unknown := sorted(set(tree) - known - {"entries"}):
        raise refuse(f"unknown key {unknown[0]!r}", f"Keys are: {', '.join(sorted(known | {'entries'}))}")
    groups: dict[str, tuple[str, ...]] = {}
    for entry in tree["entries"]:
        if not isinstance(entry, ConfigTree) or not isinstance(entry.get("description", None), str):
            raise refuse(f"entry {json.dumps(entry, default=str)} has no description", "Write {description: ...}")
        if stray := sorted(set(entry) - _ENTRY_KEYS):
            raise refuse(f"unknown key {stray[0]!r} in an entry", f"Keys are: {', '.join(sorted(_ENTRY_KEYS))}")
        if entry["description"] in groups:
            raise refuse(f"entry {entry['description']!r} stands there twice", "Remove one")
        extra = entry.get("groups", [])
        if not _is_texts(extra):
            raise refuse(f"groups={json.dumps(extra, default=str)} is no list of names", "Write groups: [NAME, ...]")
        groups[entry["description"]] = tuple(extra)
    if not groups:
        raise refuse("the suite has no entries", "Add one")
    for key in ("max_eval_instances", "num_train_trials"):
        value = tree.get(key, None)
        if value is not None and (type(value) is not int or value < 1):
            raise refuse(f"{key}={value!r} is not a positive number", "Write a number, or leave it out for HELM's")
    has_chat_template = tree.get("chat_template", False)
    if not isinstance(has_chat_template, bool):
        raise refuse(f"chat_template={has_chat_template!r} is neither true nor false", "Write true, or leave it out")
    description = tree.get("description", "")
    if not isinstance(description, str):
        raise refuse(f"description={json.dumps(description, default=str)} is no text", "Write a sentence in quotes")
    packaged = tree.get("packaged_data", [])
    if not _is_texts(packaged):
        what = f"packaged_data={json.dumps(packaged, default=str)} is no list of names"
        raise refuse(what, "Write packaged_data: [NAME, ...]")
    if stray := sorted(set(packaged) - PACKAGED.keys()):
        raise refuse(f"no packaged data for {stray[0]!r}", f"There are: {', '.join(sorted(PACKAGED))}")
    return Suite(
        name=path.stem,
        path=path,
        entries=tuple(groups),
        groups={description: extra for description, extra in groups.items() if extra},
        description=description,
        max_eval_instances=tree.get("max_eval_instances", None),
        num_train_trials=tree.get("num_train_trials", None),
        chat_template=has_chat_template,
        packaged_data=tuple(packaged),
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
