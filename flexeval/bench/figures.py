"""What a benchmark found, as plain data; `--out` writes it as JSON. Knows no tensor and no table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexeval.files import write_json

SCHEMA_VERSION = 1
DERIVED = ("requests_per_s", "prefill_tokens_per_s", "decode_s_per_sweep", "generated_tokens_per_s")
"""What is written of a system beside its fields."""
DERIVED_OF_PHASES = ("bound", "reached")
"""The same of a phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneFigures:
    """One of the engine's lanes in one phase."""

    num_bytes: int
    """Bytes moved between tiers; of `host_attention`, those that the CPU attended to where they rest."""
    busy_s: float
    """Seconds at work; of the device, on a GPU."""
    utilization: float
    """`busy_s` over the phase's seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundFigures:
    """What one resource of the machine makes a phase take at least."""

    amount: float
    """Bytes that crossed it; for `compute`, operations of the layers' matrix products."""
    per_s: float
    """Measured rate: bytes or operations a second."""
    bound_s: float
    """The least seconds at that rate."""
    predicted_s: float
    """Seconds of it that the cost model predicted for the chosen policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFigures:
    """All sweeps of a kind: `prefill`, those that compute prompts; `decode`, those that only continue sequences."""

    elapsed_s: float
    """Their seconds."""
    num_sweeps: int
    """Passes over the layers."""
    num_fresh_tokens: int
    """Prompt tokens computed."""
    num_decode_tokens: int
    """Tokens continued, by one each; in `prefill`, beside prompts."""
    lanes: dict[str, LaneFigures] = field(default_factory=dict)
    """`weights`, `disk`, `kv_in`, `kv_out`, `hidden`, `host_attention`, `compute`; empty for peers."""
    bounds: dict[str, BoundFigures] = field(default_factory=dict)
    """By resource: `compute`, `to_gpu`, `from_gpu`, `host_attention`, `disk_read`, `disk_write`; empty for peers."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens continued a second."""
        return self.num_decode_tokens / self.elapsed_s

    @property
    def bound(self) -> str | None:
        """The resource that takes longest."""
        return max(self.bounds, key=lambda name: self.bounds[name].bound_s, default=None)

    @property
    def reached(self) -> float | None:
        """Share of the bound that was reached: its least seconds over the seconds taken."""
        return self.bounds[self.bound].bound_s / self.elapsed_s if self.bound and self.elapsed_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFigures:
    """Prompt tokens: asked, and why fewer are computed."""

    num_asked: int
    """Of all requests."""
    num_duplicate: int
    """Of these, in prompts that equal an earlier one."""
    num_shared: int
    """Of the others, in beginnings that are computed with an earlier prompt."""
    num_computed: int
    """What is left."""
    num_generated: int
    """Tokens generated."""
    num_last: int = 0
    """Of the others, last ones of prompts that are only scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """The same kind of work, more of it."""

    num_requests: int
    """Requests answered."""
    elapsed_s: float
    """Seconds they took."""

    @property
    def s_per_request(self) -> float:
        """Seconds a request."""
        return self.elapsed_s / self.num_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeFigures:
    """All of the work, where a peer answered a part: estimated from its seconds a prompt token and a decoded token."""

    num_requests: int
    """Requests."""
    num_generated: int
    """Tokens generated for them."""
    elapsed_s: float
    """Seconds they would take."""
    batch_size: int
    """Sequences that it would compute together; fewer were, where the part was smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedupFigures:
    """How many times as fast as a peer the engine is under one setting."""

    requests: float
    """Requests a second, over all of the work."""
    prompt_tokens: float
    """Prompt tokens asked, over the seconds of `prefill`."""
    decode_tokens: float | None
    """Tokens that continue sequences, over the seconds of `decode`; None where one of the two has no such phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFigures:
    """One system on the requests: the engine under a setting, or a peer. Of several runs, the median one's figures."""

    system: str
    """`flexeval`, `transformers`, `accelerate`, `deepspeed`."""
    setting: str
    """How weights are compressed; peers run `none`."""
    num_requests: int
    """Requests answered."""
    batch_size: int
    """Generating sequences computed together at most."""
    load_s: float
    """Seconds to load and place the weights."""
    elapsed_s: float
    """Seconds to answer, planning included."""
    all_elapsed_s: list[float]
    """Of every run."""
    tokens: TokenFigures
    """What was computed."""
    phases: dict[str, PhaseFigures]
    """`prefill` and, where more than one token is generated, `decode`."""
    peak_bytes: dict[str, int]
    """Largest use of each tier, and `process`: the process's resident memory."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Where everything rested; empty for peers."""
    splits: list[str] = field(default_factory=list)
    """For each time that memory ran out: what was made smaller so that work could go on."""
    predicted_s: float | None = None
    """Seconds that the cost model predicted."""
    scale: list[ScalePoint] = field(default_factory=list)
    """With `--scale`: more and more requests."""
    exponent: float | None = None
    """With `--scale`: seconds grow with this power of the number of requests."""
    same_answers: float | None = None
    """Of a peer: share of the requests it answers with the very tokens of the engine's first setting."""
    speedups: dict[str, SpeedupFigures] = field(default_factory=dict)
    """Of a peer: what it is held against, by the engine's setting."""
    whole: WholeFigures | None = None
    """Of a peer that answered a part of the work: an estimate for all of it; None where nothing is estimated."""

    @property
    def requests_per_s(self) -> float:
        """Requests answered a second; of all the work."""
        work = self.whole or self
        return work.num_requests / work.elapsed_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed over the seconds of the sweeps that compute prompts."""
        prefill = self.phases["prefill"]
        return prefill.num_fresh_tokens / prefill.elapsed_s

    @property
    def decode_s_per_sweep(self) -> float | None:
        """Mean seconds of a sweep that only continues sequences."""
        decode = self.phases.get("decode")
        return decode.elapsed_s / decode.num_sweeps if decode else None

    @property
    def generated_tokens_per_s(self) -> float | None:
        """Generated tokens over the seconds of prefill and decode together (FlexGen's generation throughput)."""
        if self.whole is not None:
            return self.whole.num_generated / self.whole.elapsed_s or None
        seconds = sum(phase.elapsed_s for phase in self.phases.values())
        return self.tokens.num_generated / seconds if self.tokens.num_generated else None

    def to_json(self) -> dict[str, Any]:
        """All figures, the derived ones too."""
        data = asdict(self)
        data |= {name: getattr(self, name) for name in DERIVED}
        for name, phase in self.phases.items():
            data["phases"][name] |= {derived: getattr(phase, derived) for derived in DERIVED_OF_PHASES}
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResults:
    """Everything that was measured."""

    model: str
    """The model as the user named it."""
    work: str
    """What was asked, in words."""
    chosen: str
    """Why so many requests; empty where the user said how many."""
    command: str
    """The command line."""
    created: str
    """ISO 8601, UTC."""
    machine: dict[str, str]
    """Processor, cores, memory, GPU, in words."""
    versions: dict[str, str]
    """Of what was measured."""
    hardware: dict[str, Any]
    """Capacities and measured rates of the machine."""
    systems: list[SystemFigures]
    """The engine's settings in the user's order, then peers."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Peers that could not be measured, and why."""

    def save(self, path: Path) -> None:
        """Write everything as JSON, whole or not at all."""
        names = ("model", "work", "chosen", "command", "created", "machine", "versions", "hardware", "skipped")
        data = {name: getattr(self, name) for name in names}
        systems = [system.to_json() for system in self.systems]
        write_json(path, {"schema_version": SCHEMA_VERSION, **data, "systems": systems})
