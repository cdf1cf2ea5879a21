"""Measuring the engine and its peers: the same answers, and figures that the policy implies to the byte."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_directory import write_tiny_model
from transformers import AutoModelForCausalLM

from flexeval.backends import accelerate, offloaded
from flexeval.backends.accelerate import AccelerateBackend
from flexeval.backends.batching import GPU_USABLE_SHARE, batch_bytes
from flexeval.backends.deepspeed import DeepSpeedBackend
from flexeval.backends.loading import open_model
from flexeval.bench.engine import EngineJob, measure_engine
from flexeval.bench.peers import PEERS, PeerJob, check_peers, measure_peer
from flexeval.bench.timing import Measured
from flexeval.bench.work import SyntheticWork
from flexeval.config import Limits
from flexeval.engine.sizes import model_shape
from flexeval.errors import CapacityError, ConfigError
from flexeval.models import ModelSource, resolve
from flexeval.progress import LineProgress
from flexeval.request import Request, TokenRequest

GIB = 2**30
PROGRESS = LineProgress(lambda text: None)
VOCAB_SIZE = 640
WORK = SyntheticWork(prompt_len=70, gen_len=6, shared_prefix=50)
NUM_REQUESTS = 12
POLICY = "disk-weights=0.5,disk-kv=1,row-tokens=64,sweep-tokens=300,group-sequences=4"


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up tokens become no text: nobody opens a tokenizer for them."""
    monkeypatch.setattr("flexeval.backends.text.open_tokenizer", lambda folder: pytest.fail("a tokenizer was opened"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(write_tiny_model(tmp_path_factory.mktemp("model"))))


def requests(work: SyntheticWork = WORK, num_requests: int = NUM_REQUESTS) -> list[Request]:
    return work.requests(num_requests, vocab_size=VOCAB_SIZE)


def engine(source: ModelSource, disk: Path, asked: list[Request], **changes: Any) -> Measured:
    options = {"policy": POLICY, "device": "cpu", "dtype": "float32", "disk": str(disk)}
    job: dict[str, Any] = {"num_repeats": 1, "num_warm_up": 0, "setting": "none"} | changes
    return measure_engine(EngineJob(source=source, options=options, requests=asked, **job), PROGRESS)


def peer(source: ModelSource, name: str, work: list[Request], **changes: Any) -> Measured:
    job: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "limits": Limits(),
        "batch_size": None,
        "asked": range(len(work)),
        "max_tokens": None,
        "num_repeats": 1,
        "is_warmed_up": True,
    }
    return measure_peer(PeerJob(source=source, peer=name, requests=work, **(job | changes)), PROGRESS)


def test_every_byte_is_the_policy_s(source: ModelSource, tmp_path: Path) -> None:
    opened = open_model(source, setting="none", device="cpu", dtype="float32")
    shape = model_shape(opened.anatomy, None, opened.device)
    asked = [*requests(), requests()[0]]
    measured = engine(source, tmp_path, asked, num_repeats=3, num_warm_up=2)
    figures = measured.figures
    tokens = figures.tokens
    assert tokens.num_asked == 13 * 70
    assert tokens.num_duplicate == 70
    assert tokens.num_shared == 11 * 50
    assert tokens.num_computed == 50 + 12 * 20, "of one run, not of three and a warm-up"
    assert tokens.num_generated == 13 * 6
    prefill, decode = figures.phases["prefill"], figures.phases["decode"]
    assert prefill.num_fresh_tokens == tokens.num_computed
    assert prefill.num_decode_tokens + decode.num_decode_tokens == 12 * 5, "equal requests decode together"
    for phase, early in ((prefill, 1), (decode, -1)):  # the last prompts' sweep sends for the first layer of the next
        num_layers = 2 * phase.num_sweeps + early
        assert phase.lanes["weights"].num_bytes == num_layers * shape.layer_bytes, "two of four layers a sweep"
        assert phase.lanes["hidden"].num_bytes == 0
        assert 0 < phase.lanes["compute"].utilization <= 1
        read = phase.bounds["disk_read"]
        assert read.amount == phase.lanes["weights"].num_bytes + phase.lanes["kv_in"].num_bytes
        assert read.bound_s == pytest.approx(read.amount / read.per_s)
        assert phase.bounds["disk_write"].amount == phase.lanes["kv_out"].num_bytes
        assert phase.bound in phase.bounds and phase.reached is not None and phase.reached > 0
    written = prefill.lanes["kv_out"].num_bytes + decode.lanes["kv_out"].num_bytes
    assert written >= (tokens.num_computed + 12 * 5) * shape.num_layers * shape.kv_bytes_per_token
    assert figures.elapsed_s == sorted(figures.all_elapsed_s)[1], "the median of three"
    assert sum(phase.elapsed_s for phase in figures.phases.values()) <= figures.elapsed_s
    assert figures.peak_bytes["disk"] >= 2 * shape.layer_bytes
    assert figures.peak_bytes["process"] > figures.peak_bytes["cpu"]
    assert measured.hardware["disk_read_bytes_per_s"] > 0
    assert figures.predicted_s is not None and figures.predicted_s > 0


