"""The page and its picture: every figure is there, the data read back, and model output cannot act."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic_results import HOSTILE, TASKS, changed, synthetic
from test_report_fidelity import run_with_rows

from flexeval.config import format_size
from flexeval.report import format as show
from flexeval.report.answer import answer, choice
from flexeval.report.compare import compare
from flexeval.report.merge import merge
from flexeval.report.render import chart, questions
from flexeval.report.render.html import page
from flexeval.report.render.labels import Box
from flexeval.report.render.markdown import summary
from flexeval.report.verdict import Kind, verdicts
from flexeval.report.write import write_report


class Reader(HTMLParser):
    """What a browser would see: tags in order, text outside scripts, and the contents of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.raw = [], [], "", []
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        self.inside = tag

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.raw.append(data)
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.inside = None


def page_data(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def four():
    return compare(synthetic())


# --- the page ---


def test_the_report_is_a_few_files_and_the_page_is_small(tmp_path):
    path = write_report(synthetic(), tmp_path)
    assert path == tmp_path / "index.html"
    assert {file.name for file in tmp_path.iterdir()} == {
        "index.html",
        "report.md",
        "results.csv",
        "results.parquet",
        "questions.parquet",
        "quality-speed.svg",
        "quality-speed.png",
    }
    assert path.stat().st_size < 200_000


def test_the_page_asks_nothing_of_the_network_and_allows_only_its_own_script(four):
    text = page(four)
    reader = Reader(text)
    assert "http://" not in text and "https://" not in text
    fetched = [attribute for attribute in reader.attributes if attribute[1] in ("src", "href", "style", "action")]
    assert all(attribute[1] == "href" and attribute[2].startswith("#") for attribute in fetched)
    assert not [attribute for attribute in reader.attributes if attribute[1].startswith("on")]
    policy = next(value for tag, name, value in reader.attributes if tag == "meta" and "default-src" in value)
    style, data, script = reader.raw
    for part, directive in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert json.loads(data)


def test_the_page_shows_every_score_cost_and_caveat(four):
    seen = Reader(page(four)).text
    for sentence in answer(four):
        assert sentence in seen
    for row in four.settings:
        for part in (row.result.setting, show.seconds(row.result.load_s), show.digits(row.tokens_per_s)):
            assert part in seen
        assert row.result.predicted_s is not None
        assert f"{show.seconds(row.result.predicted_s)}{show.change(0.1, in_points=True)}%" in seen
        assert f"of {format_size(row.result.planned_bytes['cpu'])} planned" in seen
    for row in four.tasks:
        for cell in row.cells:
            assert show.score(cell.score.value, in_points=True) in seen
            assert show.interval(cell.score, in_points=True) in seen
    for fact in (
        "Scores are random numbers made for a test.",
        "its data is behind a login",
        "Example GPU, 24 GiB",
        "crfm-helm",
        "registry copy of GSM8K",
        "--settings none,w4,w4-g32,w4-g128",
        "group_tokens",
        "load_weights",
    ):
        assert fact in seen


def test_each_setting_has_a_row_with_its_change_and_the_chosen_one_is_marked(four):
    text = page(four)
    rows = re.findall(r'<tr class="s\d( chosen)?">(.*?)</tr>', text, re.DOTALL)
    assert len(rows) == 4
    seen = [(bool(mark), " ".join(Reader(row).text.split())) for mark, row in rows]
    picked = choice(four)
    for (is_chosen, words), row, verdict in zip(seen, four.settings, verdicts(four), strict=True):
        assert is_chosen == (row is picked.row) == (picked.words in words)
        assert row.result.setting in words and verdict.kind.value in words and verdict.unseen in words
        assert show.interval(row.quality, in_points=True) in words and format_size(row.memory_bytes) in words
        if row.difference:
            assert show.interval(row.difference.estimate, in_points=True, signed=True) in words
            assert f"{show.ratio(row.speedup)}{show.digits(row.questions_per_s)} questions/s" in words
            assert show.ratio(1 / row.memory_ratio) in words
            bounds = [show.change(end, in_points=True) for end in row.difference.bootstrap]
            assert " to ".join(bounds) in Reader(text).text


def test_every_kind_of_verdict_has_its_mark_and_the_method_names_the_margin(four):
    text = page(four)
    assert all(f".kind-{kind.name.lower()}::before" in text for kind in Kind)
    assert "no room for a loss of more than 5 points" in Reader(text).text


def test_hostile_texts_stay_texts_wherever_they_stand():
    results = changed(lambda instance: {"prompt": HOSTILE, "reference": HOSTILE}, hostile=True, num_questions=3)
    setting = replace(results.settings[0], setting=HOSTILE, policy={HOSTILE: HOSTILE}, lanes={HOSTILE: {}})
    results = replace(
        results,
        name=HOSTILE,
        model=HOSTILE,
        model_note=HOSTILE,
        suite=HOSTILE,
        command=HOSTILE,
        created=HOSTILE,
        machine={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        skipped={HOSTILE: HOSTILE},
        tasks=[replace(task, name=HOSTILE + task.name, source=HOSTILE, metric=HOSTILE) for task in TASKS],
        settings=[setting, *results.settings[1:]],
        instances=[
            replace(
                instance,
                task=HOSTILE + instance.task,
                instance_id=HOSTILE + instance.instance_id,
                setting=HOSTILE if instance.setting == "none" else instance.setting,
            )
            for instance in results.instances
        ],
    )
    comparison = compare(results)
    text = page(comparison)
    reader = Reader(text)
    assert reader.tags.count("script") == 2 and "img" not in reader.tags
    assert "<script>alert" not in text and "<img" not in text
    assert not re.search("[\x00\x1b\u202e\ud800]", text)
    text.encode()
    assert page_data(text)["settings"][0].startswith("</script><script>alert(1)")
    markdown = summary(comparison)
    assert not re.search(r"(?<!\\)<(script|img)", markdown.split("<summary>How this was made")[0])


def test_the_questions_carry_what_was_answered(four):
    data = page_data(page(four))
    assert data["settings"] == ["none", "w4", "w4-g32", "w4-g128"] and data["baseline"] == 0
    assert len(data["questions"]) == 360
    for (task, instance_id, prompt, reference, scores, outputs), question in zip(
        data["questions"], four.questions, strict=True
    ):
        base = question.answers[0]
        assert (data["tasks"][task]["name"], instance_id) == (question.task, question.instance_id)
        assert data["tasks"][task]["header"] + prompt == base.prompt
        assert reference == base.reference
        assert scores == [one.score for one in question.answers]
        assert [outputs[0] if text is None else text for text in outputs] == [one.output for one in question.answers]


def test_answers_of_hostile_models_round_trip_through_the_page():
    comparison = compare(synthetic(hostile=True, num_questions=2))
    text = page(comparison)
    raw = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in raw and HOSTILE[:9] == "</script>"
    first = page_data(text)["questions"][0][5][0]
    assert first.startswith("</script><script>alert(1)</script><img src=x onerror=alert(2)> &")
    assert r"\u202e\u001b[31m\u0000 \ud800" in first


def test_long_texts_are_cut_with_a_note():
    comparison = compare(
        changed(lambda one: {"prompt": f"{one.instance_id} {'p' * 9000} end", "output": "o" * 9000}, num_questions=2)
    )
    _, _, prompt, _, _, outputs = page_data(page(comparison))["questions"][0]
    assert prompt.endswith("p end") and prompt.startswith("[5,008 characters before] ")
    assert outputs[0].endswith("o [5,000 more characters]")
    assert outputs[0].count("o") >= 4000


def test_twenty_thousand_questions_make_a_page_of_bounded_size(monkeypatch):
    monkeypatch.setattr(questions, "_PAGE_CHARACTERS", 100_000)
    change = {"prompt": "x" * 2000, "output": "y" * 500}
    data = questions.drill_down(compare(changed(lambda one: {**change, "prompt": one.instance_id + "x" * 2000})))
    assert 60_000 < len(json.dumps(data)) < 160_000


def test_a_single_setting_makes_a_whole_report():
    comparison = compare(synthetic(settings=["w4"]))
    seen = Reader(page(comparison)).text
    assert "What came out?" in seen and answer(comparison)[0] in seen
    assert "Change of quality" not in seen and "Holm)." not in seen.split("How this was made")[0]
    assert "difference" not in summary(comparison).splitlines()[6]


def test_bare_results_make_a_whole_report():
    results = synthetic(settings=["none", "w4"], num_questions=1)
    nothing = {"peak_bytes": {}, "planned_bytes": {}, "policy": {}, "lanes": {}, "elapsed_s": 0.0, "predicted_s": None}
    bare = [replace(one, **nothing) for one in results.settings]
    comparison = compare(replace(results, settings=bare, machine={}, versions={}, skipped={}, notes=[]))
    assert chart.trade_off(comparison) is None
    seen = Reader(page(comparison)).text
    assert "foretold" not in seen and "planned" not in seen
    assert "No policy was recorded" in seen and "not measured" in seen and "nan" not in seen
    assert "nan" not in summary(comparison)


def test_memory_and_time_are_drawn_beside_what_was_expected(four):
    text = page(four)
    bars = re.findall(
        r'class="amount s(\d)".*?class="level" d="M0 2H([\d.]+)V10H0z"/>(?:<path class="expected" d="M([\d.]+) 0V12")?',
        text,
    )
    results = [row.result for row in four.settings]
    slowest = max(one.predicted_s for one in results)
    most = {tier: max(one.planned_bytes[tier] for one in results) for tier in ("gpu", "cpu")}
    expected = [
        (str(series), f"{100 * value / end:.2f}", f"{100 * planned / end:.2f}")
        for series, one in enumerate(results)
        for value, planned, end in (
            (one.elapsed_s, one.predicted_s, slowest),
            *((one.peak_bytes[tier], one.planned_bytes[tier], most[tier]) for tier in most),
        )
    ]
    assert bars[: len(expected)] == expected
    lanes = [
        (str(series), f"{100 * one.lanes[lane]['busy_s'] / one.elapsed_s:.2f}", "")
        for lane in results[0].lanes
        for series, one in enumerate(results)
    ]
    assert bars[len(expected) :] == lanes


def test_helms_headline_figures_are_means_over_the_tasks_of_a_group(four):
    seen = Reader(page(four)).text.partition("As HELM's leaderboard shows it")[2].partition("A column a group")[0]
    groups: dict[str, list] = {}
    for task in four.tasks:
        groups.setdefault(task.task.group, []).append([cell.score.value for cell in task.cells])
    expected = [f"{np.mean([row[index] for row in rows]):.3f}" for index in range(4) for rows in groups.values()]
    assert re.findall(r"\d\.\d{3}", seen) == expected and list(groups) == ["narrative_qa", "commonsense", "mmlu", "gsm"]
    assert "As HELM's leaderboard" not in page(compare(synthetic(tasks=TASKS[:1], num_questions=2)))


def test_the_page_says_which_files_the_model_was(four):
    told = replace(four, results=replace(four.results, fingerprint="ab" * 32))
    assert "ab" * 32 in Reader(page(told)).text and "hash of its files" not in page(four)


# --- the picture ---


def test_marks_stand_where_the_figures_say(four):
    picture = chart.trade_off(four)
    assert [mark.label for mark in picture.marks] == ["none", "w4", "w4-g32", "w4-g128"]
    speeds = [row.questions_per_s for row in four.settings]
    qualities = [row.quality.value for row in four.settings]
    zero = next(tick.position for tick in picture.x_ticks if tick.text == "0")
    one = next(tick.position for tick in picture.x_ticks if tick.text == "1")
    for mark, speed, quality in zip(picture.marks, speeds, qualities, strict=True):
        assert mark.x == pytest.approx(zero + speed * (one - zero), abs=0.02)
        low_tick, high_tick = picture.y_ticks[0], picture.y_ticks[-1]
        share = (quality * 100 - float(low_tick.text)) / (float(high_tick.text) - float(low_tick.text))
        assert mark.y == pytest.approx(low_tick.position + share * (high_tick.position - low_tick.position), abs=0.02)
        assert mark.ends[0] > mark.y > mark.ends[1]
    assert list(picture.front) == sorted(picture.front) and len(picture.front) >= 2


def test_labels_do_not_cover_each_other():
    """Nor marks, however near these are: labels that stand apart have a line to theirs."""
    once = [synthetic(name=name) for name in ("first-run", "second-run", "third-run")]
    marks = chart.trade_off(compare(merge(once))).marks
    boxes = [mark.box for mark in marks]
    assert len(boxes) == 12
    dots = [Box(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7) for mark in marks]
    hits = [(one, two) for one in boxes for two in (*boxes, *dots) if one is not two and one.overlaps(two)]
    assert not hits
    apart = [mark for mark in marks if mark.leader]
    assert 0 < len(apart) < len(marks)
    assert page(compare(merge(once))).count('class="leader"') == len(apart)


def test_axes_have_round_ticks_that_hold_the_values():
    axis = chart._Axis([0.613, 0.587, 0.64], 100, 0, 100)
    assert [tick.text for tick in axis.ticks()] == ["58", "60", "62", "64"]
    assert axis(0.58) == 100 and axis(0.64) == 0
    assert len(chart._Axis([0.5], 0, 10).ticks()) >= 2
    assert len(chart._Axis([0.0, 0.0], 0, 10).ticks()) >= 2


# --- closeness ---


def test_the_page_shows_how_closely_a_setting_follows_the_baseline(tmp_path):
    p = np.log(np.random.default_rng(0).dirichlet(np.ones(40), size=20)).astype(np.float32)
    results = run_with_rows(tmp_path, "close", {"none": p, "w4": p[:, ::-1]})
    overall = results.fidelity[0]
    text = " ".join(Reader(page(compare(results))).text.split())
    for figure in (
        show.with_error(overall.kl, overall.kl_error),
        show.percent(overall.same_top, overall.same_top_error),
        show.percent(overall.probability_change, overall.probability_change_error),
        f"99% below {show.digits(overall.kl_quantiles[10])}",
        "the 8 most probable tokens at each position",
    ):
        assert figure in text
    assert "How closely" not in page(compare(replace(results, fidelity=[])))
    without = [replace(one, num_text=0, loss_change=None, kl_error=None) for one in results.fidelity]
    assert "How closely" in page(compare(replace(results, fidelity=without)))
