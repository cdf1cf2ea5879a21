"""Results as pandas reads them, and the page that says what each name means."""

import io
import itertools
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageChops, ImageColor
from scipy import stats
from synthetic_results import HOSTILE, changed, synthetic

import flexeval
from flexeval.errors import ResultsError
from flexeval.report.compare import compare
from flexeval.report.frames import frames
from flexeval.report.render import chart
from flexeval.report.render.bitmap import SCALE, bitmap
from flexeval.report.render.environment import source
from flexeval.report.render.picture import picture
from flexeval.report.write import write_report
from flexeval.results import Fidelity, InstanceResult, RunResults, SettingResult, TaskInfo

DOCS = Path(__file__).parent.parent / "docs/results.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    results = synthetic(num_questions=4)
    results.save(out)
    write_report(results, out)
    return out


def test_a_run_is_tidy_tables(run):
    found = flexeval.load_results(run)
    assert found.results == RunResults.load(run)
    assert len(found.questions) == 4 * 6 * 4 and len(found.tasks) == 6 * 4 and len(found.settings) == 4
    assert not found.questions.duplicated(["task", "setting", "instance_id"]).any()
    by_task = found.questions.groupby(["task", "setting"])["score"].mean()
    for row in found.tasks.itertuples():
        assert by_task[row.task, row.setting] == pytest.approx(row.score)
    w4, comparison = found.settings.set_index("setting").loc["w4"], compare(found.results)
    assert w4.quality == comparison.settings[1].quality.value and w4.speedup == comparison.settings[1].speedup
    assert w4.gpu_peak_bytes == 17 * 2**30 and w4.gpu_planned_bytes == 2 * w4.gpu_peak_bytes
    lanes = found.lanes.set_index(["setting", "lane"])
    assert lanes.loc[("w4", "compute"), "busy_s"] == found.results.settings[1].lanes["compute"]["busy_s"]
    assert not {"object"} & set(map(str, found.settings.drop(columns=["setting", "backend"]).dtypes))


def test_parquet_holds_the_same(run):
    found = flexeval.load_results(run)
    pd.testing.assert_frame_equal(pd.read_parquet(run / "questions.parquet"), found.questions, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(run / "results.parquet"), found.tasks, check_dtype=False)


def test_hostile_texts_go_into_parquet_and_back(tmp_path):
    results = changed(lambda one: {"prompt": HOSTILE, "num_prompt_tokens": 2**63}, hostile=True, num_questions=2)
    write_report(replace(results, name="\ud800"), tmp_path)
    tasks = pd.read_parquet(tmp_path / "results.parquet")
    assert set(tasks["run"]) == {"\\ud800"} and set(tasks["num_prompt_tokens"]) == {2.0**64}
    prompts = set(pd.read_parquet(tmp_path / "questions.parquet")["prompt"])
    assert prompts == {HOSTILE.replace("\ud800", "\\ud800")}


def test_bare_results_are_tables_too(tmp_path):
    results = synthetic(settings=["none"], num_questions=1)
    bare = replace(results.settings[0], lanes={}, peak_bytes={}, planned_bytes={}, elapsed_s=0.0)
    results = replace(results, settings=[bare])
    assert len(frames(compare(results)).lanes) == 0
    pictures = [tmp_path / "quality-speed.svg", tmp_path / "quality-speed.png"]
    for one in pictures:
        one.write_text("an earlier run's")
    write_report(results, tmp_path)
    assert len(pd.read_parquet(tmp_path / "results.parquet")) == 6
    assert not any(one.exists() for one in pictures)
    with pytest.raises(ResultsError, match="no results here"):
        flexeval.load_results(tmp_path)


def test_the_picture_stands_alone():
    text = picture(compare(synthetic()))
    assert text.startswith('<svg class="chart"') and 'xmlns="http://www.w3.org/2000/svg"' in text
    assert "prefers-color-scheme: dark" in text and "<script" not in text and "w4-g128" in text
    hostile = synthetic(settings=["none", "w4"], num_questions=2)
    named = replace(hostile.settings[1], setting=HOSTILE)
    instances = [replace(one, setting=HOSTILE) if one.setting == "w4" else one for one in hostile.instances]
    text = picture(compare(replace(hostile, settings=[hostile.settings[0], named], instances=instances)))
    assert "<img" not in text and "<script" not in text and "&lt;img" in text


def test_the_picture_is_a_bitmap_too(run):
    """Each mark stands in its colour where the SVG has it, and nothing is cut off."""
    drawn = chart.trade_off(compare(RunResults.load(run)))
    with Image.open(run / "quality-speed.png") as image:
        assert image.format == "PNG" and image.size == (chart.WIDTH * SCALE, chart.HEIGHT * SCALE)
        assert "questions per second" in image.text["Title"]
        pixels = image.convert("RGB")
    colors = dict(re.findall(r"--(\w+): (#\w+)", source("report.css").partition("@media")[0]))
    for mark in drawn.marks:
        found = pixels.getpixel((round(mark.x * SCALE), round(mark.y * SCALE)))
        assert found == ImageColor.getrgb(colors[f"s{mark.series}"]), mark.label
        label = pixels.crop([round(edge * SCALE) for edge in mark.box])
        assert label.convert("L").getextrema()[0] < 60, f"no ink for {mark.label}"
    background = Image.new("RGB", pixels.size, colors["ground"])
    left, top, right, bottom = ImageChops.difference(pixels, background).getbbox()
    assert left > 0 and top > 0 and right < pixels.width and bottom < pixels.height


