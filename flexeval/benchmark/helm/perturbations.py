"""HELM's changes of wording that read files of their own: where they keep them. Must not know what they change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helm.benchmark.augmentations.perturbation import PerturbationSpec
from helm.benchmark.run_spec import RunSpec
from helm.common.object_spec import get_class_by_name

_PLACE = "OUTPUT_PATH"


@contextmanager
def perturbations_below(data: Path) -> Iterator[None]:
    """Have all that keep files keep them below a folder until the block ends.

    HELM says where when it first imports one, and whoever asks for another folder later is not heard.
    """
    # Not before: stock helm-run, which loads the plugin, has not said by then which folder it wants.
    from helm.benchmark.augmentations.dialect_perturbation import DialectPerturbation
    from helm.benchmark.augmentations.person_name_perturbation import PersonNamePerturbation

    kinds: tuple[Any, ...] = (DialectPerturbation, PersonNamePerturbation)
    before = [kind.OUTPUT_PATH for kind in kinds]
    for kind in kinds:
        kind.OUTPUT_PATH = str(data / "perturbations" / kind.name)
    try:
        yield
    finally:
        for kind, place in zip(kinds, before, strict=True):
            kind.OUTPUT_PATH = place


def perturbations_with_files(spec: RunSpec) -> list[PerturbationSpec]:
    """Return the perturbations of a run that keep files."""
    return [
        one for one in spec.data_augmenter_spec.perturbation_specs if hasattr(get_class_by_name(one.class_name), _PLACE)
    ]
