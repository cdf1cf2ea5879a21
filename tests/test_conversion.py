"""GGUF files, made on the spot: what is converted, and what is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from flexeval.errors import CapacityError, ModelError
from flexeval.models import resolve

HIDDEN, HEADS, KV_HEADS, LAYERS, INTERMEDIATE = 64, 4, 2, 2, 96
WriteGguf = Callable[..., Path]


def byte_alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def tensors(rng: np.random.Generator, vocab_size: int) -> dict[str, np.ndarray]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 0.1, (rows, columns)).astype(np.float32)

    found = {"token_embd.weight": matrix(vocab_size, HIDDEN), "output_norm.weight": np.ones(HIDDEN, np.float32)}
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": np.ones(HIDDEN, np.float32),
            f"blk.{layer}.ffn_norm.weight": np.ones(HIDDEN, np.float32),
            f"blk.{layer}.attn_q.weight": matrix(HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": matrix(HIDDEN // HEADS * KV_HEADS, HIDDEN),
            f"blk.{layer}.attn_v.weight": matrix(HIDDEN // HEADS * KV_HEADS, HIDDEN),
            f"blk.{layer}.attn_output.weight": matrix(HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": matrix(INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": matrix(INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    return found


@pytest.fixture
def write_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteGguf:
    """Writes a tiny Llama as GGUF; the cache is empty."""
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
    tokens = ["<|end|>", *byte_alphabet(), "Ġ1", "er"]

    def write(
        *,
        kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
        architecture: str = "llama",
        split: str | None = "gpt-2",
        num_files: int = 1,
        change: Callable[[dict[str, np.ndarray]], object] = lambda weights: None,
    ) -> Path:
        path = tmp_path / "Tiny Llama.gguf"
        writer = GGUFWriter(path, architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INTERMEDIATE)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("gpt2")
        if split is not None:
            writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens)
        writer.add_token_types([3] + [1] * (len(tokens) - 1))
        writer.add_token_merges(["Ġ 1", "e r"])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
        if num_files > 1:
            writer.add_uint16("split.count", num_files)
        weights = tensors(np.random.default_rng(0), len(tokens))
        change(weights)
        for name, weight in weights.items():
            if weight.ndim == 2:
                writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def cached_files(gguf: Path) -> list[Path]:
    return [path for path in (gguf.parent / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1])
def test_weights_are_the_dequantized_ones(write_gguf: WriteGguf, kind: GGMLQuantizationType) -> None:
    from safetensors.numpy import load_file

    source = resolve(str(write_gguf(kind=kind)))
    assert (source.name, source.note) == ("tiny-llama", f"dequantized from {kind.name}")
    found = load_file(source.directory / "model.safetensors")
    stored = tensors(np.random.default_rng(0), 259)
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }.items():
        expected = quants.dequantize(quants.quantize(stored[f"{theirs}.weight"], kind), kind)
        np.testing.assert_array_equal(found[f"{ours}.weight"], expected.astype(np.float16))


def test_a_conversion_happens_once_per_content(write_gguf: WriteGguf) -> None:
    path = write_gguf()
    first = resolve(str(path))
    moved = path.rename(path.with_name("tiny-llama.gguf"))
    assert resolve(str(moved)).directory == first.directory
    assert resolve(str(write_gguf(kind=GGMLQuantizationType.F16))).directory != first.directory


@pytest.mark.parametrize(("split", "pieces"), [("gpt-2", ["Ġ1", "2"]), ("smollm", ["Ġ", "1", "2"])])
def test_text_is_split_as_the_file_says(write_gguf: WriteGguf, split: str, pieces: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(str(write_gguf(split=split))).tokenizer_dir)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 12").input_ids) == pieces


def test_an_unnamed_split_is_noted(write_gguf: WriteGguf) -> None:
    assert "GPT-2's is used" in resolve(str(write_gguf(split=None))).note


@pytest.mark.parametrize("size", [0, 100, 3000, -5000, -1])
def test_truncated_files_leave_nothing(write_gguf: WriteGguf, size: int) -> None:
    path = write_gguf()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        resolve(str(path))
    assert cached_files(path) == []


def test_a_file_that_is_cut_short_while_it_is_converted_kills_nobody(
    write_gguf: WriteGguf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers map what they read, so it is a copy that they are given."""
    from flexeval import conversion

    path = write_gguf()
    monkeypatch.setattr(conversion, "_convert_weights", cutting(conversion._convert_weights, path))
    resolve(str(path))
    whole = write_gguf(kind=GGMLQuantizationType.F16)
    monkeypatch.setattr(conversion, "_copy", cutting(conversion._copy, whole))
    with pytest.raises(ModelError, match=r"changed while it was read.*Tiny Llama.gguf"):
        resolve(str(whole))


def cutting(real: Callable[..., None], path: Path) -> Callable[..., None]:
    """Cut a file short before something is done."""

    def call(*args: object) -> None:
        os.truncate(path, 4096)
        real(*args)

    return call


def nan(weights: dict[str, np.ndarray]) -> None:
    weights["output_norm.weight"][3] = np.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "klingon"}, "splits text in an unknown way, 'klingon'"),
        ({"architecture": "clip"}, "transformers cannot read"),
        ({"num_files": 3}, "one of 3 files.*--merge"),
        ({"change": nan}, "not fp16 numbers"),
        ({"change": lambda weights: weights.pop("blk.1.ffn_up.weight")}, "up_proj"),
    ],
)
def test_what_would_run_wrong_is_refused(write_gguf: WriteGguf, options: dict[str, object], message: str) -> None:
    path = write_gguf(**options)
    with pytest.raises(ModelError, match=message):
        resolve(str(path))
    assert cached_files(path) == []


def test_weights_that_do_not_fit_in_memory(write_gguf: WriteGguf, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(CapacityError, match="1000 B are free"):
        resolve(str(write_gguf()))
