"""The page in a real browser: no error, nothing of the model runs, filters and drill-down work."""

import dataclasses
import re
import shutil
import subprocess
from html import unescape

import pytest
from synthetic_results import synthetic

from flexeval.report.compare import compare
from flexeval.report.render.html import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")

WORSE = "task=5&change=worse-3"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
DRIVER = """<script>
const form = document.getElementById("filters");
document.getElementById("more").click();
document.title = `rows ${document.querySelectorAll(".question").length}`;
form.elements.text.value = " 3 TIMES 7, ";
form.dispatchEvent(new Event("input"));
setTimeout(() => {
  document.title += `, ${document.getElementById("found").value}, ${location.hash}`;
  document.querySelector('nav a[href="#cost"]').click();
}, 400);
setTimeout(() => { document.title += `, still ${document.getElementById("found").value}`; }, 800);
</script></body>"""


@pytest.fixture(scope="module")
def comparison():
    return compare(synthetic(hostile=True))


@pytest.fixture(scope="module")
def text(comparison):
    return page(comparison)


@pytest.fixture
def browse(tmp_path):
    def run(text, fragment=""):
        """The document after its scripts ran, and what the console said."""
        path = tmp_path / "index.html"
        path.write_text(text, encoding="utf-8")
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        result = subprocess.run(
            [
                BROWSER,
                *options.split(),
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--enable-logging=stderr",
                "--virtual-time-budget=3000",
                "--dump-dom",
                f"{path.as_uri()}#{fragment}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return result.stdout, re.findall(r"CONSOLE.*", result.stderr)

    return run


def test_the_page_opens_without_an_error_and_lists_the_first_questions(browse, text):
    dom, console = browse(text)
    assert console == []
    assert "360 of 360 questions" in dom
    assert dom.count('<details class="question">') == 50
    assert '<button type="button" id="more">' in dom


def test_a_filter_in_the_address_shows_the_questions_that_got_worse(browse, text, comparison):
    dom, console = browse(text, WORSE)
    num_worse = comparison.tasks[5].cells[3].difference.num_worse
    assert console == []
    assert num_worse > 0 and f"{num_worse} of 360 questions" in dom
    assert dom.count('<details class="question">') == num_worse
    assert dom.count('<span class="chip worse" title="worse">w4-g128 0</span>') == num_worse


def test_a_search_in_the_address_looks_into_answers(browse, text):
    dom, _ = browse(text, "text=first+we+add+7+and")
    assert "1 of 360 questions" in dom


def test_an_opened_question_shows_every_answer_as_text(browse, text, comparison):
    number = next(
        number
        for number, question in enumerate(comparison.questions)
        if question.task == "gsm" and question.answers[0].score > question.answers[3].score
    )
    dom, console = browse(text, f"{WORSE}&question={number}")
    assert console == []
    opened = re.search(r'<details class="question" open="">(.*?)</div></details>', dom, re.DOTALL)[1]
    shown = [unescape(part) for part in re.findall(r"<pre>(.*?)</pre>", opened, re.DOTALL)]
    header, prompt, reference, *answers = shown
    question = comparison.questions[number]
    assert header + prompt == question.answers[0].prompt and reference == question.answers[0].reference
    assert len(answers) == 4
    for answer, instance in zip(answers, question.answers, strict=True):
        assert answer.startswith("</script><script>alert(1)</script><img src=x onerror=alert(2)>")
        assert answer.endswith(instance.output[-20:])


def test_a_question_is_announced_by_its_own_beginning(browse):
    results = synthetic(num_questions=1)
    prompt = "Here are\nexamples.\n\nQ: How many\n  legs has a spider?\nA. six\n\nAnswer:"
    instances = [dataclasses.replace(instance, prompt=prompt) for instance in results.instances]
    dom, console = browse(page(compare(dataclasses.replace(results, instances=instances))))
    assert console == []
    assert '<span class="excerpt">Q: How many legs has a spider? A. six</span>' in dom


def test_nothing_but_the_pages_own_script_may_run(browse, text):
    planted = text.replace("</body>", '<script>document.title = "planted"</script></body>')
    dom, console = browse(planted)
    assert "<title>planted</title>" not in dom
    assert len(console) == 1 and "Content Security Policy" in console[0]


def test_typing_and_showing_more_work(browse, text):
    # The driver is a script of its own, so this one test takes the page's policy out.
    dom, console = browse(POLICY.sub("", text).replace("</body>", DRIVER))
    assert console == []
    assert "<title>rows 100, 6 of 360 questions, #text=+3+TIMES+7%2C+, still 6 of 360 questions</title>" in dom