def test_without_fonts_the_bitmap_has_plain_letters(monkeypatch):
    monkeypatch.setattr("flexeval.report.render.bitmap._FONTS", dict.fromkeys((False, True), "there-is-none.ttf"))
    results = synthetic(settings=["none", "w4"], num_questions=2)
    named = replace(results.settings[1], setting=HOSTILE)
    instances = [replace(one, setting=HOSTILE) if one.setting == "w4" else one for one in results.instances]
    data = bitmap(compare(replace(results, settings=[results.settings[0], named], instances=instances)))
    with Image.open(io.BytesIO(data)) as image:
        assert len(image.convert("RGB").getcolors(2**20)) > 50


def test_every_field_and_column_is_explained(run):
    told = set(re.findall(r"`(\w+)`", DOCS.read_text()))
    found = flexeval.load_results(run)
    columns = {column for frame in found[:4] for column in frame}
    names = {
        field.name for kind in (RunResults, TaskInfo, SettingResult, InstanceResult, Fidelity) for field in fields(kind)
    }
    assert (names | columns) - told == set()


def independent(questions, setting, weights):
    """Differences, Bonett and Price's and Student's variances and exact p values of a setting, from rows alone."""
    wide = questions.pivot(index=["task", "instance_id"], columns="setting", values="score")
    change = wide[setting] - wide["none"]
    found, center, variance, doubt, flips = {}, 0.0, 0.0, 0.0, []
    num_binary = sum(set(part) <= {-1.0, 0.0, 1.0} for _, part in change.groupby("task"))
    for task, part in change.groupby("task"):
        up, down, n, w = int((part > 0).sum()), int((part < 0).sum()), len(part), weights[task]
        if set(part) <= {-1.0, 0.0, 1.0}:
            tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1)) / 2 ** (up + down)
            found[task] = min(1.0, 2 * tail)
            gained, lost = ((count + 1 / num_binary) / (n + 2 / num_binary) for count in (up, down))
            center += w * (gained - lost)
            variance += w**2 * (gained + lost - (gained - lost) ** 2) / (n + 2 / num_binary)
        else:
            moved = [value for value in part if value]
            sums = [abs(np.dot(signs, moved)) for signs in itertools.product((-1, 1), repeat=len(moved))]
            found[task] = float(np.mean(np.array(sums) >= abs(sum(moved)) - 1e-12))
            center += w * part.mean()
            variance += w**2 * part.var(ddof=1) / n
            doubt += (w**2 * part.var(ddof=1) / n) ** 2 / (n - 1)
        flips += [w * value / n for value in part if value]
    half = stats.t.ppf(0.975, variance**2 / doubt) * math.sqrt(variance)
    value = sum(weights[task] * part.mean() for task, part in change.groupby("task"))
    sums = np.zeros(1)
    for flip in flips:
        sums = np.concatenate([sums - flip, sums + flip])
    p_value = float(np.mean(np.abs(sums) >= abs(sum(flips)) - 1e-12))
    return value, center - half, center + half, p_value, found


def test_every_statistic_follows_from_the_rows_by_other_code():
    """Tasks of different sizes, one graded, three of one group: all by formulas and enumeration written out here."""
    results = synthetic(settings=["none", "w4", "w4-g32"], num_questions=12, seed=11)
    sizes = {"narrative_qa": 7, "openbookqa": 12, "gsm": 5}
    kept = [one for one in results.instances if int(one.instance_id[2:]) < sizes.get(one.task, 9)]
    found = frames(compare(replace(results, instances=kept)))
    weights = {task.name: 1 / 4 / (3 if task.group == "mmlu" else 1) for task in results.tasks}
    overall, alone = {}, {}
    for setting in ("w4", "w4-g32"):
        *figures, p_value, by_task = independent(found.questions, setting, weights)
        row = found.settings.set_index("setting").loc[setting]
        assert [row.difference, row.difference_low, row.difference_high] == pytest.approx(figures)
        assert row.p_value == pytest.approx(p_value, abs=0.012), "more than 9,999 patterns are sampled"
        overall[setting] = row.p_value
        for task, expected in by_task.items():
            cell = found.tasks.set_index(["task", "setting"]).loc[(task, setting)]
            assert cell.p_value == pytest.approx(expected)
            alone[task, setting] = expected
    for p_values, frame, keys in (
        (overall, found.settings, ["setting"]),
        (alone, found.tasks, ["task", "setting"]),
    ):
        largest = 0.0
        for rank, key in enumerate(sorted(p_values, key=p_values.get)):
            largest = min(1.0, max(largest, (len(p_values) - rank) * p_values[key]))
            assert frame.set_index(keys).loc[key].corrected_p_value == pytest.approx(largest)
