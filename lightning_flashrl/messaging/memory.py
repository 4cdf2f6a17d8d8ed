"""Memory that processes of one host share: a sparse file without a name.

It is gone when the last process that maps it is. The descriptor of the process that made it is the way in for others; a
mark at its beginning tells them that they have found the right one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

PAGE_BYTES = mmap.PAGESIZE
MARK_BYTES = 16
Bytes: TypeAlias = npt.NDArray[np.uint8]


class Memory:
    """The file, mapped into this process.

    Attributes:
        fd: the file, if this process made it.
        array: ``[capacity]`` uint8, all of it.
    """

    def __init__(self, fd: int, capacity_bytes: int, *, is_owner: bool) -> None:
        self.fd = fd
        self.capacity_bytes = capacity_bytes
        self._is_owner = is_owner
        self._map = mmap.mmap(fd, capacity_bytes, mmap.MAP_SHARED)
        self.array: Bytes = np.frombuffer(self._map, dtype=np.uint8)

    @classmethod
    def create(cls, capacity_bytes: int) -> Memory:
        """Make the file. None of its memory is taken before it is written."""
        fd = os.memfd_create("flashrl", os.MFD_CLOEXEC)
        os.ftruncate(fd, capacity_bytes)
        return cls(fd, capacity_bytes, is_owner=True)

    @classmethod
    def attach(cls, pid: int, fd: int, capacity_bytes: int) -> Memory:
        """Map a file that another process on this host has made.

        Raises:
            OSError: that process is gone, on another host, or another user's.
        """
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(opened).st_size != capacity_bytes:
                raise FileNotFoundError(f"/proc/{pid}/fd/{fd} is another file")
            return cls(opened, capacity_bytes, is_owner=False)
        finally:
            os.close(opened)

    def forget(self, offset: int, size: int) -> None:
        """Give pages back; they read as zero from now on."""
        self._map.madvise(mmap.MADV_REMOVE, offset, size)

    def resident_bytes(self) -> int:
        """Return how much memory the file takes."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Let go of the memory; views of it that somebody still has stay valid."""
        if self._is_owner and self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self.array = np.zeros(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


def make_memory(capacity_bytes: int) -> tuple[Memory, bytes]:
    """Make a file with a mark at its beginning."""
    memory = Memory.create(capacity_bytes)
    mark = secrets.token_bytes(MARK_BYTES)
    memory.array[:MARK_BYTES] = np.frombuffer(mark, np.uint8)
    return memory, mark


def attach_memory(pid: int, fd: int, capacity_bytes: int, mark: bytes) -> Memory:
    """Map a file that another process on this host has made, and check its mark.

    Raises:
        OSError: it cannot be mapped from here.
    """
    memory = Memory.attach(pid, fd, capacity_bytes)
    if memory.array[:MARK_BYTES].tobytes() != mark:
        memory.close()
        raise FileNotFoundError(f"process {pid} here holds another file")
    return memory
