"""Types of numbers, as our code for the CPU counts them (`host_vectors.h`)."""

from __future__ import annotations

import torch

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
