"""Opening a model's weights: as its checkpoint holds them, or packed where they have been prepared.

Knows what goes together; neither how weights are packed nor where they will rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flexeval.cache import cache_root
from flexeval.config import Setting
from flexeval.engine.checkpoint import Checkpoint, SafetensorsCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.codecs.hqq import HqqCodec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.memory.prepared import content_of
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.packed import PackedCheckpoint
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.errors import ModelError
from flexeval.models import ModelSource
from flexeval.prepared import CACHE, REST, Content, Manifest, check_content, is_prepared, layer_file, read_manifest


class Weights(NamedTuple):
    """A model's weights under a setting."""

    checkpoint: Checkpoint
    """Where they come from."""
    content: Content | None
    """What its layers are once they are packed; None where no codec packs them."""


def codec_of(setting: Setting) -> Codec | None:
    """What a setting does to matrices; None leaves them as they are."""
    if setting.weight_bits is None:
        return None
    return (HqqCodec if setting.is_refined else IntegerCodec)(setting.weight_bits, setting.group_size)


def dtype_of(source: ModelSource, setting: Setting, dtype: str) -> str:
    """The type of the arithmetic, which is a prepared model's own where `dtype` is `auto`.

    Raises `ModelError` for a prepared model of another setting or type.
    """
    if not source.is_prepared:
        return dtype
    manifest = read_manifest(source.directory)
    if setting.weights != manifest.setting:
        wanted = "weights as they are" if setting.weight_bits is None else setting.weights
        raise ModelError(
            f"the model was prepared with {manifest.setting}, setting {setting.name!r} wants {wanted}",
            where=str(source.directory),
            mend=f"Choose --setting {manifest.setting}, or name the original model ({manifest.model})",
        )
    if dtype not in ("auto", manifest.dtype):
        raise ModelError(
            f"the model was prepared to be computed in {manifest.dtype}, not in {dtype}",
            where=str(source.directory),
            mend=f"Leave out --dtype, or prepare the model again with --dtype {dtype}",
        )
    return manifest.dtype


def open_weights(source: ModelSource, anatomy: Anatomy, setting: Setting) -> Weights:
    """Find a model's weights: those that were prepared, in its own directory or in the cache, before its original ones.

    Raises `ModelError` for weights that cannot be read.
    """
    codec = codec_of(setting)
    layouts = [SlabLayout(anatomy.layer_specs(layer), codec) for layer in range(anatomy.num_layers)]
    if source.is_prepared:
        manifest = read_manifest(source.directory)
        content = content_of(manifest.content.weights, layouts)
        return Weights(_open_prepared(anatomy, layouts, source.directory, manifest, content), content)
    original = RandomCheckpoint(anatomy) if source.is_dummy else SafetensorsCheckpoint(anatomy, source.directory)
    if codec is None or original.identity is None:
        return Weights(original, None)
    content = content_of(original.identity, layouts)
    directory = cache_root() / CACHE / cache_name(source, setting, content)
    if not is_prepared(directory):
        return Weights(original, content)
    return Weights(_open_prepared(anatomy, layouts, directory, read_manifest(directory), content), content)


def cache_name(source: ModelSource, setting: Setting, content: Content) -> str:
    """What a prepared model is called in the cache."""
    return f"{source.name}-{setting.weights}-{content.name}"


def _open_prepared(
    anatomy: Anatomy, layouts: Sequence[SlabLayout], directory: Path, manifest: Manifest, content: Content
) -> PackedCheckpoint:
    """Layers are checked when they are read; the rest of the directory is small, and is checked now."""
    num_layers = sum(layer_file(layer) in manifest.files for layer in range(len(manifest.files)))
    if manifest.content != content:
        what = f"its {num_layers} layers are laid out in another way than this flexeval and transformers want them"
        raise _not_whole(what, directory)
    for layer, layout in enumerate(layouts):
        found = manifest.files.get(layer_file(layer))
        if found is None or found.num_bytes != layout.num_bytes:
            says = f"{found.num_bytes} bytes" if found else "nothing"
            raise _not_whole(f"layer {layer} takes {layout.num_bytes} bytes, the manifest says {says}", directory)
    if REST not in manifest.files:
        raise _not_whole(f"the manifest does not name {REST}", directory)
    large = {REST, *(layer_file(layer) for layer in range(num_layers))}
    for name in manifest.files.keys() - large:
        check_content(directory / name, manifest.files[name])
    return PackedCheckpoint(anatomy, directory, manifest)


def _not_whole(what: str, directory: Path) -> ModelError:
    return ModelError(what, where=str(directory), mend="Prepare the model again with flexeval prepare-model")
