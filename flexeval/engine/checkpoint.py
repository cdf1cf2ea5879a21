"""Where weights come from, one layer at a time. Knows checkpoint files and names; not where the weights will rest.

A whole model never has to fit in memory: tensors are read, renamed and merged layer by layer, by transformers' own
conversion of checkpoints (fused experts and the like), and handed over as the layer's state dict.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from flexeval.checkpoints import INDEX_FILE, read_index
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.packed import PackedLayer
from flexeval.engine.weight_file import FileTensor
from flexeval.errors import ModelError
from flexeval.safetensors_header import Header, TensorPlace, read_header

SINGLE_FILE = "model.safetensors"
_SAMPLE_BYTES = 2**20
_NUMBERS = ("F64", "F32", "F16", "BF16")
_INDEX = re.compile(r"[0-9]{1,6}")


class Checkpoint(Protocol):
    """A source of weights for one anatomy."""

    identity: str | None
    """Changes whenever a weight may have; None where the weights cannot be told from others."""

    def layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer by their names within it, on the host, the caller's to use up. Raises `ModelError`."""
        ...

    def rest(self) -> Mapping[str, Tensor]:
        """Embedding, norms and head by their full names, on the host. Raises `ModelError`."""
        ...

    def packed(self, layer: int) -> PackedLayer | None:
        """The layer's slab, packed before; None where it is to be made of `layer`'s tensors."""
        return None


