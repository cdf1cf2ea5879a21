"""Where files of data lie on this machine. Knows the caches of flexeval, datasets and NLTK; not what is in them."""

from __future__ import annotations

from pathlib import Path

import datasets  # type: ignore[import-untyped]
import nltk  # type: ignore[import-untyped]

from flexeval.cache import cache_root

PUNKT = "punkt_tab"


def data_roots() -> dict[str, Path]:
    """Return the folders below which archives may put files, by the names that manifests use.

    Of flexeval's cache, only the rooms that hold data: others hold what is run.
    """
    return {
        "helm": helm_data(),
        "assets": cache_root() / "assets",
        "datasets": Path(datasets.config.HF_DATASETS_CACHE),
        "tokenizers": (punkt_folder() or punkt_place()).parent,
    }


def helm_data() -> Path:
    """Return HELM's data for all runs: `scenarios/` and `packaged/scenarios/` lie below it."""
    return cache_root() / "helm"


def checksums_path() -> Path:
    """Return the file in which the checksums of what came are kept."""
    return cache_root() / "checksums.json"


def punkt_folder() -> Path | None:
    """Where NLTK finds the model that splits sentences: a folder, or an archive; None if it does not."""
    try:
        found = Path(str(nltk.data.find(f"tokenizers/{PUNKT}")))
    except LookupError:
        return None
    return next(path for path in (found, *found.parents) if path.exists())


def punkt_place() -> Path:
    """Where it belongs."""
    return Path(nltk.data.path[0]) / "tokenizers" / PUNKT
