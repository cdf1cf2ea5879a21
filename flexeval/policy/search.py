"""Finds the policy that the cost model likes best, or says what is missing for there to be one.

FlexGen's search (Sheng et al., ICML 2023, section 4.3): enumerate how much work is in flight, and for each choice let
a linear program place weights, KV cache and hidden states. Knows the grid and the errors; `program.py` solves, and
`cost.py` holds every formula. No tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import product
from math import ceil, log2
from typing import TYPE_CHECKING

from flexeval.config import format_size
from flexeval.errors import CapacityError
from flexeval.planning.logs import FILLED_SHARE
from flexeval.policy.computing import KERNELS_PER_CALL
from flexeval.policy.correction import NO_CORRECTION, Correction
from flexeval.policy.cost import CostModel, Lane
from flexeval.policy.policy import Policy, Split, Tier, apart
from flexeval.policy.program import best_placement, least_seconds, missing_bytes
from flexeval.policy.sweeps import plan_sweeps
from flexeval.policy.work import ModelShape, Workload

if TYPE_CHECKING:  # hardware.py measures with torch; searching must not need it
    from flexeval.policy.hardware import Hardware

TOLERANCE = 1e-3
"""The search ends when nothing left can be better than the best policy by more than this (relatively)."""
GROUP_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of groups in flight that are tried."""
MAX_GROUP_SEQUENCES = 4096
"""Sequences of a group: powers of two up to this are tried, and numbers half-way between."""
ROW_TOKENS = (1024, 16384)
"""Fewest and most tokens of a layer call that are tried where memory allows: with fewer, Python shows."""
TIGHT_ROW_TOKENS = 256
"""Fewest that are tried where it does not."""
WORTHWHILE_ROOM = 0.75
"""Logs for all but the largest sequences are tried where they take less than this of those for any."""
SWEEP_DIVISORS = (1, 4, 16, 64)
"""A sweep takes the prompt tokens of one block, or such a part of them."""
W4_BITS = 4 + 2 * 16 / 64
"""Bits of a weight under `w4`: groups of 64 share a 16-bit scale and a 16-bit minimum."""
OPTION = {Tier.GPU: "--gpu-memory", Tier.CPU: "--cpu-memory", Tier.DISK: "--disk DIR:SIZE"}
"""The option that sets a tier's size."""


def search(
    shape: ModelShape, workload: Workload, hardware: Hardware, *, correction: Correction = NO_CORRECTION
) -> Policy:
    """The policy of least predicted time. Raises `CapacityError` where none fits, saying what would.

    Best first: every choice of sizes is bounded from below by its weights alone and by what must be read, then by its
    relaxed program (fractions of layers), before its whole program is solved; whichever bound is least is looked at
    next, until nothing left can be better. Equal input gives an equal answer.
    """
    model = CostModel(shape=shape, workload=workload, hardware=hardware, correction=correction)
    # Bound, which of the grid, whether the bound is its relaxed program's.
    grid = list(_grid(model))
    bounds = (max(_seconds_for_weights(model, sizes), _seconds_to_read(model, sizes)) for sizes in grid)
    left = [(bound, index, False) for index, bound in enumerate(bounds)]
    heapify(left)
    best: tuple[float, Policy] | None = None
    while left and not (best and left[0][0] >= best[0] * (1 - TOLERANCE)):
        bound, index, is_relaxed = heappop(left)
        if not is_relaxed:
            if (relaxed := least_seconds(model, grid[index])) is not None:
                heappush(left, (max(bound, relaxed), index, True))
        elif policy := best_placement(model, grid[index]):
            objective_s = model.cost(policy).objective_s
            best = min(best or (objective_s, policy), (objective_s, policy), key=lambda b: b[0])
    if best is None:
        raise _does_not_fit(model)
    check(best[1], shape, workload, hardware)
    return best[1]


