"""The gate from results to exit code: baselines, what cannot be compared, speeds, JUnit, Markdown, the command."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_mutations import mutations
from scipy import stats
from synthetic_results import HOSTILE, TASKS, changed, synthetic

from flexeval.bench.figures import BenchResults, BoundFigures, PhaseFigures, SystemFigures, TokenFigures
from flexeval.bench.reading import read_figures
from flexeval.cli import app, main
from flexeval.errors import FlexevalError, ResultsError
from flexeval.gate.baseline import Baseline, Speed, keep
from flexeval.gate.check import CheckOptions, check, read_run
from flexeval.gate.findings import Finding, Kind, Outcome, Status
from flexeval.gate.junit import junit
from flexeval.gate.quality import OVERALL
from flexeval.gate.text import lines, markdown
from flexeval.gate.throughput import judge_throughput, slower_p, speeds_of_bench, speeds_of_runs
from flexeval.results import InstanceResult, RunResults

CHOSEN: dict[str, Any] = {"settings": ("none", "w4")}
RUN = synthetic(**CHOSEN)
MCQA = next(task.name for task in TASKS if task.metric == "exact_match")


def worse(share: int, task: str | None = None, setting: str = "w4") -> RunResults:
    """The run with every `share`th answer wrong under one setting."""

    def change(one: InstanceResult) -> dict[str, Any]:
        is_hit = int(one.instance_id[2:]) % share == 0 and one.setting == setting and task in (None, one.task)
        return {"score": 0.0} if is_hit else {}

    return changed(change, **CHOSEN)


def found(before: RunResults, now: RunResults, **options: Any) -> Outcome:
    return check(keep(before), keep(now), CheckOptions(**options))


def refused(before: RunResults, now: RunResults, match: str, **options: Any) -> None:
    with pytest.raises(ResultsError, match=match):
        found(before, now, **options)


def test_a_baseline_is_read_as_it_was_written_a_line_a_question(tmp_path: Path) -> None:
    kept = keep(RUN, [Speed(setting="w4", against="none", work="suite", ratios=[1.2, 1.3, 1.25])])
    kept.save(tmp_path / "a.json")
    assert Baseline.load(tmp_path / "a.json") == kept
    keep(worse(60, MCQA), kept.speeds).save(tmp_path / "b.json")
    pairs = zip(*((tmp_path / name).read_text().splitlines() for name in ("a.json", "b.json")), strict=True)
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(differing) == 1 and all('"id0"' in line for line in differing[0])


def test_the_same_answers_pass() -> None:
    outcome = found(RUN, RUN, is_strict=True)
    assert outcome.exit_code == 0 and {one.status for one in outcome.findings} == {Status.PASS}
    assert "would be shown, four times out of five" in next(one.why for one in outcome.findings)


def test_a_drop_is_found_with_the_questions_that_are_answered_worse() -> None:
    outcome = found(RUN, worse(2, MCQA))
    assert outcome.exit_code == 1 and {one.setting for one in outcome.regressions} == {"w4"}
    (finding,) = [one for one in outcome.regressions if one.subject != OVERALL]
    assert finding.subject == MCQA
    before = {one.instance_id: one.score for one in RUN.instances if one.setting == "w4" and one.task == MCQA}
    assert finding.lost == tuple(
        sorted((n for n in before if before[n] and int(n[2:]) % 2 == 0), key=lambda n: int(n[2:]))
    )
    assert f"FAIL w4, {MCQA}" in "\n".join(lines(outcome)) and finding.lost[0] in "\n".join(lines(outcome))


def test_a_drop_everywhere_fails_overall() -> None:
    outcome = found(RUN, worse(3))
    assert OVERALL in [one.subject for one in outcome.regressions] and outcome.exit_code == 1
    assert found(RUN, worse(3), settings=["none"]).exit_code == 0
    assert found(RUN, worse(3), tolerance=0.5).exit_code == 0


def test_a_gain_does_not_fail() -> None:
    assert found(worse(2), RUN).exit_code == 0


def test_where_lower_is_better_a_rise_is_a_drop() -> None:
    perplexity = replace(TASKS[0], name="prose", metric="bits_per_byte", higher_is_better=False)
    before = synthetic(**CHOSEN, tasks=[perplexity])
    before = replace(
        before, instances=[replace(one, score=0.8 + int(one.instance_id[2:]) / 500) for one in before.instances]
    )
    more = replace(before, instances=[replace(one, score=one.score * 1.05) for one in before.instances])
    assert [one.exit_code for one in (found(before, more), found(more, before))] == [1, 0]
    assert found(before, more, tolerance=0.1).exit_code == 0


def test_few_questions_cannot_decide_unless_nothing_changed() -> None:
    few = synthetic(**CHOSEN, tasks=TASKS[1:2], num_questions=4)
    other = replace(few, instances=[replace(one, score=1 - one.score) for one in few.instances])
    assert found(few, few).exit_code == 0
    outcome = found(few, other)
    assert outcome.exit_code == 2 and "too few" in lines(outcome)[-1]


def test_trials_of_a_question_are_one_sample() -> None:
    """What is no evidence once is none three times over."""
    before, now = (synthetic(**CHOSEN, tasks=TASKS[1:2], num_questions=8) for _ in range(2))
    now = replace(now, instances=[replace(one, score=0.0) for one in now.instances])
    before = replace(
        before, instances=[replace(one, score=float(int(one.instance_id[2:]) < 4)) for one in before.instances]
    )

    def thrice(results: RunResults) -> RunResults:
        trials = [
            replace(one, instance_id=f"{one.instance_id}-trial{number}")
            for one in results.instances
            for number in range(3)
        ]
        return replace(results, instances=trials)

    assert [one.status for one in found(before, now).findings] == [Status.OPEN] * 2
    again = found(thrice(before), thrice(now)).findings
    assert [one.status for one in again] == [Status.OPEN] * 2
    assert all(len(one.lost) == 12 for one in again), "each trial is named"


def test_a_task_that_is_lost_altogether_is_shown_among_hundreds() -> None:
    """Graded scores: p values by resampling alone end at 1 in 10,000, which hundreds of comparisons use up."""
    tasks = [replace(TASKS[0], name=f"qa {number}", group=f"qa {number}") for number in range(300)]
    before = synthetic(settings=("none",), tasks=tasks, num_questions=20)
    before = replace(
        before, instances=[replace(one, score=0.5 + int(one.instance_id[2:]) / 100) for one in before.instances]
    )
    now = replace(
        before, instances=[replace(one, score=0.0) if one.task == "qa 7" else one for one in before.instances]
    )
    assert [one.subject for one in found(before, now).regressions] == ["qa 7"]


def test_what_stays_open_is_an_answer_unless_one_is_strict() -> None:
    assert found(RUN, worse(30)).exit_code == 0
    strict = found(RUN, worse(30), is_strict=True)
    assert strict.exit_code == 2 and "Could not decide: w4, overall" in lines(strict)[-1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda run: replace(run, model="opt-66b"), "is of 'opt-66b.*--any-model"),
        (lambda run: replace(run, instances=run.instances[1:]), "the run lacks 1 of 60 questions"),
        (lambda run: replace(run, tasks=[replace(t, metric="f1_score") for t in run.tasks]), "was measured by exact_"),
        (lambda run: replace(run, instances=[replace(i, prompt="?") for i in run.instances]), "60 of 60 questions are"),
        (lambda run: replace(run, instances=[replace(i, reference="?") for i in run.instances]), "60 of 60 questions"),
        (
            lambda run: replace(run, settings=run.settings[:1], instances=run.instances[: len(run.instances) // 2]),
            "'w4'",
        ),
        (
            lambda run: replace(run, instances=[replace(i, instance_id=f"x{i.instance_id}") for i in run.instances]),
            "no question in common",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(change: Callable[[RunResults], RunResults], match: str) -> None:
    refused(RUN, change(RUN), match)


def test_settings_that_are_not_checked_are_said() -> None:
    """A setting that was added after the baseline was written passes nothing unseen."""
    only_none = synthetic(settings=("none",))
    assert found(only_none, worse(2)).notes == ("Not checked: w4 of the run.",)
    assert found(RUN, RUN).notes == ()


def test_a_model_of_other_files_is_said(tmp_path: Path) -> None:
    keep(replace(RUN, fingerprint="a")).save(tmp_path / "b.json")
    kept = Baseline.load(tmp_path / "b.json")
    assert check(kept, keep(replace(RUN, fingerprint="b")), CheckOptions()).notes == (
        "The model has the baseline's name, but its files are not those of then.",
    )
    for same in (replace(RUN, fingerprint="a"), RUN):
        assert check(kept, keep(same), CheckOptions()).notes == ()


def test_what_can_be_compared_on_request_is_said() -> None:
    fewer = replace(RUN, instances=[one for one in RUN.instances if one.instance_id != "id3"])
    assert "the run lacks 1 of 60" in found(RUN, fewer, shared_only=True).notes[0]
    assert "the baseline lacks 1 of 60" in found(fewer, RUN, shared_only=True).notes[0]
    assert "opt-66b" in found(RUN, replace(RUN, model="opt-66b"), any_model=True).notes[0]
    assert found(RUN, replace(RUN, model="./models/OPT-30b/")).exit_code == 0
    assert (
        "torch 2.13.0 then, 2.14 now" in found(RUN, replace(RUN, versions={**RUN.versions, "torch": "2.14"})).notes[0]
    )


# Speed


def speed(*ratios: float, against: str = "none") -> Speed:
    return Speed(setting="w4", against=against, work="suite", ratios=list(ratios))


def test_speeds_of_runs_are_ratios_within_each() -> None:
    slow = replace(RUN, settings=[replace(one, elapsed_s=one.elapsed_s * 7) for one in RUN.settings])
    speeds = {(one.setting, one.against): one.ratios for one in speeds_of_runs([RUN, slow])}
    seconds = {setting.setting: setting.elapsed_s for setting in RUN.settings}
    assert speeds == {
        ("w4", "none"): pytest.approx([seconds["none"] / seconds["w4"]] * 2),
        ("none", "prediction"): pytest.approx([1.1, 1.1 / 7]),
        ("w4", "prediction"): pytest.approx([1.1, 1.1 / 7]),
    }
    resumed = replace(RUN, settings=[replace(one, num_resumed=1) for one in RUN.settings])
    assert speeds_of_runs([resumed]) == []


@pytest.mark.parametrize(
    ("now", "status"),
    [
        ((2.0, 2.1, 1.9), Status.PASS),
        ((1.7, 1.75, 1.72), Status.PASS),
        ((1.0, 1.05, 1.02), Status.REGRESSION),
        ((1.0, 2.1, 1.2), Status.OPEN),
        ((1.0, 1.0), Status.OPEN),
    ],
)
def test_a_fall_of_speed_is_shown_by_repeats(now: tuple[float, ...], status: Status) -> None:
    (finding,) = judge_throughput([speed(2.0, 2.05, 1.95)], [speed(*now)], tolerance=0.2)
    assert finding.status is status and not finding.must_settle
    (strict,) = judge_throughput([speed(2.0, 2.05, 1.95)], [speed(*now)], tolerance=0.2, is_strict=True)
    assert strict.must_settle is (status is Status.OPEN)


def test_speeds_of_another_machine_or_of_nothing_are_not_judged() -> None:
    (away,) = judge_throughput([speed(2, 2, 2)], [speed(1, 1, 1)], tolerance=0.2, not_comparable="elsewhere")
    (missing,) = judge_throughput([speed(2, 2, 2)], [speed(1, 1, 1, against="peer")], tolerance=0.2)
    assert (away.status, away.why) == (Status.OPEN, "elsewhere")
    assert (missing.status, missing.why) == (Status.OPEN, "not measured this time")


def test_the_p_value_of_a_fall_is_welchs() -> None:
    before, now = np.array([2.0, 2.2, 2.1, 1.9]), np.array([1.4, 1.6, 1.5])
    difference = np.log(now).mean() - np.log(before).mean() - np.log(0.8)
    parts = [np.log(one).var(ddof=1) / one.size for one in (before, now)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    assert slower_p(before, now, 0.2) == pytest.approx(stats.t.cdf(difference / np.sqrt(sum(parts)), freedom))


@pytest.mark.parametrize("num_repeats", [3, 5])
def test_noise_of_speed_raises_false_alarms_as_seldom_as_stated(num_repeats: int) -> None:
    rng = np.random.default_rng(0)
    before = np.exp(rng.normal(0.5, 0.1, (800, num_repeats)))
    now = np.exp(rng.normal(0.5 + np.log(0.8), 0.1, (800, num_repeats)))  # just tolerated
    alarms = np.mean([slower_p(*pair, 0.2) < 0.05 for pair in zip(before, now, strict=True)])
    assert alarms <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 800)
    halved = np.exp(rng.normal(0.5 + np.log(0.5), 0.1, (800, num_repeats)))
    assert np.mean([slower_p(*pair, 0.2) < 0.05 for pair in zip(before, halved, strict=True)]) > 0.8


def system(name: str, setting: str, seconds: list[float], **more: Any) -> SystemFigures:
    prefill = PhaseFigures(
        elapsed_s=sorted(seconds)[len(seconds) // 2],
        num_sweeps=1,
        num_fresh_tokens=100,
        num_decode_tokens=0,
        bounds={"compute": BoundFigures(amount=1.0, per_s=1.0, bound_s=1.0, predicted_s=1.1)} if more else {},
    )
    return SystemFigures(
        system=name,
        setting=setting,
        num_requests=10,
        batch_size=1,
        load_s=1.0,
        elapsed_s=sorted(seconds)[len(seconds) // 2],
        all_elapsed_s=seconds,
        peak_bytes={},
        tokens=TokenFigures(num_asked=1, num_duplicate=0, num_shared=0, num_computed=1, num_generated=0),
        phases={"prefill": prefill},
        **more,
    )


BENCH = BenchResults(
    model="opt-30b",
    work="10 requests",
    chosen="",
    command="",
    created="",
    machine={},
    versions={},
    hardware={},
    systems=[
        system("flexeval", "none", [4.0, 5.0, 8.0], predicted_s=1.1),
        system("flexeval", "w4", [2.0, 2.5, 4.0], predicted_s=1.1),
        system("transformers", "none", [20.0, 10.0, 40.0]),
    ],
)


def test_speeds_of_a_benchmark_are_held_against_settings_peers_and_the_bound(tmp_path: Path) -> None:
    BENCH.save(tmp_path / "bench.json")
    read = read_figures(tmp_path / "bench.json")
    assert read == BENCH
    speeds = {(one.setting, one.against): one.ratios for one in speeds_of_bench(read)}
    assert speeds == {
        ("none", "transformers"): pytest.approx([5.0, 2.0, 5.0]),
        ("none", "bound"): pytest.approx([1 / 4, 1 / 5, 1 / 8]),
        ("w4", "transformers"): pytest.approx([10.0, 4.0, 10.0]),
        ("w4", "none"): pytest.approx([2.0, 2.0, 2.0]),
        ("w4", "bound"): pytest.approx([1 / 2, 1 / 2.5, 1 / 4]),
    }


# What is shown


def outcome_of(*findings: Finding) -> Outcome:
    return Outcome(findings=findings, notes=("Versions differ.",))


def finding(status: Status, **fields: Any) -> Finding:
    given: dict[str, Any] = {"kind": Kind.QUALITY, "setting": "w4", "subject": OVERALL, "now": "1, was 2", "why": "so"}
    return Finding(status=status, **(given | fields))


def test_junit_tells_failures_errors_and_skipped_apart() -> None:
    outcome = outcome_of(
        finding(Status.PASS),
        finding(Status.REGRESSION, lost=("id1", "id2")),
        finding(Status.OPEN),
        finding(Status.OPEN, must_settle=True),
    )
    suite = ElementTree.fromstring(junit(outcome)).find("testsuite")
    assert suite is not None
    counts = [suite.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["4", "1", "1", "1"]
    assert "id1, id2" in (suite.findtext("testcase/failure") or "")


def test_hostile_names_stay_text() -> None:
    odd = HOSTILE + "\ufffe | `x` @all\n# y"
    outcome = outcome_of(finding(Status.REGRESSION, setting=odd, subject=odd, now=odd, why=odd, lost=(odd,)))
    case = ElementTree.fromstring(junit(outcome)).find("testsuite/testcase")
    assert case is not None and "<script>" in str(case.get("name"))
    assert not set("".join(lines(outcome))) & set("\n\x00\x1b\u202e\ud800")
    text = markdown(outcome)
    assert "<script>" not in text and "\x1b" not in text and "@all" not in text and "\n# y" not in text
    assert all(line.count("|") - line.count("\\|") == 6 for line in text.splitlines() if line.startswith("|"))


def test_many_questions_are_counted_not_all_named() -> None:
    outcome = outcome_of(finding(Status.REGRESSION, lost=tuple(f"id{number}" for number in range(1000))))
    assert "id19 and 980 more" in lines(outcome)[0] and "id199 and 800 more" in markdown(outcome)


# The command


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["flexeval", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_the_command_writes_a_baseline_and_holds_a_run_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in {"run": RUN, "worse": worse(2)}.items():
        run.save(tmp_path / name)
    baseline, xml, summary = (tmp_path / name for name in ("baselines/b.json", "check.xml", "check.md"))
    runs = [tmp_path / "run"] * 3
    assert call(monkeypatch, *runs, "--baseline", baseline, "--update") == 0
    assert "360 questions, 6 tasks, 2 settings, 3 speeds" in capsys.readouterr().out
    assert len(Baseline.load(baseline).speeds[0].ratios) == 3
    written = ("--junit", xml, "--markdown", summary)
    assert call(monkeypatch, *runs, "--baseline", baseline, *written) == 0
    assert "Passed" in capsys.readouterr().out and "**Passed" in summary.read_text()
    assert call(monkeypatch, tmp_path / "worse", "--baseline", baseline, *written) == 1
    assert "Regression" in capsys.readouterr().out and "<failure" in xml.read_text()
    (tmp_path / "run/results.json").write_text("{}")
    assert call(monkeypatch, tmp_path / "run", "--baseline", baseline, *written) == 2
    assert "results.json" in capsys.readouterr().err and "<error" in xml.read_text()


def test_mistakes_take_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RUN.save(tmp_path)
    (tmp_path / "odd.json").write_text("[")
    for arguments, words in {
        (tmp_path, "--baseline", tmp_path / "none.json"): "no baseline here",
        (tmp_path, "--baseline", tmp_path / "odd.json"): "not a baseline",
        (tmp_path, "--baseline", tmp_path / "results.json"): "not a baseline",
        (tmp_path, "--baseline", tmp_path / "b.json", "--bench", tmp_path / "odd.json"): "not a benchmark's figures",
        (tmp_path, "--baseline", tmp_path / "b.json", "--setting", "w8"): "no setting 'w8'",
        (tmp_path, "--baseline", tmp_path / "b.json", "--tolerance", "-1"): "--tolerance",
        (tmp_path, "--baseline", tmp_path / "b.json", "--update", "--junit", "x.xml"): "--junit",
        (tmp_path,): "--baseline",
    }.items():
        if "--update" not in arguments:
            keep(RUN).save(tmp_path / "b.json")
        assert call(monkeypatch, *arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and line.startswith("flexeval: ")


SMALL = keep(synthetic(**CHOSEN, tasks=TASKS[:2], num_questions=2), [speed(1.0, 1.1, 0.9)])


@settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "60")), suppress_health_check=list(HealthCheck), deadline=None
)
@given(data=st.data())
def test_an_odd_baseline_is_refused_or_compared(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    SMALL.save(path)
    path.write_text(json.dumps(data.draw(mutations(json.loads(path.read_text())))))
    try:
        outcome = check(Baseline.load(path), SMALL, CheckOptions(shared_only=True, any_model=True))
        assert lines(outcome) and markdown(outcome) and ElementTree.fromstring(junit(outcome)) is not None
    except FlexevalError as error:
        assert str(error).isprintable() and len(str(error)) < 3000


@settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "60")), suppress_health_check=list(HealthCheck), deadline=None
)
@given(data=st.data())
def test_an_odd_run_or_benchmark_is_refused_or_compared(data: st.DataObject, tmp_path: Path) -> None:
    small = synthetic(**CHOSEN, tasks=TASKS[:2], num_questions=2)
    small.save(tmp_path)
    BENCH.save(tmp_path / "bench.json")
    path = data.draw(st.sampled_from([tmp_path / "results.json", tmp_path / "bench.json"]))
    path.write_text(json.dumps(data.draw(mutations(json.loads(path.read_text())))))
    try:
        run = read_run([tmp_path, tmp_path, tmp_path], tmp_path / "bench.json")
        outcome = check(run, keep(small, run.speeds), CheckOptions(shared_only=True, any_model=True))
        assert lines(outcome) and markdown(outcome) and ElementTree.fromstring(junit(outcome)) is not None
        run.save(tmp_path / "b.json")
        assert Baseline.load(tmp_path / "b.json").settings == run.settings
    except FlexevalError as error:
        assert str(error).isprintable() and len(str(error)) < 3000


def test_a_run_is_read_with_its_repeats_and_benchmark(tmp_path: Path) -> None:
    RUN.save(tmp_path / "run")
    BENCH.save(tmp_path / "bench.json")
    kept = read_run([tmp_path / "run"], tmp_path / "bench.json")
    assert {one.against for one in kept.speeds} == {"none", "bound", "transformers"}
    assert {one.work for one in kept.speeds} == {"10 requests"}  # a single run says nothing of its spread


ROOT = Path(__file__).parent.parent


def test_the_projects_own_baseline_is_of_the_questions_that_its_gate_asks() -> None:
    kept = Baseline.load(ROOT / "reports/baselines/smollm2.json")
    asked = re.findall(r"description: \"(\w+):", (ROOT / ".ci/gate.conf").read_text())
    assert (kept.suite, kept.model, kept.settings, len(kept.tasks)) == ("gate", "smollm2", ["none", "w4"], len(asked))
    recipe = (ROOT / "Makefile").read_text()
    assert "--suite .ci/gate.conf" in recipe and "--baseline reports/baselines/smollm2.json" in recipe
    assert "make gate || status=1" in (ROOT / ".ci/run").read_text()


def test_the_workflow_to_copy_uses_options_that_there_are() -> None:
    """Those of its steps, and those that its head says to write the baseline with; both of the same run."""
    text = (ROOT / "docs/examples/flexeval-check.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == ["pull_request"] and workflow["permissions"] == {"contents": "read"}  # YAML 1.1 reads `on`
    steps = workflow["jobs"]["quality"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert "docs/examples/flexeval-check.yml" in (ROOT / "README.md").read_text()
    told = [shlex.split(line)[1:] for line in re.findall(r"^# +(flexeval .*)$", text, re.MULTILINE)]
    commands = [shlex.split(step["run"])[1:] for step in steps if ".venv/bin/flexeval" in step.get("run", "")]
    assert [name for name, *_ in told] == [name for name, *_ in commands] == ["run", "check"]
    assert told[0] == commands[0] and told[1][:4] == commands[1][:4]
    commands += told
    known = typer.main.get_group(app).commands
    for name, *arguments in commands:
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {one for one in arguments if one.startswith("--")} <= options
