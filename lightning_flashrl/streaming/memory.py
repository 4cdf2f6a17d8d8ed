"""A storage unit's memory, and how a process reads and writes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from lightning_flashrl.messaging.memory import PAGE_BYTES, Bytes, Memory

BLOCK_BYTES = 1 << 24
"""Extents are whole blocks; the first one holds the mark."""


def default_capacity_bytes() -> int:
    """Return a size that no unit outgrows: twice the host's memory. It is address space, not memory."""
    total = os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES
    return -(-2 * total // BLOCK_BYTES) * BLOCK_BYTES


class UnitAccess:
    """How one process reaches the bytes of one unit: through its memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @contextlib.contextmanager
    def writing(self, offset: int, num_bytes: int) -> Iterator[Bytes]:
        """Give ``[num_bytes]`` uint8 to write to; they are in the unit when the block ends without an error."""
        yield self.memory.array[offset : offset + num_bytes]

    def read(self, offsets: Sequence[int], ends: Sequence[int], into: Bytes) -> None:
        """Copy ranges out, one after the other."""
        source = self.memory.array
        at = 0
        for offset, end in zip(offsets, ends, strict=True):
            following = at + end - offset
            into[at:following] = source[offset:end]
            at = following

    def close(self) -> None:
        """Let go of the memory."""
        self.memory.close()
