"""glibc's allocator, told that what was taken from the kernel will be needed again.

By default it gives the top of the heap back to the kernel as soon as more is free there than twice the largest block
that was ever freed. A training step frees its activations, so it may give back most of them, step after step, and take
them anew: a few hundred to a thousand page faults a step, about a microsecond each.

A replacement pays more: parameters, optimizer state, gradients and buckets are all memory that its process has never
touched, and a page that the host must find for a virtual machine costs several microseconds. A process on standby has
nothing else to do, so it touches as much as a rank holds, and frees it: its program then gets it from the allocator.
Then it takes copies of its own of the pages that it shares with the process that it was forked from.

Source: mallopt(3), ``M_TRIM_THRESHOLD``, ``M_MMAP_THRESHOLD`` and ``M_ARENA_MAX``; madvise(2), ``MADV_POPULATE_WRITE``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

KEPT_BYTES = 512 << 20
"""What a process keeps at least."""
_LARGEST_HEAP_BLOCK_BYTES = 32 << 20
"""The most that glibc allows; larger blocks are mapped and given back one by one."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MAX_INT = (1 << 31) - 1
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
_BLOCK_BYTES = 4 << 20
_POPULATE_WRITE = 23
_MOST = 0.8

_kept_bytes = 0


def keep_freed_memory(num_bytes: int = KEPT_BYTES) -> bool:
    """Let this process keep that much freed memory, never less than it was told earlier; return whether it does.

    Nothing happens where the user has set the allocator by one of glibc's environment variables, or where there is no
    glibc.
    """
    global _kept_bytes
    if any(name in os.environ for name in _USERS_OWN):
        return False
    kept_bytes = min(max(num_bytes, KEPT_BYTES, _kept_bytes), _MAX_INT)
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK_BYTES) and mallopt(_TRIM_THRESHOLD, kept_bytes):
            _kept_bytes = kept_bytes
            return True
    return False


def anonymous_bytes(pid: int | str) -> int:
    """Resident memory of a process that is no file's; 0 when there is no such process."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            status = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    _, _, rest = status.partition(b"RssAnon:")
    return int(rest.split(maxsplit=1)[0]) << 10 if rest else 0


def _available_bytes() -> int:
    with open("/proc/meminfo", "rb", buffering=0) as file:
        _, _, rest = file.read().partition(b"MemAvailable:")
    return int(rest.split(maxsplit=1)[0]) << 10 if rest else 0


def _written_ranges() -> list[tuple[int, int]]:
    """Start and size of this process's private memory, in pieces, where most of a mapping has been written to."""
    pieces: list[tuple[int, int]] = []
    with open("/proc/self/smaps", "rb") as file:
        for line in file:
            words = line.split()
            if b"-" in words[0]:
                start, end = (int(number, 16) for number in words[0].split(b"-"))
                is_private = words[1] == b"rw-p" and b"[stack]" not in line
            elif words[0] == b"Anonymous:" and is_private and int(words[1]) << 10 > _MOST * (end - start):
                pieces += [(place, min(_BLOCK_BYTES, end - place)) for place in range(start, end, _BLOCK_BYTES)]
    return pieces


class WarmHeap:
    """Memory that is touched ahead of need, block by block, and then left to the allocator."""

    MAX_BYTES = 1 << 30

    def __init__(self) -> None:
        self._wanted_bytes = 0
        self._shared: list[tuple[int, int]] | None = None
        self._blocks: list[int] = []

    @property
    def is_cold(self) -> bool:
        """Whether there is more to touch."""
        return bool(self._shared) or self._num_bytes < self._wanted_bytes

    @property
    def _num_bytes(self) -> int:
        return len(self._blocks) * _BLOCK_BYTES

    def grow_to(self, num_bytes: int) -> None:
        """Want the process to hold that much, together with what it holds anyway."""
        own_bytes = anonymous_bytes("self") - self._num_bytes
        wanted_bytes = min(num_bytes - own_bytes, self.MAX_BYTES, _available_bytes() // 4)
        if wanted_bytes > self._wanted_bytes + _BLOCK_BYTES and keep_freed_memory(2 * wanted_bytes):
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)  # other threads of the program use the same memory
            self._wanted_bytes = wanted_bytes
            if self._shared is None:
                self._shared = _written_ranges()

    def touch(self) -> None:
        """Take one block, or copy one."""
        libc = ctypes.CDLL(None)
        if self._num_bytes >= self._wanted_bytes and self._shared:
            start, size = self._shared.pop()
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _POPULATE_WRITE)  # before Linux 5.14: nothing
            return
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        block = libc.malloc(_BLOCK_BYTES)
        if not block:
            self._wanted_bytes = 0
            return
        ctypes.memset(block, 0, _BLOCK_BYTES)
        self._blocks.append(block)

    def release(self) -> None:
        """Leave all of it to the allocator, which keeps it."""
        libc = ctypes.CDLL(None)
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        for block in self._blocks:
            libc.free(block)
        self._blocks.clear()
        self._wanted_bytes = 0
