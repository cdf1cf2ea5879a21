"""The tables of a report as plain values: a row per task, a row per setting. Knows no arithmetic, layout or wording."""

from __future__ import annotations

from dataclasses import dataclass

from flexeval.report.pairing import Question
from flexeval.report.resampling import Bounds
from flexeval.report.statistics import Estimate
from flexeval.results import Fidelity, RunResults, SettingResult, TaskInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A setting against the baseline on the same questions."""

    estimate: Estimate
    """Mean of setting minus baseline."""
    bootstrap: Bounds
    """Its interval by the paired bootstrap, to hold the other one against: too short where few answers changed."""
    p_value: float
    """Of the sign-flip test, for this comparison alone."""
    corrected_p: float
    """Holm's correction: of a task over all per-task comparisons of the report, overall over the settings."""
    num_better: int
    """Questions the setting answered better than the baseline."""
    num_worse: int
    """Questions it answered worse."""
    num_same_output: int
    """Questions it answered with the very same text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Answers that changed sides, of the questions that are answered right or wrong.

    Dutta et al. 2024, "Accuracy is not all you need" (arXiv:2407.09141): as many may change one way as the other, so
    that accuracy shows nothing.
    """

    num_questions: int
    """Questions whose score is 0 or 1 in the baseline and the setting."""
    num_to_wrong: int
    """Right in the baseline, wrong in the setting."""
    num_to_right: int
    """The other way round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One task under one setting."""

    setting: str
    """Name of the setting."""
    score: Estimate
    """Mean of the headline metric."""
    difference: Difference | None
    """Against the baseline; None for the baseline itself."""
    num_prompt_tokens: int
    """Prompt tokens of the compared questions."""
    num_generated_tokens: int
    """Tokens generated for them."""
    elapsed_s: float
    """Their shares of the engine's seconds."""
    flips: Flips | None = None
    """Against the baseline; None for the baseline itself, and where scores are grades."""
    fidelity: Fidelity | None = None
    """Against the baseline; None where distributions were not kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One task under all settings."""

    task: TaskInfo
    """What the task is."""
    num_questions: int
    """Questions compared."""
    in_points: bool
    """Whether scores lie in [0, 1] and more is better, so that they read as points of 100."""
    cells: tuple[Cell, ...]
    """One per setting, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingRow:
    """One setting over all tasks."""

    result: SettingResult
    """What the setting cost."""
    quality: Estimate | None
    """Mean over the averaged tasks; None where tasks have no common scale."""
    difference: Difference | None
    """Against the baseline; None for the baseline itself and without a common scale."""
    num_questions: int
    """Questions it answered, compared or not."""
    engine_s: float
    """Seconds the engine spent on them."""
    flips: Flips | None = None
    """Against the baseline, over all tasks; None for the baseline itself, and where all scores are grades."""
    fidelity: Fidelity | None = None
    """Against the baseline, over all tasks; None where distributions were not kept."""
    speedup: float | None = None
    """Its questions per second over the baseline's."""
    memory_ratio: float | None = None
    """The baseline's peak memory over its own, all tiers together."""
    is_best_trade: bool = False
    """Whether no other setting is at least as good and as fast, and better in one of the two."""

    @property
    def questions_per_s(self) -> float | None:
        """Questions answered per second of engine time; None where no time was measured."""
        return self.num_questions / self.engine_s if self.engine_s > 0 else None

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens asked for plus tokens generated, per second of engine time."""
        tokens = self.result.num_prompt_tokens + self.result.num_generated_tokens
        return tokens / self.engine_s if self.engine_s > 0 else None

    @property
    def energy_per_question_j(self) -> float | None:
        """Joules of the GPU; None where they are not known, or not of all answers."""
        energy_j, num = self.result.energy_j, self.num_questions
        return energy_j / num if energy_j is not None and num and not self.result.num_resumed else None

    @property
    def memory_bytes(self) -> int:
        """Peak memory of GPU and host together; what is put on disk is there because memory is short."""
        return sum(num_bytes for tier, num_bytes in self.result.peak_bytes.items() if tier != "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything the pages show."""

    results: RunResults
    """What was compared."""
    baseline: int
    """Index of the baseline among the settings."""
    tasks: tuple[TaskRow, ...]
    """Tasks with questions in common, in the suite's order."""
    settings: tuple[SettingRow, ...]
    """In the order of the results."""
    averaged: tuple[str, ...]
    """Names of the tasks that the overall quality is a mean of."""
    in_points: bool
    """Whether the overall quality reads as points of 100."""
    higher_is_better: bool
    """Direction of the overall quality."""
    questions: tuple[Question, ...]
    """Every compared question with its answers."""
    notes: tuple[str, ...]
    """Caveats of the run and of the comparison."""
