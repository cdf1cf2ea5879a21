"""A model is prepared once: the same bytes and answers as ever, without the original; damage is found and named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_directory import write_tiny_model
from tiny_models import tiny_config, tiny_model

from flexeval.backends.native import Engine
from flexeval.backends.transformers import TransformersBackend
from flexeval.backends.weights import codec_of
from flexeval.config import Setting
from flexeval.engine.checkpoint import SafetensorsCheckpoint, StateDictCheckpoint
from flexeval.engine.codecs.codec import IntegerCodec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.memory.prepared import content_of
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.packed import PackedCheckpoint, save_rest
from flexeval.engine.preparing import write_model
from flexeval.errors import CapacityError, ConfigError, DiskError, FlexevalError, ModelError
from flexeval.models import _demo_tokenizer, resolve
from flexeval.preparation import Prepared, PrepareOptions, prepare
from flexeval.prepared import Manifest, read_manifest
from flexeval.progress import LineProgress
from flexeval.request import Completion, Request

CPU = torch.device("cpu")
SETTING = "w4-g32"
REQUESTS = [
    Request(prompt="The quick brown fox", max_tokens=6),
    Request(prompt="jumps over the lazy dog", max_tokens=0, echo=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def make_cache(folder: Path, factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, but for what is known of families."""
    families = factory.getbasetemp() / "families"
    families.mkdir(exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "families").symlink_to(families)
    monkeypatch.setenv("FLEXEVAL_CACHE", str(folder / "cache"))
    return folder / "cache"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path, tmp_path_factory, monkeypatch)


def make(model: Path | str, out: Path | None, setting: str = SETTING, dtype: str = "float32") -> Prepared:
    options = PrepareOptions(model=str(model), setting=setting, out=out, device="cpu", dtype=dtype)
    return prepare(options, LineProgress(lambda text: None))


@pytest.fixture(scope="module")
def tokenizers() -> Path:
    """Where the demo tokenizer is, made once per machine."""
    return _demo_tokenizer().parent


