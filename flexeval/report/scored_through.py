"""What a reader must know of how scores came about under a coded cache or a sparse attention. Computes no figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexeval.config import Setting
from flexeval.errors import ConfigError


def scored_through(settings: Iterable[str]) -> str:
    """A sentence about those settings that compress the KV cache, and one about those that attend to some of the keys.

    Args:
        settings: Their labels, such as `kv4`, or `run/kv4` where runs are merged.
    """
    parsed = [(label, setting) for label in settings if (setting := _parse(label)) is not None]
    sentences = []
    if names := [label for label, setting in parsed if setting.kv_bits is not None]:
        sentences.append(
            f"With {_listed(names)}, all scores went through the compressed cache: every token attended to keys and "
            "values as the cache gives them back, also in prompts that are only scored."
        )
    if names := [label for label, setting in parsed if setting.sparsity is not None]:
        sentences.append(
            f"With {_listed(names)}, every token attended to the chosen part of its keys alone, also in prompts that "
            "are only scored."
        )
    return " ".join(sentences)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _parse(label: str) -> Setting | None:
    try:
        return Setting.parse(label.rpartition("/")[2])
    except ConfigError:  # results of a version that knows other settings
        return None
