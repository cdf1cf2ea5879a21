"""Writing a quantized model once, for all later runs. Joins models and settings to the engine that packs layers.

Knows what goes into a prepared model's directory; neither how layers are packed nor how they are read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flexeval.backends.loading import OpenModel, open_model
from flexeval.backends.weights import cache_name
from flexeval.cache import build_whole, cached_directory
from flexeval.config import Setting, format_size
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.preparing import write_model
from flexeval.errors import CapacityError, ConfigError
from flexeval.models import ModelSource, resolve
from flexeval.prepared import CACHE, Manifest, facts_of, is_prepared, read_manifest
from flexeval.progress import Progress

_COPIED = ("*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt")
_NOT_COPIED = ("*.safetensors.index.json",)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What `flexeval prepare-model` was asked for."""

    model: str
    """Model REF."""
    setting: str
    """A setting with w; what else it names has no part in this."""
    out: Path | None = None
    """A new directory; None prepares in the cache, where runs look for it."""
    device: str = "auto"
    """Where matrices are coded: `auto`, `cpu` or `cuda`. The bytes do not depend on it."""
    dtype: str = "auto"
    """Type of the arithmetic that is prepared for, as for `Engine.load`."""


class Prepared(NamedTuple):
    """A model that is ready."""

    directory: Path
    manifest: Manifest
    is_new: bool
    """Whether it was not there before."""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(facts.num_bytes for facts in self.manifest.files.values())


def prepare(options: PrepareOptions, progress: Progress) -> Prepared:
    """Pack a model under a setting and write it: all of it, or nothing.

    Raises:
        FlexevalError: Something that the user can mend.
    """
    setting = Setting.parse(options.setting)
    if setting.weight_bits is None:
        what = f"setting {setting.name!r} leaves weights as they are: there is nothing to prepare"
        raise ConfigError(what, where="--setting", mend="Choose one with w, such as w4")
    with progress.activity(f"reading {options.model}"):
        source = resolve(options.model)
        if source.is_prepared:
            raise ConfigError("the model is prepared already", where=options.model, mend="Name the original model")
        opened = open_model(source, setting=setting, device=options.device, dtype=options.dtype)
        assert opened.content is not None, "it has a codec"
    is_new = False

    def build(directory: Path) -> None:
        nonlocal is_new
        is_new = True
        _write(directory, opened, progress)

    if options.out is None:
        directory = cached_directory(CACHE, cache_name(source, setting, opened.content), build)
    else:
        directory = options.out
        if not _holds(directory, opened):
            build_whole(directory, build)
    return Prepared(directory, read_manifest(directory), is_new)


def _holds(directory: Path, opened: OpenModel) -> bool:
    """Whether the very model is there. Raises `ConfigError` for a directory that holds anything else."""
    if is_prepared(directory) and read_manifest(directory).content == opened.content:
        return True
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError("something else is there", where=f"--out {directory}", mend="Name a new directory")
    return False


def _write(directory: Path, opened: OpenModel, progress: Progress) -> None:
    anatomy, source = opened.anatomy, opened.source
    layouts = [SlabLayout(anatomy.layer_specs(layer), opened.codec) for layer in range(anatomy.num_layers)]
    num_bytes = sum(layout.num_bytes for layout in layouts) + anatomy.resident_bytes(None)
    if num_bytes > (num_free := shutil.disk_usage(directory).free):
        raise CapacityError(
            f"a prepared model of {format_size(num_bytes)} does not fit: {format_size(num_free)} are free",
            where=str(directory.parent),
            mend="Make room there, or name another place with --out",
        )
    with progress.activity(f"{opened.setting.weights}: packing layers") as update:
        files = write_model(
            directory,
            opened.checkpoint,
            layouts,
            layers_name=anatomy.layers_name,
            device=opened.device,
            on_layer=lambda layer: update(layer + 1, len(layouts)),
        )
    for path in _small_files(source):
        shutil.copyfile(path, directory / path.name)
        files[path.name] = facts_of(directory / path.name)
    assert opened.content is not None, "it has a codec"
    Manifest(
        model=source.ref,
        name=source.name,
        note=source.note,
        is_dummy=source.is_dummy,
        setting=opened.setting.weights,
        dtype=str(anatomy.dtype).removeprefix("torch."),
        content=opened.content,
        files=files,
    ).save(directory)


def _small_files(source: ModelSource) -> Iterator[Path]:
    """Configuration and tokenizer."""
    for path in sorted(source.directory.iterdir()):
        if path.is_file() and _matches(path, _COPIED) and not _matches(path, _NOT_COPIED):
            yield path


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)
