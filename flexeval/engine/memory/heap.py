"""What the C library keeps of memory that was freed, where a CPU computes. Knows glibc; nothing of what is allocated.

A layer's temporaries are megabytes each. By default glibc gives them back to the system as they are freed, and the next
layer touches every page anew: a tenth of the time of a small model's prompts.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of malloc.h."""
KEPT_BYTES = 2**30
"""Free memory at the heap's end that is not given back: what a layer call takes of a model that is small."""
LARGEST_BYTES = 2**25
"""From here on each allocation is a mapping of its own: more glibc does not put in its heap."""


def keep_freed() -> None:
    """Let this process keep what it frees, up to a GiB. Harmless when done again, and with another C library."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, LARGEST_BYTES)
        library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Give all back that is free."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