def _seconds_for_weights(model: CostModel, sizes: Policy) -> float:
    """A lower bound of `objective_s` over all placements: weights fill the fastest tiers, all else takes no room."""
    hardware, num_left = model.hardware, model.shape.num_layers
    counts = dict.fromkeys(Tier, 0)
    for tier in (hardware.home, *(tier for tier in Tier if tier is not hardware.home)):
        counts[tier] = min(num_left, int(hardware.capacity_bytes(tier) // model.shape.layer_bytes))
        num_left -= counts[tier]
    counts[hardware.home] += num_left  # it does not fit: the program says so
    weights = Split(**{tier: count / model.shape.num_layers for tier, count in counts.items()})
    home = Split(**{hardware.home: 1.0})
    return model.cost(replace(sizes, weights=weights, kv=home, hidden=home, host_attention=0.0)).objective_s


def _seconds_to_read(model: CostModel, sizes: Policy) -> float:
    """A lower bound of `objective_s` over all placements: what faster memory has no room for is read in each sweep.

    Of weights and KV, whatever saves most reading for its bytes is kept; nothing else takes room.
    """
    hardware, shape, num_layers = model.hardware, model.shape, model.shape.num_layers
    item_bytes, sweeps = model.room.item_bytes(sizes), plan_sweeps(sizes, model.workload)
    lanes = [(Lane.DISK_READ, hardware.gpu_bytes + hardware.cpu_bytes, hardware.disk_read_bytes_per_s)]
    if hardware.home is Tier.GPU:
        lanes.append((Lane.TO_GPU, hardware.gpu_bytes, hardware.to_gpu_bytes_per_s))
    most_s = 0.0
    for lane, capacity, bytes_per_s in lanes:
        if not bytes_per_s:
            continue
        room = float(capacity)
        read_bytes = dict.fromkeys(("weights", "kv"), 0.0)
        for phase, sweep in sweeps.items():
            factor = model.correction.of_phase(phase) * model.correction.of_lane(phase, lane)
            for kind, num_bytes in model.read_bytes(sweep).items():
                read_bytes[kind] += factor * sweep.num_sweeps * num_bytes
        if shape.sparsity is not None or (lane is Lane.TO_GPU and model.can_attend_on_host):
            read_bytes["kv"] = 0.0  # not all of it has to come
        seconds = 0.0
        for kind in sorted(read_bytes, key=lambda kind: read_bytes[kind] / max(1.0, item_bytes[kind]), reverse=True):
            num_kept = min(num_layers, room / max(1.0, item_bytes[kind]))
            room -= num_kept * item_bytes[kind]
            seconds += (num_layers - num_kept) * read_bytes[kind] / bytes_per_s
        most_s = max(most_s, seconds)
    return most_s


def choose(
    shape: ModelShape, workload: Workload, hardware: Hardware, *, fixed: Policy | None = None, is_apart: bool = False
) -> Policy:
    """The policy that runs: a fixed one or the best, and for requests that are kept apart with rows of one each.

    Raises `CapacityError` where it does not fit.
    """
    policy = fixed or search(shape, workload, hardware)
    if not is_apart:
        check(policy, shape, workload, hardware)
        return policy
    policy = apart(policy)
    while True:
        try:
            check(policy, shape, workload, hardware)
            return policy
        except CapacityError:
            if policy.num_groups == 1:
                raise
            policy = replace(policy, num_groups=policy.num_groups // 2)


def check(policy: Policy, shape: ModelShape, workload: Workload, hardware: Hardware) -> None:
    """Raise `CapacityError` if `policy` needs more of a tier than there is."""
    model = CostModel(shape=shape, workload=workload, hardware=hardware)
    for tier, peak in model.cost(policy).peak_bytes.items():
        room = hardware.capacity_bytes(tier)
        if peak > room:
            raise CapacityError(
                f"the policy needs {format_size(peak)} of {tier} memory, {format_size(room)} are usable",
                where="policy",
                mend="Move a share to another tier, lower group_sequences, num_groups or sweep_tokens, "
                f"raise {OPTION[tier]}, or let the search decide (--policy auto)",
            )


def _grid(model: CostModel) -> Iterator[Policy]:
    """Sizes to try: tokens of a row, sequences of a group, groups in flight, tokens of a sweep, room of a group."""
    work = model.workload
    num_generating = work.num_generating_sequences
    for row_tokens in _row_sizes(model):
        for group_sequences in _group_sizes(min(num_generating, MAX_GROUP_SEQUENCES)):
            for num_groups in GROUP_COUNTS:
                if num_groups > 1 and group_sequences * (num_groups - 1) >= num_generating:
                    break  # the last group would stay empty
                num_blocks = max(1, ceil(num_generating / (group_sequences * num_groups)))
                least = max(row_tokens, work.max_prompt_tokens)
                sweeps = {max(least, ceil(work.num_prompt_tokens / (num_blocks * part))) for part in SWEEP_DIVISORS}
                for sweep_tokens, group_tokens in product(sorted(sweeps, reverse=True), _rooms(work, group_sequences)):
                    yield Policy(
                        row_tokens=row_tokens,
                        sweep_tokens=sweep_tokens,
                        group_sequences=group_sequences,
                        num_groups=num_groups,
                        group_tokens=group_tokens,
                    )


def _rooms(work: Workload, group_sequences: int) -> list[int]:
    """Tokens of a group's log: for any of its sequences, and for all but the largest where that is much less."""
    most = group_sequences * work.max_own_tokens
    classes = [one.num_tokens for one in work.classes][-2::-2]
    rooms = {max(work.max_own_tokens, ceil(group_sequences * tokens / FILLED_SHARE)) for tokens in classes}
    return [0, *sorted(room for room in rooms if room < WORTHWHILE_ROOM * most)]


def _row_sizes(model: CostModel) -> list[int]:
    """The power of two from which layer calls run near their peak rate, twice that, and a half and a sixteenth of it.

    A call of t tokens runs at peak * t / (t + t_half) (see `computing.compute_seconds`): 8 t_half gives 8/9 of peak, 16
    t_half 16/17. The smaller ones are for tight memory.
    """
    shape, hardware = model.shape, model.hardware
    call_s = shape.layer_compute_bytes / hardware.few_product_bytes_per_s + KERNELS_PER_CALL * hardware.launch_s
    half = call_s * hardware.flops_per_s / (2 * shape.layer_params)
    low, high = ROW_TOKENS
    large = min(high, max(low, 2 ** ceil(log2(8 * half))))
    sizes = (min(high, 2 * large), large, max(TIGHT_ROW_TOKENS, large // 2), max(TIGHT_ROW_TOKENS, large // 16))
    return sorted(set(sizes), reverse=True)


def _group_sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most` itself; 1 if `most` is 0."""
    powers = [2**power for power in range(most.bit_length())]
    between = [3 * power for power in powers if 3 * power < most]
    return sorted({*powers, *between, max(1, most)})


def _does_not_fit(model: CostModel) -> CapacityError:
    """Which tier lacks how much for the smallest sizes, and what would fit."""
    hardware = model.hardware
    smallest = min(_grid(model), key=lambda s: (s.block_sequences, s.row_tokens, s.sweep_tokens))
    # Room on a slower tier is cheaper to add; without a disk folder there is none to add to.
    prices = {Tier.GPU: 100.0, Tier.CPU: 10.0, Tier.DISK: 1.0}
    price = {tier: prices[tier] for tier in Tier if tier is hardware.home or hardware.capacity_bytes(tier)}
    missing = missing_bytes(model, smallest, price)
    assert missing, (model, smallest)
    what = " and ".join(
        f"{tier} has {format_size(hardware.capacity_bytes(tier))} and lacks {format_size(num_bytes)}"
        for tier, num_bytes in missing.items()
    )
    raised = {tier: hardware.capacity_bytes(tier) + num_bytes for tier, num_bytes in missing.items()}
    mends = ["Raise " + " and ".join(f"{OPTION[tier]} to {format_size(size)}" for tier, size in raised.items())]
    if not hardware.disk_bytes and (on_disk := missing_bytes(model, smallest, {Tier.DISK: 1.0})):
        mends.append(f"offload with --disk DIR ({format_size(on_disk[Tier.DISK])} free there)")
    if not model.shape.is_packed and missing_bytes(_with_w4(model), smallest, {}) is not None:
        mends.append("use --setting w4")
    if missing_bytes(_with_half_lengths(model), smallest, {}) is not None:
        mends.append("halve the longest prompt and max_tokens")
    return CapacityError(f"the model does not fit: {what}", mend=", or ".join(mends))


def _with_w4(model: CostModel) -> CostModel:
    shape = model.shape
    packed_bytes = ceil(shape.layer_compute_bytes * W4_BITS / (8 * shape.dtype_bytes))
    return replace(model, shape=replace(shape, layer_bytes=packed_bytes))


def _with_half_lengths(model: CostModel) -> CostModel:
    work = model.workload
    shorter = replace(
        work,
        num_shared_tokens=work.num_shared_tokens // 2,
        max_prompt_tokens=work.max_prompt_tokens // 2,
        max_own_tokens=work.max_own_tokens // 2,
    )
    return replace(model, workload=shorter)
