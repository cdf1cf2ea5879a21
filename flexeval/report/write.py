"""Every file of a report, in one directory. Knows their names; nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

import pyarrow

from flexeval.files import replacing, write_text
from flexeval.parquet import save_table
from flexeval.report.compare import compare
from flexeval.report.frames import frames
from flexeval.report.render.bitmap import bitmap
from flexeval.report.render.html import page
from flexeval.report.render.markdown import summary
from flexeval.report.render.picture import picture
from flexeval.report.render.table import table
from flexeval.results import RunResults

PAGE_FILE = "index.html"
SUMMARY_FILE = "report.md"
TABLE_FILE = "results.csv"
PARQUET_FILE = "results.parquet"
QUESTIONS_FILE = "questions.parquet"
PICTURE_FILE = "quality-speed.svg"
BITMAP_FILE = "quality-speed.png"


def write_report(results: RunResults, directory: Path) -> Path:
    """Write the page, its picture, the comment and the tables; return the path of the page.

    Raises:
        ResultsError: The settings cannot be compared question by question.
    """
    comparison = compare(results)
    write_text(directory / TABLE_FILE, table(comparison))
    tables = frames(comparison)
    for name, frame in {PARQUET_FILE: tables.tasks, QUESTIONS_FILE: tables.questions}.items():
        save_table(pyarrow.Table.from_pandas(frame, preserve_index=False), directory / name)
    if (drawn := picture(comparison)) is not None and (dots := bitmap(comparison)) is not None:
        write_text(directory / PICTURE_FILE, drawn)
        with replacing(directory / BITMAP_FILE) as path:
            path.write_bytes(dots)
    else:  # those there may be are an earlier run's
        for name in (PICTURE_FILE, BITMAP_FILE):
            (directory / name).unlink(missing_ok=True)
    write_text(directory / SUMMARY_FILE, summary(comparison))
    write_text(directory / PAGE_FILE, page(comparison))
    return directory / PAGE_FILE