def test_compressed_weights_cross_as_they_rest(source: ModelSource, tmp_path: Path) -> None:
    plain, packed = (engine(source, tmp_path, requests(), setting=name).figures for name in ("none", "w4"))
    sizes = [
        figures.phases["decode"].lanes["weights"].num_bytes / figures.phases["decode"].num_sweeps
        for figures in (plain, packed)
    ]
    assert sizes[1] < sizes[0] / 4, "4 bits and a share of two 16-bit numbers, not 32 bits"
    assert packed.setting == "w4"


def test_scored_prompts_need_one_pass(source: ModelSource, tmp_path: Path) -> None:
    work = SyntheticWork(prompt_len=30, gen_len=1, is_scoring=True)
    figures = engine(source, tmp_path, requests(work)).figures
    assert list(figures.phases) == ["prefill"]
    assert (figures.tokens.num_generated, figures.generated_tokens_per_s) == (0, None)
    assert figures.prefill_tokens_per_s > 0


def test_growth_is_measured_on_one_placement(source: ModelSource, tmp_path: Path) -> None:
    more = [requests(num_requests=24), requests(num_requests=48)]
    figures = engine(source, tmp_path, requests(), more_requests=more).figures
    assert [point.num_requests for point in figures.scale] == [12, 24, 48]
    assert figures.scale[0].elapsed_s == figures.elapsed_s
    assert figures.exponent is not None
    assert figures.tokens.num_asked == 12 * 70, "the figures are of the first"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("transformers", {}),
        ("transformers", {"batch_size": 8}),
        ("accelerate", {}),
        ("accelerate", {"batch_size": 3, "num_repeats": 2, "is_warmed_up": False}),
    ],
)
def test_peers_answer_what_the_engine_answers(
    source: ModelSource, name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = requests()
    ours, theirs = engine(source, tmp_path, asked), peer(source, name, asked, **changes)
    assert theirs.answers == ours.answers
    figures = theirs.figures
    assert (figures.tokens.num_asked, figures.tokens.num_computed) == (12 * 70, 12 * 70), "nothing is shared"
    assert figures.tokens.num_generated == ours.figures.tokens.num_generated
    assert figures.batch_size == changes.get("batch_size", {"transformers": 1, "accelerate": 12}[name])
    num_batches = -(-12 // figures.batch_size)
    assert (figures.phases["prefill"].num_sweeps, figures.phases["decode"].num_sweeps) == (num_batches, num_batches * 5)
    assert sum(phase.elapsed_s for phase in figures.phases.values()) <= figures.elapsed_s


@pytest.mark.parametrize("name", ["transformers", "accelerate"])
def test_a_peer_answers_the_part_that_it_is_asked(source: ModelSource, name: str) -> None:
    whole, part = peer(source, name, requests()), peer(source, name, requests(), asked=[0, 4, 8], max_tokens=2)
    assert part.answers == [whole.answers[index][:2] for index in (0, 4, 8)]
    assert part.figures.batch_size == whole.figures.batch_size, "room is made for all of the work"
    assert part.figures.tokens.num_generated == 3 * 2
    assert part.figures.phases["prefill"].num_fresh_tokens == 3 * 70
    assert part.figures.phases["decode"].num_decode_tokens == 3


def test_accelerate_keeps_on_disk_what_exceeds_the_limit(source: ModelSource, tmp_path: Path) -> None:
    asked = requests(num_requests=3)
    limits = Limits(cpu_bytes=500_000, disk_dir=tmp_path)
    offloaded = peer(source, "accelerate", asked, limits=limits, batch_size=1)
    assert offloaded.answers == peer(source, "transformers", asked).answers
    assert offloaded.figures.peak_bytes["disk"] > 0
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    with pytest.raises(CapacityError, match="--disk"):
        peer(source, "accelerate", asked, limits=Limits(cpu_bytes=500_000), batch_size=1)


def test_accelerate_fills_a_gpu_with_weights_beside_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT-30B in 24 GiB, prompt 512, generate 32. Nothing is loaded: the device map is made from sizes alone."""
    opened = open_model("dummy:opt-30b", setting="none", device="cpu", dtype="float16")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            copy.deepcopy(opened.anatomy.config), dtype=torch.float16, attn_implementation="sdpa"
        )
    device_map: dict[str, int | str] = {}
    monkeypatch.setattr(offloaded, "load_whole", lambda opened, attention: empty)
    monkeypatch.setattr(offloaded, "free_host_bytes", lambda: 128 * GIB)
    monkeypatch.setattr(accelerate, "gpu_room", lambda limits, device: int(limits.gpu_bytes * GPU_USABLE_SHARE))
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, chosen, **_: device_map.update(chosen))
    backend = AccelerateBackend("dummy:opt-30b", device="cpu", dtype="float16", limits=Limits(gpu_bytes=24 * GIB))
    backend._device = torch.device("cuda", 0)
    work = SyntheticWork(prompt_len=512, gen_len=32)
    assert backend.place(work.requests(64, vocab_size=VOCAB_SIZE)).batch_size == 20
    on_gpu = [name for name, device in device_map.items() if device == 0]
    assert {"model.decoder.embed_tokens", "lm_head"} <= set(on_gpu)
    shape = model_shape(opened.anatomy, None, opened.device)
    num_layers = sum(name.startswith("model.decoder.layers.") for name in on_gpu)
    assert 2 <= num_layers <= 8 and set(device_map.values()) == {0, "cpu"}
    resting = shape.resident_bytes + num_layers * shape.layer_bytes
    assert batch_bytes(shape, [TokenRequest(prompt_ids=(1,) * 512, max_tokens=32)], 20) + resting < 23 * GIB


@pytest.mark.gpu
def test_accelerate_keeps_to_the_gpu_memory_given(source: ModelSource) -> None:
    asked = requests(num_requests=3)
    torch.cuda.reset_peak_memory_stats()
    of_others = torch.cuda.memory_allocated()  # a peer has a process of its own, but for these tests
    backend = AccelerateBackend(source, device="cuda", dtype="float32", limits=Limits(gpu_bytes=64 * 2**20))
    answers = [completion.token_ids for completion in backend.generate(asked)]
    assert backend.usage().peak_bytes["gpu"] - of_others <= 64 * 2**20
    assert answers == peer(source, "transformers", asked).answers
    backend.close()


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="an optional extra")
def test_deepspeed_answers_what_transformers_answers(source: ModelSource) -> None:
    asked = requests(num_requests=5)
    limits = Limits(gpu_bytes=2**30)
    theirs = peer(source, "deepspeed", asked, device="cuda", limits=limits)
    assert theirs.answers == peer(source, "transformers", asked).answers


def test_peers_are_checked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else "found")
    check_peers(PEERS[:2], "cpu")
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        check_peers(["deepspeed"], "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(ConfigError, match="deepspeed needs a GPU"):
        check_peers(["deepspeed"], "cpu")
    with pytest.raises(ConfigError, match="transformers, accelerate, deepspeed"):
        check_peers(["vllm"], "cpu")


def test_deepspeed_says_what_it_lacks_before_weights_are_loaded(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexeval.backends.offloaded.load_whole", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="deepspeed needs a GPU"):
        DeepSpeedBackend(source, device="cpu")
    monkeypatch.setattr("flexeval.backends.deepspeed.check_gpu", lambda device: None)
    with pytest.raises(CapacityError, match="--cpu-memory"):
        DeepSpeedBackend(source, device="cpu", limits=Limits(cpu_bytes=100_000))
