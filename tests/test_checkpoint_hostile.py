"""Weights from strangers: every lie in a header, an index or a manifest is refused in one line, with little memory.

HOSTILE_EXAMPLES=1000 looks longer than CI does.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_mutations import ODD, damaged, mutations
from test_conversion import WriteGguf, write_gguf  # noqa: F401
from tiny_directory import write_tiny_model
from tiny_models import tiny_config

from flexeval.backends.loading import open_model
from flexeval.checkpoints import check_weights, read_config
from flexeval.conversion import read_header
from flexeval.engine.checkpoint import SafetensorsCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.errors import FlexevalError, ModelError
from flexeval.files import read_json, write_json
from flexeval.models import resolve
from flexeval.preparation import PrepareOptions, prepare
from flexeval.prepared import facts_of, read_manifest
from flexeval.progress import LineProgress
from flexeval.tokenizer import encode, open_tokenizer

EXAMPLES = settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "25")),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
SOME_KEYS = (
    "rope_scaling",
    "auto_map",
    "layer_types",
    "text_config",
    "dtype",
    "sliding_window",
    "head_dim",
    "id2label",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy(tiny_config("llama", vocab_size=640, max_position_embeddings=2048), torch.float32)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def read_all(directory: Path, anatomy: Anatomy) -> None:
    """Everything that loading a model reads of its weights."""
    check_weights(directory, read_config(directory))
    checkpoint = SafetensorsCheckpoint(anatomy, directory)
    for name, tensor in checkpoint.rest().items():
        assert tensor.dtype == torch.float32, name
    for layer in range(anatomy.num_layers):
        found = checkpoint.layer(layer)
        for spec in anatomy.layer_specs(layer):
            assert found[spec.name].shape == spec.shape and found[spec.name].dtype == torch.float32, spec.name


def refused(work: Callable[[], object], where: Path | None = None) -> bool:
    """Whether something was refused; then in one line, which names its place."""
    try:
        work()
    except FlexevalError as error:
        line = str(error)
        assert (where is None or str(where) in line) and line.isprintable() and len(line) < 3000, line
        return True
    return False


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (num_bytes,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + num_bytes]), data[8 + num_bytes :]


def write_header(path: Path, header: Any, numbers: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry | {"data_offsets": [-8, 0]},
        lambda entry: entry | {"data_offsets": [entry["data_offsets"][1], entry["data_offsets"][0]]},
        lambda entry: entry | {"data_offsets": [0, 2**63]},
        lambda entry: entry | {"data_offsets": [0, 4096]},
        lambda entry: entry | {"data_offsets": [entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]},
        lambda entry: entry | {"shape": [2**40, 2**40]},
        lambda entry: entry | {"shape": [-1, 64]},
        lambda entry: entry | {"shape": [64, 128]},
        lambda entry: entry | {"shape": []},
        lambda entry: entry | {"dtype": "I32"},
        lambda entry: entry | {"dtype": "F128"},
        lambda entry: entry | {"dtype": "F8_E4M3", "shape": [128, 256]},
        lambda entry: entry | {"dtype": "U32"},
        lambda entry: None,
    ],
)
def test_headers_that_lie_about_a_tensor_are_refused(
    change: Callable[[dict[str, Any]], Any], copy: Path, anatomy: Anatomy
) -> None:
    header, numbers = header_of(copy / WEIGHTS)
    write_header(copy / WEIGHTS, header | {NAME: change(header[NAME])}, numbers)
    assert refused(lambda: read_all(copy, anatomy), copy)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 0),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 2) + b"{}",
    ],
)
def test_headers_that_are_none_are_refused(data: bytes, copy: Path, anatomy: Anatomy) -> None:
    (copy / WEIGHTS).write_bytes(data)
    assert refused(lambda: read_all(copy, anatomy), copy)


@pytest.mark.parametrize("name", ["model.layers.x.y", "model.layers.-1.z", "model.layers.", f"model.layers.{9**99}.q"])
def test_strange_names_of_tensors_are_passed_over(name: str, copy: Path, anatomy: Anatomy) -> None:
    header, numbers = header_of(copy / WEIGHTS)
    end = len(numbers)
    write_header(copy / WEIGHTS, header | {name: {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}}, numbers)
    read_all(copy, anatomy)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "x" * 300, None, 3, ["x"], {}],
)
def test_an_index_names_files_beside_it(shard: Any, copy: Path, anatomy: Anatomy) -> None:
    shutil.copy(copy / WEIGHTS, copy.parent / "outside.safetensors")
    header, _ = header_of(copy / WEIGHTS)
    names = [name for name in header if name != "__metadata__"]
    write_json(copy / INDEX, {"weight_map": dict.fromkeys(names, WEIGHTS) | {NAME: shard}})
    for work in (lambda: check_weights(copy, read_config(copy)), lambda: SafetensorsCheckpoint(anatomy, copy)):
        assert refused(work, copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\0", "NaN"]
)
def test_an_index_that_is_none_is_refused(text: str, copy: Path, anatomy: Anatomy) -> None:
    (copy / INDEX).write_text(text)
    for work in (lambda: check_weights(copy, read_config(copy)), lambda: SafetensorsCheckpoint(anatomy, copy)):
        assert refused(work, copy)


def test_an_index_that_looks_in_the_wrong_file_is_refused(copy: Path, anatomy: Anatomy) -> None:
    write_json(copy / INDEX, {"weight_map": {NAME: WEIGHTS, "model.layers.0.mlp.nothing": WEIGHTS}})
    with pytest.raises(ModelError, match=r"looks for model\.layers\.0\.mlp\.nothing in model\.safetensors"):
        SafetensorsCheckpoint(anatomy, copy)


@EXAMPLES
@given(data=st.data())
def test_odd_headers_are_refused_or_serve(data: st.DataObject, model: Path, copy: Path, anatomy: Anatomy) -> None:
    header, numbers = header_of(model / WEIGHTS)
    few = {name: header[name] for name in list(header)[:3]}
    write_header(copy / WEIGHTS, header | data.draw(mutations(few).filter(lambda odd: isinstance(odd, dict))), numbers)
    refused(lambda: read_all(copy, anatomy), copy)


@EXAMPLES
@given(data=st.data())
def test_damaged_headers_are_refused_or_serve(data: st.DataObject, model: Path, copy: Path, anatomy: Anatomy) -> None:
    _, numbers = header_of(model / WEIGHTS)
    start = (model / WEIGHTS).read_bytes()[: -len(numbers)]
    (copy / WEIGHTS).write_bytes(data.draw(damaged(start)) + numbers)
    refused(lambda: read_all(copy, anatomy), copy)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '{"model_type": 3}', "\0"])
def test_a_configuration_that_is_none_is_refused(text: str, copy: Path) -> None:
    (copy / "config.json").write_text(text)
    assert refused(lambda: resolve(str(copy)), copy)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**9}, {"quantization_config": [1]}, {"pad_token_id": 2**31, "eos_token_id": 1}]
)
def test_a_configuration_of_absurd_values_is_refused(changes: dict[str, Any], copy: Path) -> None:
    write_json(copy / "config.json", read_config(copy) | changes)
    assert refused(lambda: open_model(str(copy), setting="none", device="cpu", dtype="float32"))


@EXAMPLES
@given(data=st.data())
def test_odd_configurations_are_refused_or_serve(data: st.DataObject, model: Path, copy: Path) -> None:
    config = read_config(model)
    extra = st.dictionaries(st.sampled_from(SOME_KEYS), st.sampled_from(ODD), max_size=2)
    write_json(copy / "config.json", data.draw(mutations(config | data.draw(extra))))
    refused(lambda: open_model(str(copy), setting="none", device="cpu", dtype="float32"))


@pytest.mark.parametrize("value", [1.5, "1", [1, "2"], {"x": 1}, True])
def test_tokens_that_end_a_text_and_are_none_are_refused(value: Any, copy: Path) -> None:
    write_json(copy / "generation_config.json", {"eos_token_id": value})
    assert refused(lambda: open_model(str(copy), setting="none", device="cpu", dtype="float32"), copy)


@pytest.mark.parametrize("length", ["x", [1], {"x": 1}])
def test_a_tokenizer_of_odd_lengths_is_refused(length: Any, copy: Path) -> None:
    write_json(copy / "tokenizer_config.json", read_json(copy / "tokenizer_config.json") | {"model_max_length": length})
    assert refused(lambda: open_tokenizer(copy), copy)


@EXAMPLES
@given(data=st.data())
def test_odd_tokenizers_are_refused_or_serve(data: st.DataObject, model: Path, copy: Path) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    found = read_json(model / name)
    few = {"added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"}
    whole = {key: value for key, value in found.items() if key not in few and name == "tokenizer.json"}
    rest = {key: value for key, value in found.items() if key not in whole}
    odd = data.draw(mutations(rest).filter(lambda value: isinstance(value, dict)))
    write_json(copy / name, whole | odd)
    refused(lambda: encode(open_tokenizer(copy), "what is 12 and why?", where=str(copy)), copy)


@pytest.fixture(scope="module")
def prepared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "tiny-w4"
    options = PrepareOptions(model=str(model), setting="w4-g32", out=out, device="cpu", dtype="float32")
    return prepare(options, LineProgress(lambda text: None)).directory


def read_prepared(directory: Path) -> None:
    """Everything that loading a prepared model reads."""
    manifest = read_manifest(directory)
    opened = open_model(str(directory), setting="w4-g32", device="cpu", dtype="auto")
    opened.checkpoint.rest()
    for layer in range(opened.anatomy.num_layers):
        packed = opened.checkpoint.packed(layer)
        assert packed is not None
        packed.read(torch.empty(manifest.files[f"layer-{layer:04d}.bin"].num_bytes, dtype=torch.uint8))


def test_what_is_not_changed_is_read(model: Path, anatomy: Anatomy, prepared: Path) -> None:
    read_all(model, anatomy)
    read_prepared(prepared)


def without(files: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: facts for key, facts in files.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: {"name": "../../evil"},
        lambda data: {"name": ""},
        lambda data: {"name": 3},
        lambda data: {"dtype": "complex64"},
        lambda data: {"files": data["files"] | {"../../etc/passwd": data["files"]["config.json"]}},
        lambda data: {"files": data["files"] | {"/etc/passwd": data["files"]["config.json"]}},
        lambda data: {"files": data["files"] | {"prepared.json": data["files"]["config.json"]}},
        lambda data: {"files": data["files"] | {"config.json": {"num_bytes": -1, "sha256": "0" * 64}}},
        lambda data: {"files": data["files"] | {"config.json": {"num_bytes": 1.5, "sha256": "0" * 64}}},
        lambda data: {"files": data["files"] | {"config.json": data["files"]["config.json"] | {"sha256": 3}}},
        lambda data: {"files": without(data["files"], "layer-0001.bin")},
        lambda data: {"files": without(data["files"], "rest.safetensors")},
        lambda data: {"content": data["content"] | {"codec": 3}},
        lambda data: {"content": [data["content"]]},
        lambda data: {"format": "1" * 5000},
        lambda data: {"unknown": 1},
    ],
)
def test_manifests_that_lie_are_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], prepared: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(prepared, tmp_path / "prepared"))
    data = json.loads((directory / "prepared.json").read_text())
    write_json(directory / "prepared.json", data | change(data))
    assert refused(lambda: read_prepared(directory), directory)


def test_a_layer_of_another_length_is_refused_though_the_manifest_says_so(prepared: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(prepared, tmp_path / "prepared"))
    layer = directory / "layer-0002.bin"
    layer.write_bytes(layer.read_bytes()[:-4096])
    sign(directory)
    with pytest.raises(ModelError, match="layer 2 takes"):
        read_prepared(directory)


def sign(directory: Path) -> None:
    """Have the manifest say what lies in the directory."""
    data = json.loads((directory / "prepared.json").read_text())
    facts = {name: facts_of(directory / name) for name in data["files"]}
    data["files"] = {name: {"num_bytes": one.num_bytes, "sha256": one.sha256} for name, one in facts.items()}
    write_json(directory / "prepared.json", data)


@EXAMPLES
@given(data=st.data())
def test_odd_tensors_of_a_prepared_model_are_refused(data: st.DataObject, prepared: Path, tmp_path: Path) -> None:
    directory = tmp_path / "prepared"
    shutil.copytree(prepared, directory, dirs_exist_ok=True)
    header, numbers = header_of(prepared / "rest.safetensors")
    header["__metadata__"]["tied"] = json.dumps(
        data.draw(mutations({"lm_head.weight": "model.embed_tokens.weight", "a": "b"}))
    )
    if data.draw(st.booleans()):
        header = data.draw(mutations(header))
    write_header(directory / "rest.safetensors", header, numbers)
    sign(directory)
    refused(lambda: read_prepared(directory), directory)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test must not take 200 MiB of Python's memory, numpy's included."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 2**20


def gguf(*values: bytes, num_values: int | None = None, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    count = len(values) if num_values is None else num_values
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(values) + tensors


def array(kind: int, num: int, data: bytes = b"") -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, num) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"FUGG" * 10,
        gguf(num_values=2**63),
        gguf(num_tensors=2**63),
        gguf(array(0, 2**60)),
        gguf(array(8, 2**60)),
        gguf(array(9, 2**20, b"\x09\0\0\0" * 100)),
        gguf(array(77, 1)),
        gguf(array(0, 2**23, b"\0" * 2**23)),
        gguf(struct.pack("<Q", 2**64 - 1) + b"a"),
        gguf(num_tensors=1, tensors=struct.pack("<QBIQQIQ", 1, 97, 2, 2**40, 2**40, 0, 0)),
        gguf(num_tensors=1, tensors=struct.pack("<QBI", 1, 97, 2**31)),
        gguf(num_tensors=1, tensors=struct.pack("<QBIQIQ", 1, 97, 1, 2**30, 0, 0)),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_gguf_headers_that_lie_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert refused(lambda: read_header(path), path)


@EXAMPLES
@given(data=st.data())
def test_damaged_gguf_headers_are_refused_or_read(data: st.DataObject, write_gguf: WriteGguf, tmp_path: Path) -> None:  # noqa: F811
    whole = tmp_path / "Tiny Llama.gguf"
    if not whole.is_file():
        write_gguf()
    start = whole.read_bytes()[:12_000]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data.draw(damaged(start)) + whole.read_bytes()[len(start) :])
    refused(lambda: read_header(path), path)
