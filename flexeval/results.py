"""What a run found, as plain data: the vocabulary between the pipeline that measures and the reports that show.

Knows no tensor, no HELM class and no template. `results.json` is this module's `RunResults` written out.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexeval import typed
from flexeval.errors import ResultsError
from flexeval.files import read_json, write_json

SCHEMA_VERSION = 1
_SHORT_HASH = re.compile(r"[0-9a-f]{16}")
RESULTS_FILE = "results.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceResult:
    """One question of one task under one setting."""

    task: str
    """Name of the task: equal across settings, unique within a run."""
    setting: str
    """Name of the setting it was answered under."""
    instance_id: str
    """HELM's id of the question, with the train trial where there are several: pairs settings."""
    score: float
    """The task's headline metric on this question alone."""
    prompt: str
    """The prompt as sent (the first one, where a question takes several requests)."""
    output: str
    """What the model answered."""
    reference: str
    """The correct answers, joined by ` | `."""
    num_prompt_tokens: int
    """Tokens of all its prompts."""
    num_generated_tokens: int
    """Tokens generated for it."""
    elapsed_s: float
    """Its share of the engine's seconds."""
    requests: dict[str, bool] = field(default_factory=dict)
    """Short hash of each request that it takes, and whether its prompt is known to be right: text to
    be scored, or the question with a correct answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """What a task is, whatever the setting."""

    name: str
    """Name shown to people: `mmlu: abstract_algebra`."""
    metric: str
    """HELM's name of the headline metric."""
    split: str
    """The split the metric is taken on."""
    group: str
    """Tasks of one group are averaged together: `mmlu`."""
    higher_is_better: bool = True
    """Direction of the metric."""
    source: str = ""
    """Where the questions come from, when it is not HELM's own download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingResult:
    """What one setting cost."""

    setting: str
    """Its name."""
    backend: str
    """What answered: `flexeval`, `transformers`, ..."""
    elapsed_s: float
    """Seconds of the engine answering, without loading."""
    load_s: float
    """Seconds to load (and compress) the weights."""
    num_requests: int
    """Sequences answered."""
    num_prompt_tokens: int
    """Prompt tokens asked for."""
    num_computed_prompt_tokens: int
    """Prompt tokens computed, after shared prefixes were run once."""
    num_generated_tokens: int
    """Tokens generated."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Largest use of each memory tier (`gpu`, `cpu`, `disk`) by the engine."""
    policy: dict[str, Any] = field(default_factory=dict)
    """The policy that ran, as JSON."""
    lanes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per lane: `num_bytes` moved and `busy_s` seconds it was busy."""
    predicted_s: float | None = None
    """Seconds that the cost model foretold before the first request; None where answers came in several sittings."""
    planned_bytes: dict[str, int] = field(default_factory=dict)
    """Largest use of each memory tier that the plan allowed for."""
    energy_j: float | None = None
    """Joules that the GPU used while it answered, by its own counter, whoever else had it work; None where nothing
    tells."""
    num_resumed: int = 0
    """Requests answered from the journal of an earlier run rather than by the engine."""
    num_failed: int = 0
    """Requests without an answer, for the model's numbers were none: their questions are not scored."""
    splits: list[str] = field(default_factory=list)
    """For each time that memory ran out: what was made smaller so that the run could go on."""
    lost_s: float = 0.0
    """Seconds of work that had to be done again then; `elapsed_s` leaves them out."""
    corrected_s: float | None = None
    """Seconds that were foretold of the whole once its first block was measured; None where no block was, or answers
    came in several sittings."""
    moves: list[str] = field(default_factory=list)
    """For each time that the rest was placed anew because measurements showed that it pays: what was changed."""


QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of the distributions over positions that a `Fidelity` tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How closely a setting follows the baseline's probabilities, over positions that both reached by the same tokens.

    Errors are standard errors that count the positions of one question as one sample; None where there is one question.
    """

    task: str
    """Name of the task; empty for all of them together."""
    setting: str
    """The setting compared."""
    baseline: str
    """What it is compared with."""
    num_positions: int
    """Positions compared, at least one."""
    num_questions: int
    """Questions they come from."""
    num_top: int
    """Most probable tokens kept of each distribution; as many others are sampled."""
    tail: float
    """Mean probability that the baseline gives to all other tokens."""
    kl: float
    """Mean Kullback-Leibler divergence of the setting from the baseline, KL(baseline || setting), in nats."""
    kl_error: float | None
    """Its standard error."""
    kl_quantiles: list[float]
    """Of the positions, at `QUANTILES`."""
    kl_at_least: float
    """What of `kl` shows with all tokens but the most probable ones as one outcome; it needs no sample."""
    same_top: float
    """Share of positions with the same most probable token."""
    same_top_error: float | None
    """Its standard error."""
    num_text: int = 0
    """Positions whose token belongs to a text that is known to be right; what follows is about these."""
    text_loss: float | None = None
    """The baseline's mean of minus log p of the text's token: its perplexity is the exponential of this."""
    loss_change: float | None = None
    """Mean change of minus log p: the exponential is the setting's perplexity over the baseline's."""
    loss_change_error: float | None = None
    """Its standard error."""
    probability_change: float | None = None
    """Mean change of the text's token's probability."""
    probability_change_error: float | None = None
    """Its standard error."""
    probability_change_rms: float | None = None
    """Root of the mean square of the change."""
    probability_change_quantiles: list[float] = field(default_factory=list)
    """Of the positions, at `QUANTILES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """Everything a report needs."""

    name: str
    """Name of the run."""
    suite: str
    """Name of the suite."""
    model: str
    """The model as the user named it."""
    model_note: str
    """What one should know about the weights: `dequantized from Q4_1`."""
    command: str
    """The command line that made it."""
    created: str
    """ISO 8601, UTC."""
    machine: dict[str, str]
    """Processor, cores, memory, GPU, in words."""
    versions: dict[str, str]
    """Versions of flexeval, Python, torch, transformers, crfm-helm."""
    tasks: list[TaskInfo]
    """In the suite's order."""
    settings: list[SettingResult]
    """In the user's order; `none`, where present, is the baseline."""
    instances: list[InstanceResult]
    """All questions under all settings."""
    fidelity: list[Fidelity] = field(default_factory=list)
    """Of each setting but the baseline, over all tasks and for each of them; empty without kept distributions."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Tasks of the suite that were not run, and why."""
    notes: list[str] = field(default_factory=list)
    """Caveats to print with the figures."""
    fingerprint: str = ""
    """Hash of the model's files: names, sizes, the beginning and end of each."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""

    def save(self, directory: Path) -> Path:
        """Write `results.json` in `directory`, whole or not at all."""
        path = directory / RESULTS_FILE
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, directory: Path) -> RunResults:
        """Read a run's directory (or its `results.json`). Raises `ResultsError`."""
        path = directory / RESULTS_FILE if directory.is_dir() else directory
        if not path.is_file():
            raise ResultsError("no results here", where=str(path), mend="Name a directory that `flexeval run` wrote")
        try:
            data = read_json(path)
            if not isinstance(data, dict):
                raise ValueError(f"it holds {typed.show(data)}, not an object")
            if data.get("schema_version") != SCHEMA_VERSION:
                raise ResultsError(
                    f"layout version {typed.show(data.get('schema_version'))}, this flexeval reads {SCHEMA_VERSION}",
                    where=str(path),
                    mend="Run the suite again",
                )
            return _checked(typed.read(cls, data))
        except (ValueError, OSError) as error:
            raise ResultsError(f"not a results file: {error}", where=str(path), mend="Run the suite again") from error


def _checked(results: RunResults) -> RunResults:
    """The results, unless a value is none that was ever written. Raises `ValueError`."""
    for instance in results.instances:
        if odd := [name for name in instance.requests if not _SHORT_HASH.fullmatch(name)]:
            raise ValueError(f"instances.requests names {typed.show(odd[0])}, not a request")
    for one in results.fidelity:
        lengths = (len(one.kl_quantiles), len(one.probability_change_quantiles))
        if lengths[0] != len(QUANTILES) or lengths[1] not in (0, len(QUANTILES)):
            raise ValueError(f"fidelity has {max(lengths)} quantiles, not {len(QUANTILES)}")
        of_text = (one.text_loss, one.loss_change, one.probability_change, one.probability_change_rms)
        if one.num_text and (None in of_text or not lengths[1]):
            raise ValueError(f"fidelity says nothing of its {one.num_text} positions of text")
    return results
