"""glibc's allocator keeps the memory that a step frees: the next step needs as much again.

By default it gives the top of the heap back to the kernel as soon as more is free there than twice the largest block
that was ever freed. A training step frees its activations, so it may give back most of them, step after step, and pay
for it with page faults: on a CPU a few hundred to a thousand a step, about a microsecond each.

Source: mallopt(3), ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

KEPT_BYTES = 512 << 20
"""What a process keeps at most."""
_LARGEST_HEAP_BLOCK_BYTES = 32 << 20
"""The most that glibc allows; larger blocks are mapped and given back one by one."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Set the allocator of this process; return whether that was done.

    Nothing happens where the user has set it by one of glibc's environment variables, or where there is no glibc.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return False
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK_BYTES) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
    return False
