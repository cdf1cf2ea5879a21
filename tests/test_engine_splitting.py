"""Parts of a product: what was measured to be the fastest, and what holds for all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.engine.codecs.splitting import num_parts

H200 = 132
"""Its multiprocessors."""


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "num_resident", "fastest"),
    [
        (7168, 7168, 3, 7),
        (7168, 28672, 3, 7),
        (28672, 7168, 3, 4),
        (8192, 8192, 3, 6),
        (4096, 4096, 2, 8),
        (5120, 5120, 3, 6),
        (1024, 8192, 4, 16),
        (28672, 8192, 2, 1),
    ],
)
def test_the_fastest_number_of_parts_is_found(
    num_outputs: int, num_inputs: int, num_resident: int, fastest: int
) -> None:
    """Measured with 24, 64 or 128 tokens, programs of 128 outputs and steps of 128 inputs."""
    parts = num_parts(num_outputs // 128, num_inputs // 128, num_processors=H200, num_resident=num_resident)
    assert parts == fastest


@given(st.integers(1, 3000), st.integers(0, 1000), st.integers(1, 200), st.integers(1, 8))
def test_parts_are_never_empty(num_blocks: int, num_steps: int, num_processors: int, num_resident: int) -> None:
    parts = num_parts(num_blocks, num_steps, num_processors=num_processors, num_resident=num_resident)
    assert 1 <= parts <= max(1, num_steps)
    if num_blocks >= 50 * num_processors:
        assert parts <= math.ceil(num_resident / 2), "what fills the device many times over is hardly cut"