@pytest.fixture(scope="module")
def prepared_once(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        make_cache(folder, tmp_path_factory, patch)
        return make(model, folder / "prepared").directory


@pytest.fixture
def prepared(prepared_once: Path, tmp_path: Path) -> Path:
    """A prepared model to be damaged."""
    return Path(shutil.copytree(prepared_once, tmp_path / "prepared"))


def answers(model: Path | str, setting: str = SETTING, **options: object) -> list[Completion]:
    with Engine.load(str(model), setting=setting, device="cpu", **options) as engine:  # type: ignore[arg-type]
        return [dataclasses.replace(one, elapsed_s=0.0) for one in engine.generate(REQUESTS)]


def never(*arguments: object, **options: object) -> object:
    raise AssertionError("original weights were read")


@pytest.mark.parametrize("setting", ["w4-g32", "w8-g32", "w4-g32-hqq"])
def test_a_prepared_model_answers_without_the_original(
    setting: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path(shutil.copytree(model, tmp_path / "original"))
    expected = answers(original, setting, dtype="float32")
    made = make(original, tmp_path / "prepared", setting)
    assert made.is_new and made.manifest.setting == setting
    shutil.rmtree(original)
    monkeypatch.setattr(IntegerCodec, "encode_part", never)
    for policy in ("auto", "cpu-weights=0.5,disk-weights=0.5"):
        disk = tmp_path / "disk"
        assert answers(made.directory, setting, policy=policy, disk=disk) == expected, policy
    assert answers(made.directory, f"{setting.replace('-', 'kv8-', 1)}") != expected, "keys and values are coded, too"


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral", "gpt_oss", "gemma3_text"])
def test_slabs_and_all_other_tensors_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Experts, matrices with their input first, tied embeddings."""
    anatomy = Anatomy(tiny_config(family), torch.bfloat16)
    state = {name: tensor.bfloat16() for name, tensor in tiny_model(family).state_dict(keep_vars=True).items()}
    if anatomy.config.tie_word_embeddings:
        state["lm_head.weight"] = state[
            next(name for name in state if name.endswith(("embed_tokens.weight", "wte.weight")))
        ]
    layouts = [SlabLayout(anatomy.layer_specs(layer), IntegerCodec(4, 32)) for layer in range(4)]
    checkpoint = StateDictCheckpoint(anatomy, state)
    files = write_model(
        tmp_path, checkpoint, layouts, layers_name=anatomy.layers_name, device=CPU, on_layer=lambda layer: None
    )
    manifest = Manifest(
        model="", name="", note="", is_dummy=False, setting="", dtype="", content=content_of("", layouts), files=files
    )
    packed = PackedCheckpoint(anatomy, tmp_path, manifest)
    for layer, layout in enumerate(layouts):
        slab = torch.full((layout.num_bytes,), 7, dtype=torch.uint8)
        packed.packed(layer).read(slab)
        assert torch.equal(slab, layout.pack(checkpoint.layer(layer), device=CPU))
    rest, expected = packed.rest(), checkpoint.rest()
    assert rest.keys() == expected.keys()
    places = [{name: tensor.data_ptr() for name, tensor in tensors.items()} for tensors in (rest, expected)]
    for name, tensor in expected.items():
        assert rest[name].dtype == tensor.dtype and torch.equal(rest[name], tensor), name
        assert [k for k in rest if places[0][k] == places[0][name]] == [
            k for k in rest if places[1][k] == places[1][name]
        ]


def test_what_is_in_the_cache_is_found(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(model, dtype="float32")
    first = make(model, None)
    assert first.is_new and first.directory.parent == cache / "prepared"
    assert not make(model, None).is_new
    monkeypatch.setattr(SafetensorsCheckpoint, "layer", never)
    assert answers(model, dtype="float32") == expected
    assert answers(model, "w4kv8-g32", dtype="float32") != expected
    with pytest.raises(AssertionError, match="original weights"):
        answers(model, "w4-g32-hqq", dtype="float32")
    with pytest.raises(AssertionError, match="original weights"):
        answers(model, dtype="bfloat16")
    copied = make(model, tmp_path / "copy")
    assert copied.manifest.files == first.manifest.files, "what the cache holds is not packed again"


def test_transformers_reads_a_prepared_model_too(model: Path, tmp_path: Path) -> None:
    made = make(model, tmp_path / "prepared")
    oracles = [
        TransformersBackend(str(path), setting=SETTING, device="cpu", dtype="float32")
        for path in (model, made.directory)
    ]
    one, other = ([(c.text, c.logprobs) for c in oracle.generate(REQUESTS)] for oracle in oracles)
    assert one == other


def test_a_dummy_is_prepared_without_a_tokenizer(tokenizers: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", vocab_size=49152).to_dict()))
    ref = f"dummy:{tmp_path / 'config.json'}"
    made = make(ref, tmp_path / "prepared")
    assert sorted(made.manifest.files)[0] == "config.json" and len(made.manifest.files) == 4 + 2
    source = resolve(str(made.directory))
    (cache / "tokenizers").symlink_to(tokenizers)  # for texts of answers
    assert (source.name, source.is_dummy, source.note) == (resolve(ref).name, True, resolve(ref).note)
    asked = [Request(prompt=(5, 6, 7), max_tokens=3)]
    with (
        Engine.load(ref, setting=SETTING, device="cpu", dtype="float32") as dummy,
        Engine.load(source, setting=SETTING, device="cpu") as prepared,
    ):
        assert dummy.generate(asked)[0].token_ids == prepared.generate(asked)[0].token_ids


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("layer-0002.bin", flip, r"layer 2 \(layer-0002\.bin\) is damaged: its SHA-256"),
        ("rest.safetensors", flip, r"rest\.safetensors is damaged"),
        ("config.json", flip, r"config\.json"),
        ("tokenizer.json", flip, r"tokenizer\.json is damaged"),
        (
            "layer-0001.bin",
            lambda path: os.truncate(path, 4096),
            r"layer 1 \(layer-0001\.bin\) is 4096 bytes long, .*says",
        ),
        ("layer-0003.bin", Path.unlink, r"layer 3 \(layer-0003\.bin\) is missing"),
        ("rest.safetensors", Path.unlink, r"rest\.safetensors is missing"),
        ("prepared.json", lambda path: rewrite(path, format=2), r"in format 2, this flexeval reads format 1"),
        ("prepared.json", lambda path: path.write_text("{}"), r"not a manifest"),
        ("prepared.json", lambda path: path.write_text("]"), r"not a manifest"),
        ("prepared.json", lambda path: rewrite(path, files={"layer-0000.bin": 3}), r"not a manifest"),
        (
            "prepared.json",
            lambda path: rewrite(path, content={"weights": "", "layouts": "", "codec": ""}),
            r"another way",
        ),
    ],
)
def test_what_is_not_as_it_was_is_named_in_one_line(
    file: str, damage: Callable[[Path], object], message: str, prepared: Path
) -> None:
    damage(prepared / file)
    with pytest.raises(FlexevalError, match=message) as caught:
        answers(prepared)
    assert str(prepared) in str(caught.value) and "\n" not in str(caught.value)
    assert "again" in str(caught.value)


def test_damage_in_the_cache_is_named(model: Path) -> None:
    flip(make(model, None).directory / "layer-0000.bin")
    with pytest.raises(ModelError, match=r"layer 0 .* is damaged.*delete .* and prepare the model again"):
        answers(model, dtype="float32")


@pytest.mark.parametrize(
    ("setting", "dtype", "message"),
    [
        ("none", "auto", r"prepared with w4-g32, setting 'none' wants weights as they are.*--setting w4-g32"),
        ("w4", "auto", r"prepared with w4-g32, setting 'w4' wants w4 \("),
        ("w4-g32-hqq", "auto", r"wants w4-g32-hqq"),
        (SETTING, "bfloat16", r"computed in float32, not in bfloat16.*--dtype bfloat16"),
    ],
)
def test_another_setting_or_type_is_refused(setting: str, dtype: str, message: str, prepared: Path) -> None:
    with pytest.raises(ModelError, match=message):
        answers(prepared, setting, dtype=dtype)


@pytest.mark.parametrize("setting", ["none", "kv4"])
def test_a_setting_without_weights_has_nothing_to_prepare(setting: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to prepare.*such as w4"):
        make(model, tmp_path / "prepared", setting)


def test_what_is_there_is_left_alone(model: Path, tmp_path: Path) -> None:
    directory = make(model, tmp_path / "prepared").directory
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert not make(model, directory, "w4kv4-g32").is_new, "the weights are the same"
    with pytest.raises(ConfigError, match=r"something else is there.*--out"):
        make(model, directory, "w8-g32")
    with pytest.raises(ConfigError, match=r"prepared already"):
        make(directory, tmp_path / "other")
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == times
    with pytest.raises(ConfigError, match=r"something else is there"):
        make(model, model)
    (tmp_path / "empty").mkdir()
    assert make(model, tmp_path / "empty").is_new


def test_a_preparation_that_fails_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"infinite.*model\.layers\.3\.mlp\.up_proj\.weight"):
        make(broken, tmp_path / "out" / "prepared")
    assert list((tmp_path / "out").iterdir()) == []
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(CapacityError, match=r"does not fit: 1000 B are free"):
        make(model, tmp_path / "out" / "prepared")
    assert list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from flexeval.engine import preparing
from flexeval.engine.memory.packing import Packer
from flexeval.preparation import PrepareOptions, prepare
from flexeval.progress import LineProgress

fill = Packer.fill
def fill_two(self, layer, slab):
    if layer == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    fill(self, layer, slab)
Packer.fill = fill_two
prepare(PrepareOptions(model=sys.argv[1], setting="w4-g32", out=__import__("pathlib").Path(sys.argv[2]), device="cpu",
    dtype="float32"), LineProgress(print))
"""


@pytest.mark.usefixtures("prepared_once")  # what is known of the family: the child packs nothing to find out
def test_a_killed_preparation_leaves_nothing_that_looks_whole(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "prepared"
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = out.parent.iterdir()
    assert left != out and sorted(path.name for path in left.iterdir()) == ["layer-0000.bin", "layer-0001.bin"]
    with pytest.raises(FlexevalError, match=re.escape(f"no config.json here ({left})")):
        answers(left)
    made = make(model, out)
    assert made.is_new and list(out.parent.iterdir()) == [out], "and the next one clears it away"
    assert read_manifest(out) == made.manifest


def test_settings_name_what_becomes_of_weights() -> None:
    for name, weights in {
        "none": "none",
        "kv4-g32": "none",
        "w4": "w4",
        "w4-g64": "w4",
        "w8kv2-g128": "w8-g128",
        "w4kv4-g32-hqq": "w4-g32-hqq",
    }.items():
        setting = Setting.parse(name)
        assert setting.weights == weights
        codec, again = codec_of(setting), codec_of(Setting.parse(weights))
        assert (codec and codec.name) == (again and again.name)


def test_a_disk_that_is_full_when_the_rest_is_written_is_named(tmp_path: Path) -> None:
    """In a process of its own: the limit on the length of files cannot be lifted again."""
    source, target = os.pipe()
    if not (process := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_rest({"head": torch.zeros(5000)}, tmp_path / "rest.safetensors")
        except DiskError as error:
            os.write(target, str(error).encode())
        finally:
            os._exit(0)
    os.close(target)
    with open(source, encoding="utf-8") as said:
        assert re.match(rf"weights cannot be written: .*File too large.*{tmp_path}", said.read())
    os.waitpid(process, 0)
