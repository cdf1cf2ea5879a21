"""Whether a directory holds a model that can be read. Reads JSON and the headers of weight files; loads no weight."""

from __future__ import annotations

from pathlib import Path

from flexeval.errors import ModelError
from flexeval.files import read_json
from flexeval.presets import Config

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(directory: Path) -> Config:
    """Read a directory's `config.json`. Raises `ModelError` if it is missing or not a model's."""
    path = directory / "config.json"
    if not path.is_file():
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        mend = f"Name the file itself, such as {directory / ggufs[0]}" if ggufs else "Name a Hugging Face directory"
        raise ModelError("no config.json here", where=str(directory), mend=mend)
    try:
        config = read_json(path)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", where=str(path), mend="Fetch the file again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            "config.json names no model_type", where=str(path), mend="Name a Hugging Face model's directory"
        )
    return config


def check_weights(directory: Path, config: Config) -> None:
    """Check that the weights are whole safetensors files of plain numbers. Raises `ModelError`."""
    if quantization := config.get("quantization_config"):
        raise ModelError(
            f"weights quantized by {quantization.get('quant_method', 'an unnamed method')} cannot be read",
            where=str(directory),
            mend="Use the model's 16-bit weights (--setting w4 compresses them), or a GGUF file",
        )
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_weights(directory)
    for shard in _indexed_files(directory):
        if not (directory / shard).is_file():
            raise ModelError(f"{shard} is missing", where=str(directory), mend="Fetch the model again")
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


def _indexed_files(directory: Path) -> list[str]:
    path = directory / "model.safetensors.index.json"
    if not path.is_file():
        return []
    try:
        return sorted(set(read_json(path)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"not an index of weights: {error!r}", where=str(path), mend="Fetch it again") from error


def _check_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"truncated or corrupt: {error}", where=str(file), mend="Fetch the file again") from error
