"""Whether a directory holds a model that can be read. Reads JSON and the headers of weight files; loads no weight."""

from __future__ import annotations

from pathlib import Path

from flexeval.errors import ModelError
from flexeval.files import is_plain_name, read_json
from flexeval.presets import Config
from flexeval.safetensors_header import read_header
from flexeval.typed import show

INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(directory: Path) -> Config:
    """Read a directory's `config.json`. Raises `ModelError` if it is missing or not a model's."""
    path = directory / "config.json"
    if not path.is_file():
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        mend = f"Name the file itself, such as {directory / ggufs[0]}" if ggufs else "Name a Hugging Face directory"
        raise ModelError("no config.json here", where=str(directory), mend=mend)
    return read_config_file(path)


def read_config_file(path: Path) -> Config:
    """Read what a `config.json` holds, whatever the file's name. Raises `ModelError` if it is not a model's."""
    try:
        config = read_json(path)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{path.name} cannot be read: {error}", where=str(path), mend="Fetch the file again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{path.name} names no model_type", where=str(path), mend="Name a Hugging Face model's directory"
        )
    return config


def check_weights(directory: Path, config: Config) -> None:
    """Check that the weights are whole safetensors files of plain numbers. Raises `ModelError`."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"weights quantized by {method or 'an unnamed method'} cannot be read",
            where=str(directory),
            mend="Use the model's 16-bit weights (--setting w4 compresses them), or a GGUF file",
        )
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_weights(directory)
    if (index := directory / INDEX_FILE).is_file():
        try:
            read_index(index)
        except ValueError as error:
            raise ModelError(f"not an index of weights: {error}", where=str(index), mend="Fetch it again") from error
    for file in files:
        _check_whole(file)


def _no_weights(directory: Path) -> ModelError:
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    what = f"only pickled weights ({pickles[0]}), which are never loaded" if pickles else "no safetensors weights"
    convert = "M.from_pretrained('MODEL').save_pretrained('DIR')"
    return ModelError(
        what,
        where=str(directory),
        mend=f'If you trust them: python -c "from transformers import AutoModelForCausalLM as M; {convert}"',
    )


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, in the index's own directory.

    Raises:
        ValueError: It is no index, or names something outside.
        ModelError: A file is missing.
    """
    try:
        index = read_json(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it has no weight_map")
    for name in set(map(_plain, files.values())):
        if not (path.parent / name).is_file():
            raise ModelError(f"{name} is missing", where=str(path.parent), mend="Fetch the model again")
    return files


def _plain(name: object) -> str:
    if not isinstance(name, str) or not is_plain_name(name):
        raise ValueError(f"its weight_map names {show(name)}, which is no file beside it")
    return name


def _check_whole(file: Path) -> None:
    try:
        read_header(file)
    except (ValueError, OSError) as error:
        raise ModelError(f"truncated or corrupt: {error}", where=str(file), mend="Fetch the file again") from error
