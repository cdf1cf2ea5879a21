"""Every file of a report, in one directory. Knows their names; nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

from flexeval.files import write_text
from flexeval.report.compare import compare
from flexeval.report.render.html import page
from flexeval.report.render.markdown import summary
from flexeval.report.render.table import table
from flexeval.results import RunResults

PAGE_FILE = "index.html"
SUMMARY_FILE = "report.md"
TABLE_FILE = "results.csv"


def write_report(results: RunResults, directory: Path) -> Path:
    """Write `index.html`, `report.md` and `results.csv`; return the path of the page.

    Raises:
        ResultsError: The settings cannot be compared question by question.
    """
    comparison = compare(results)
    write_text(directory / TABLE_FILE, table(comparison))
    write_text(directory / SUMMARY_FILE, summary(comparison))
    write_text(directory / PAGE_FILE, page(comparison))
    return directory / PAGE_FILE
