"""Files from strangers, damaged in a hundred thousand ways: whatever reads them serves, or says in one line why not."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_conversion import WriteGguf, write_gguf  # noqa: F401
from test_journal import FIRST, FORKED, PLAIN, SECOND
from tiny_directory import write_tiny_model

from flexeval.backends.loading import open_model
from flexeval.benchmark.suites import load_suite
from flexeval.checkpoints import check_weights, read_config
from flexeval.conversion import read_header
from flexeval.engine.checkpoint import SafetensorsCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.errors import FlexevalError
from flexeval.journal import Journal
from flexeval.models import resolve
from flexeval.policy.policy import Policy
from flexeval.preparation import PrepareOptions, prepare
from flexeval.prepared import read_manifest
from flexeval.progress import LineProgress
from flexeval.tokenizer import encode, open_tokenizer

ODD = ("-1", "0", "1e999", "NaN", "1" * 400, "null", "true", '""', "[]", "{}", '"../x"', '"\\ud800"', "[" * 2000, "2.5")
"""Instead of a JSON value."""
SUITE = """
entries: [
  {description: "mmlu:model=text,subject=anatomy", priority: 1, groups: ["mine", "yours"]}
  {description: "gsm:model=text", priority: 2}
]
description: "What it is for"
max_eval_instances: 20
num_train_trials: 1
chat_template: false
packaged_data: ["mmlu"]
"""
LENGTHS = (0, 1, 7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
"""Instead of eight bytes that may be a length."""


def damage(chance: random.Random, data: bytes) -> bytes:
    """Change a few bytes, lengths, JSON values or stretches."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(len(data) + 1)
        stop = min(len(data), place + chance.choice((1, 2, 8, 64, 1000)))
        kind = chance.randrange(7)
        if kind == 0:
            data = data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + data[stop:]
        elif kind == 2:
            data = data[:place]
        elif kind == 3:
            data = data[:place] + data[chance.randrange(len(data) + 1) :][: stop - place] + data[place:]
        elif kind == 4:
            data = data[:place] + struct.pack("<Q", chance.choice(LENGTHS)) + data[place + 8 :]
        elif kind == 5:
            data = data[:place] + bytes(chance.randrange(256) for _ in range(stop - place)) + data[stop:]
        elif (colon := data.find(b":", place)) >= 0:  # a value of an object
            ends = [end for sign in b",}" if (end := data.find(bytes([sign]), colon)) >= 0]
            value = chance.choice(ODD).encode()
            data = data[: colon + 1] + value + data[min(ends, default=len(data)) :]
    return data


class Target(NamedTuple):
    """A kind of file, and who reads it."""

    path: Path
    start: bytes
    """What of it is damaged, ..."""
    rest: bytes
    """... and what follows."""
    read: Callable[[], object]
    share: float
    """Of all inputs."""


@pytest.fixture
def targets(tmp_path: Path, write_gguf: WriteGguf) -> dict[str, Target]:  # noqa: F811
    """Each reads a directory or file of its own."""
    model = write_tiny_model(tmp_path / "tiny")
    options = PrepareOptions(model=str(model), setting="w4-g32", out=tmp_path / "w4", device="cpu", dtype="float32")
    made = prepare(options, LineProgress(lambda text: None)).directory
    anatomy = Anatomy(
        open_model(str(model), setting="none", device="cpu", dtype="float32").anatomy.config, torch.float32
    )
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.add([(FIRST, PLAIN), (SECOND, FORKED)])
        journal.add_usage({"load_s": 1.0})
    (tmp_path / "policy.json").write_text(json.dumps(Policy().to_json()))
    whole_gguf = write_gguf()
    found: dict[str, Target] = {}

    def add(name: str, path: Path, read: Callable[[], object], share: float, num_bytes: int | None = None) -> None:
        data = path.read_bytes()
        found[name] = Target(path, data[:num_bytes], data[num_bytes:] if num_bytes else b"", read, share)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    weights, whole, config, index = copy("weights"), copy("whole"), copy("config"), copy("index")
    header = 8 + struct.unpack("<Q", (model / "model.safetensors").read_bytes()[:8])[0]
    names = [name for name in json.loads((model / "model.safetensors").read_bytes()[8:header]) if "." in name]
    (index / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )

    def read_journal() -> None:
        with Journal(tmp_path / "journal.jsonl") as journal:
            for request, answer in ((FIRST, PLAIN), (SECOND, FORKED)):
                assert request not in journal or journal[request] == answer

    def read_layers() -> None:
        checkpoint = SafetensorsCheckpoint(anatomy, whole)
        checkpoint.rest()
        checkpoint.layer(1)

    add("gguf", whole_gguf, lambda: read_header(whole_gguf), 0.16, 12_000)
    add(
        "safetensors", weights / "model.safetensors", lambda: check_weights(weights, read_config(weights)), 0.27, header
    )
    add("layers", whole / "model.safetensors", read_layers, 0.01, header)
    add("index", index / "model.safetensors.index.json", lambda: check_weights(index, read_config(index)), 0.1)
    add("manifest", made / "prepared.json", lambda: read_manifest(made), 0.2)
    add("config", config / "config.json", lambda: resolve(str(config)), 0.1)
    add(
        "model",
        copy("model") / "config.json",
        lambda: open_model(str(tmp_path / "model"), setting="none", device="cpu", dtype="float32"),
        0.005,
    )
    tokenizer = copy("tokenizer")
    for name, share in (("tokenizer.json", 0.01), ("tokenizer_config.json", 0.02)):
        add(name, tokenizer / name, lambda: encode(open_tokenizer(tokenizer), "what is 12 and why?"), share, 2_000)
    add("journal", tmp_path / "journal.jsonl", read_journal, 0.1)
    suite = tmp_path / "suite.conf"
    suite.write_text(SUITE)
    add("suite", suite, lambda: load_suite(str(suite)), 0.01)
    add("policy", tmp_path / "policy.json", lambda: Policy.load(tmp_path / "policy.json"), 0.015)
    return found


@pytest.mark.parametrize("num_inputs", [400, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_in_one_line_or_serve(num_inputs: int, targets: dict[str, Target]) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    counts: dict[str, Counter[str]] = {}
    for name, target in targets.items():
        chance, counts[name] = random.Random(f"{seed} {name}"), Counter()
        for number in range(max(2, round(num_inputs * target.share))):
            data = damage(chance, target.start)
            target.path.write_bytes(data + target.rest)
            try:
                target.read()
                counts[name]["served"] += 1
            except FlexevalError as error:
                line = str(error)
                assert line.isprintable() and len(line) < 3000, (name, number, line)
                counts[name]["refused"] += 1
            except BaseException as error:
                raise AssertionError(
                    f"{name}, input {number} of seed {seed}: {type(error).__name__}: {error}"
                ) from error
    total = sum(count.total() for count in counts.values())
    print(f"\n{total} inputs: { ({name: dict(count) for name, count in counts.items()}) }")
    assert total >= num_inputs
    assert all(count["refused"] for count in counts.values() if count.total() > 20 and count is not counts["journal"])