class StateDictCheckpoint(Checkpoint):
    """The weights of a model that is already in memory."""

    identity = None

    def __init__(self, anatomy: Anatomy, state_dict: Mapping[str, Tensor]):
        self._layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self._rest: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            layer, local = _locate(name, anatomy.layers_name)
            if layer is None:
                self._rest[name] = tensor
            else:
                self._layers[layer][local] = tensor

    def layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer."""
        return dict(self._layers[layer])

    def rest(self) -> Mapping[str, Tensor]:
        """Everything else."""
        return self._rest


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face directory with safetensors files."""

    def __init__(self, anatomy: Anatomy, directory: Path):
        """Read the headers and assign each tensor to its layer. Raises `ModelError`."""
        self._anatomy = anatomy
        self._directory = directory
        self._tensors = _find_tensors(directory)
        self.identity = _identify(anatomy, {path for path, _ in self._tensors.values()})
        self._keys: dict[int | None, list[str]] = defaultdict(list)
        self._weights: set[str] = set()
        with _with_layers(anatomy) as whole:
            self._mapping = get_model_conversion_mapping(whole)
            names = whole.state_dict(keep_vars=True)
            renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
            converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
            for key in self._tensors:
                name, _ = rename_source_key(key, renamings, converters, whole.base_model_prefix, names)
                self._keys[_locate(name, anatomy.layers_name)[0]].append(key)
                if (wanted := names.get(name)) is not None and wanted.is_floating_point():
                    self._weights.add(key)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Read one layer. Raises `ModelError` for a tensor that is missing or cannot be read."""
        prefix = f"{self._anatomy.layers_name}.{layer}."
        wanted = {prefix + spec.name for spec in self._anatomy.layer_specs(layer)}
        tensors = self._read(self._keys[layer], wanted, what=f"layer {layer}")
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def rest(self) -> Mapping[str, Tensor]:
        """Read embedding, norms and head. Raises `ModelError`."""
        wanted = set(self._anatomy.model.state_dict(keep_vars=True))
        return self._read(self._keys[None], wanted, what="embedding, norms and head", tie=True)

    def _read(self, keys: Sequence[str], wanted: set[str], *, what: str, tie: bool = False) -> dict[str, Tensor]:
        slices = {key: FileTensor(*self._tensors[key]) for key in keys}
        try:
            return self._load(slices, wanted, tie=tie)
        except ModelError as error:
            if problem := next((one.problem for one in slices.values() if one.problem), None):
                mend = "Check the disk, or fetch the file again; then run again to go on"
                raise ModelError(f"{what}: {problem}", where=str(self._directory), mend=mend) from error
            raise

    def _load(self, slices: dict[str, FileTensor], wanted: set[str], *, tie: bool) -> dict[str, Tensor]:
        with _with_layers(self._anatomy) as model, _quiet():
            meta = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
            config = LoadStateDictConfig(
                device_map={"": "cpu"},
                dtype=self._anatomy.dtype,
                weight_mapping=list(self._mapping),  # type: ignore[arg-type]
            )
            try:
                self._check_types(slices)
                info, _ = convert_and_load_state_dict_in_model(model, slices, config, None)
                if tie:
                    model.tie_weights(missing_keys=info.missing_keys)
                loaded = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in wanted}
            except Exception as error:  # tensors of strange types and shapes raise whatever they lead to
                raise ModelError(
                    f"the weights cannot be read: {error}", where=str(self._directory), mend="Fetch the model again"
                ) from error
            finally:
                _restore(model, meta)
        problems = [
            f"{name} is {list(found)}, the configuration asks for {list(asked)}"
            for name, found, asked in sorted(info.mismatched_keys)
        ] + list(info.conversion_errors)
        missing = sorted(name for name in wanted if name not in loaded or loaded[name].is_meta)
        if missing or problems:
            what = f"the weights do not fit: {problems[0]}" if problems else f"no weights for {missing[0]}"
            raise ModelError(what, where=str(self._directory), mend="Fetch the model again, or check its config.json")
        return {name: tensor.detach() for name, tensor in loaded.items()}

    def _check_types(self, slices: Mapping[str, FileTensor]) -> None:
        """Raise `ValueError` for weights that are codes: converted to numbers without their scales, they were wrong."""
        for key in self._weights & slices.keys():
            if (found := slices[key].get_dtype()) not in _NUMBERS:
                raise ValueError(f"{key} is of type {found}, not one of {', '.join(_NUMBERS)}")


def _identify(anatomy: Anatomy, paths: set[Path]) -> str:
    """A hash of what the weights depend on: files by name, length, time and beginning; configuration and converter.

    Files of hundreds of gigabytes are not read whole; one that was written anew has another time.
    """
    config = {key: value for key, value in anatomy.config.to_dict().items() if key != "_name_or_path"}
    facts = [transformers_version, type(anatomy.model).__name__, json.dumps(config, sort_keys=True, default=str)]
    digest = hashlib.sha256("\n".join(facts).encode())
    for path in sorted(paths):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _find_tensors(directory: Path) -> dict[str, tuple[Path, TensorPlace]]:
    """The file of each tensor, and its place there. Raises `ModelError`."""
    try:
        if (directory / INDEX_FILE).is_file():
            shards = read_index(directory / INDEX_FILE)
            held = {name: _read_header(directory / name).tensors for name in sorted(set(shards.values()))}
            if lost := [key for key, name in shards.items() if key not in held[name]]:
                raise ValueError(f"it looks for {lost[0]} in {shards[lost[0]]}, where that is not")
            return {key: (directory / name, held[name][key]) for key, name in shards.items()}
        path = directory / SINGLE_FILE
        if not path.is_file():
            raise ModelError("no safetensors weights here", where=str(directory), mend="Convert them to safetensors")
        return {key: (path, place) for key, place in _read_header(path).tensors.items()}
    except ValueError as error:
        what = f"the index of the weights cannot be read: {error}"
        raise ModelError(what, where=str(directory / INDEX_FILE), mend="Fetch the model again") from error


def _read_header(path: Path) -> Header:
    """What a file holds, which must fit its length. Raises `ModelError`."""
    try:
        return read_header(path)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"the weight file is corrupt or cut short: {error}", where=str(path), mend="Fetch the file again"
        ) from error


@contextmanager
def _with_layers(anatomy: Anatomy) -> Iterator[Any]:
    """The whole model for a moment, its layers back in place of the stubs."""
    parent, _, leaf = anatomy.layers_name.rpartition(".")
    owner = anatomy.model.get_submodule(parent)
    stubs = getattr(owner, leaf)
    setattr(owner, leaf, torch.nn.ModuleList(anatomy.layers))
    try:
        yield anatomy.model
    finally:
        setattr(owner, leaf, stubs)


def _restore(model: torch.nn.Module, meta: Mapping[str, Tensor]) -> None:
    """Put the tensors back that were there before loading."""
    for name, tensor in meta.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar: the caller shows one for the whole model."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def _locate(name: str, layers_name: str) -> tuple[int | None, str]:
    """(layer, name within it), or (None, name) for what belongs to no layer."""
    if not name.startswith(layers_name + "."):
        return None, name
    index, _, local = name[len(layers_name) + 1 :].partition(".")
    return (int(index), local) if _INDEX.fullmatch(index) else (None, name)
