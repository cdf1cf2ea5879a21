"""A check's outcome as JUnit XML, which CI systems show test by test. Knows the format; judges nothing.

A regression is a failure; what stays open is skipped, or an error where it leaves the check without an answer.
The format is the one that Jenkins' xUnit plugin and pytest write.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

from flexeval.gate.findings import Outcome, Status
from flexeval.gate.text import details
from flexeval.report import format as show

_NO_CHARACTERS = re.compile("[\ufffe\uffff]")
"""Not in XML, beside those that `show.visible` writes out."""


def junit(outcome: Outcome) -> str:
    """The findings as test cases."""
    suite = Xml.Element("testsuite", name="flexeval check")
    for finding in outcome.findings:
        case = Xml.SubElement(
            suite,
            "testcase",
            classname=_legal(f"{finding.kind}.{finding.setting}"),
            name=_legal(finding.subject),
            time="0",
        )
        text = _legal(details(finding))
        if finding.status is Status.REGRESSION:
            Xml.SubElement(case, "failure", message=_legal(f"{finding.now}; {finding.why}")).text = text
        elif finding in outcome.undecided:
            Xml.SubElement(case, "error", message=_legal(finding.why)).text = text
        elif finding.status is Status.OPEN:
            Xml.SubElement(case, "skipped", message=_legal(f"{finding.now}; {finding.why}"))
        else:
            Xml.SubElement(case, "system-out").text = text
    return _whole(suite)


def junit_error(message: str) -> str:
    """A check that could not be made at all."""
    suite = Xml.Element("testsuite", name="flexeval check")
    case = Xml.SubElement(suite, "testcase", classname="check", name="the run and the baseline", time="0")
    Xml.SubElement(case, "error", message=_legal(message))
    return _whole(suite)


def _whole(suite: Xml.Element) -> str:
    counts = {"tests": "testcase", "failures": "*/failure", "errors": "*/error", "skipped": "*/skipped"}
    for name, path in counts.items():
        suite.set(name, str(len(suite.findall(path))))
    suites = Xml.Element("testsuites")
    suites.append(suite)
    Xml.indent(suites)
    text: bytes = Xml.tostring(suites, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"


def _legal(text: str) -> str:
    return _NO_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", show.visible(text))
