"""Every kind of REF, and every way to get it wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexeval import models
from flexeval.errors import DataError, ModelError
from flexeval.models import ModelSource, fingerprint, resolve

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face directory with one small weight file."""
    directory = tmp_path / "My Model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA))
    save_file({"weight": torch.ones(64)}, directory / "model.safetensors")
    return directory


def test_a_directory_is_taken_as_it_is(directory: Path) -> None:
    source = resolve(str(directory))
    assert source == ModelSource(ref=str(directory), name="my-model", directory=directory, is_dummy=False, note="")
    assert source.tokenizer_dir == directory


def test_the_fingerprint_follows_the_files(directory: Path) -> None:
    import os

    source = resolve(str(directory))
    seen = [fingerprint(source)]
    assert fingerprint(source) == seen[0]
    os.utime(directory / "config.json", ns=(0, 0))
    assert fingerprint(source) == seen[0]
    (directory / "config.json").write_text(json.dumps(TINY_LLAMA | {"rms_norm_eps": 0.5}))
    seen.append(fingerprint(source))
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    seen.append(fingerprint(source))
    (directory / "tokenizer.json").write_text("{}")
    seen.append(fingerprint(source))
    assert len(set(seen)) == 4


def test_the_fingerprint_sees_another_matrix_in_the_middle(directory: Path) -> None:
    """As a model has that was trained on, and that a run must not be resumed with."""
    source, seen = resolve(str(directory)), set()
    for value in (1.0, 2.0, 2.0):
        matrices = {name: torch.full((1024, 512), value if name == "b" else 0.0) for name in "abc"}
        save_file(matrices, directory / "model.safetensors")
        seen.add(fingerprint(source))
    assert len(seen) == 2


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json here"):
        resolve(str(tmp_path))


def test_a_directory_of_gguf_files_points_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"Name the file itself, such as .*some\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\udcff"])
def test_a_corrupt_config(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(str(directory))


def test_pickled_weights_are_refused_with_the_way_out(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*never loaded.*save_pretrained"):
        resolve(str(directory))


def test_truncated_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"truncated or corrupt.*model\.safetensors"):
        resolve(str(directory))


def test_a_missing_shard(directory: Path) -> None:
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve(str(directory))


@pytest.mark.parametrize("index", [[], {}, {"weight_map": ["a"]}, {"weight_map": {"a": []}}])
def test_a_corrupt_index(directory: Path, index: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not an index of weights"):
        resolve(str(directory))


def test_weights_quantized_by_others_are_refused(directory: Path) -> None:
    config = TINY_LLAMA | {"quantization_config": {"quant_method": "awq"}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized by awq"):
        resolve(str(directory))


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("smolm2", "Did you mean smollm2"),
        ("dummy:opt-30", "dummy:opt-30b"),
        ("dummy:lama-2-7b", "dummy:llama-2-7b"),
        ("opt-30b", "dummy:opt-30b"),
        ("./no/such/place", "There is smollm2"),
        ("./missing.gguf", "not a directory"),
        ("", "not a directory"),
    ],
)
def test_an_unknown_name_gets_near_matches(ref: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        resolve(ref)


def test_near_matches_among_files(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"Did you mean .*My Model"):
        resolve(str(directory.parent / "MyModel"))


def test_a_file_that_is_no_model(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"a directory or a \.gguf file"):
        resolve(str(directory / "config.json"))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("GatedRepoError", "gated.*hf auth login"),
        ("RepositoryNotFoundError", "no model 'some/model' on the hub"),
        ("LocalEntryNotFoundError", "hub cannot be reached.*local directory"),
        ("HFValidationError", "cannot download 'some/model': because"),
    ],
)
def test_hub_failures_are_told_apart(monkeypatch: pytest.MonkeyPatch, failure: str, message: str) -> None:
    import httpx
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, failure)
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
    is_http = issubclass(kind, huggingface_hub.errors.HfHubHTTPError)

    def snapshot_download(repo: str, **options: object) -> str:
        raise kind("because", response=response) if is_http else kind("because")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=message):
        resolve("some/model")


def test_a_hub_name_is_downloaded_without_pickles(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    import huggingface_hub

    def snapshot_download(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo == "Some/Model-1"
        for name, wanted in {
            "model-00001-of-00002.safetensors": True,
            "tokenizer.model": True,
            "chat_template.jinja": True,
            "pytorch_model.bin": False,
            "onnx/config.json": False,
            "consolidated.safetensors": False,
        }.items():
            allowed = any(fnmatch(name, pattern) for pattern in allow_patterns)
            assert (allowed and not any(fnmatch(name, pattern) for pattern in ignore_patterns)) == wanted, name
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = resolve("Some/Model-1")
    assert (source.name, source.directory) == ("some-model-1", directory)


def test_a_dummy_from_a_preset(smollm2: ModelSource) -> None:
    source = resolve("dummy:OPT-30b")
    config = json.loads((source.directory / "config.json").read_text())
    assert (source.name, source.is_dummy) == ("dummy-opt-30b", True)
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (7168, 48, 50272)
    assert "random weights" in source.note
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (source.tokenizer_dir / name).read_bytes() == (smollm2.tokenizer_dir / name).read_bytes()


def test_a_preset_with_a_small_vocabulary_grows_and_says_so() -> None:
    source = resolve("dummy:llama-2-7b")
    assert json.loads((source.directory / "config.json").read_text())["vocab_size"] == 49152
    assert "grew from 32000 to 49152" in source.note


def test_a_dummy_from_a_config(directory: Path) -> None:
    path = directory / "config.json"
    config = TINY_LLAMA | {"vocab_size": 49152, "quantization_config": {"quant_method": "awq"}}
    path.write_text(json.dumps(config))
    source = resolve(f"dummy:{path}")
    del config["quantization_config"]
    assert json.loads((source.directory / "config.json").read_text()) == config
    assert source.name == "dummy-my-model"
    assert resolve(f"dummy:{directory}").directory == source.directory
    other = directory / "my-moe.json"
    path.rename(other)
    named = resolve(f"dummy:{other}")
    assert named.name == "dummy-my-moe" and json.loads((named.directory / "config.json").read_text()) == config
    other.write_text("{}")
    with pytest.raises(ModelError, match=r"my-moe\.json names no model_type"):
        resolve(f"dummy:{other}")


def test_a_dummy_whose_vocabulary_is_too_small_has_no_tokenizer(directory: Path) -> None:
    source = resolve(f"dummy:{directory / 'config.json'}")
    with pytest.raises(ModelError, match=r"vocab_size 64 is smaller than the 49152 tokens.*token ids alone"):
        _ = source.tokenizer_dir


def test_a_dummy_s_tokenizer_is_fetched_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(asset: object) -> None:
        raise DataError("no network")

    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "fetch", fail)
    source = resolve("dummy:opt-30b")
    with pytest.raises(DataError, match="no network"):
        _ = source.tokenizer_dir


def test_the_demo_model_speaks(smollm2: ModelSource) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert smollm2.name == "smollm2-135m-instruct"
    assert smollm2.note == "dequantized from Q4_1"
    assert resolve("smollm2") == smollm2
    tokenizer = AutoTokenizer.from_pretrained(smollm2.tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2.directory, dtype="auto")
    assert model.dtype == torch.float16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.float().generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris"
    assert tokenizer.chat_template and model.generation_config.eos_token_id == 2
