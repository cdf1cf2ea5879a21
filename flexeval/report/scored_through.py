"""What a reader must know of how scores came about under a compressed cache, in one sentence. Computes no figure."""

from __future__ import annotations

from collections.abc import Iterable

from flexeval.config import Setting
from flexeval.errors import ConfigError


def scored_through(settings: Iterable[str]) -> str:
    """The sentence about those settings that compress the KV cache; empty where none does.

    Args:
        settings: Their labels, such as `kv4`, or `run/kv4` where runs are merged.
    """
    names = [label for label in settings if _codes_kv(label)]
    if not names:
        return ""
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return (
        f"With {listed}, all scores went through the compressed cache: every token attended to keys and values "
        "as the cache gives them back, also in prompts that are only scored."
    )


def _codes_kv(label: str) -> bool:
    try:
        return Setting.parse(label.rpartition("/")[2]).kv_bits is not None
    except ConfigError:  # results of a version that knows other settings
        return False
