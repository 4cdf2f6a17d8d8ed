"""Memory that outlives the process that writes to it: what its successor must know, record by record.

Two anonymous memory files, made by the root process and inherited by each supervisor. One of them counts; the other is
where the next beginning is written, so that a process that dies while it writes leaves what was there. A record counts
once the length before it says so.
"""

from __future__ import annotations

import os
import struct

_HEAD = struct.Struct("<QQ")
"""Number of the beginning, and bytes of records that count."""
_LENGTH = struct.Struct("<Q")


class Chronicle:
    """Records, oldest first. One process writes at a time.

    >>> chronicle = Chronicle()
    >>> chronicle.begin(b"all so far")
    >>> chronicle.append(b"one more")
    >>> chronicle.records()
    [b'all so far', b'one more']
    >>> chronicle.begin(b"all")
    >>> chronicle.records(), chronicle.size_bytes
    ([b'all'], 11)
    >>> chronicle.close()
    """

    def __init__(self) -> None:
        self._fds = [os.memfd_create("flashrl-chronicle", os.MFD_CLOEXEC) for _ in range(2)]

    def _heads(self) -> list[tuple[int, int]]:
        return [_HEAD.unpack(os.pread(fd, _HEAD.size, 0) or bytes(_HEAD.size)) for fd in self._fds]

    def _newest(self) -> tuple[int, int, int]:
        """The file that counts, the number of its beginning, and its length."""
        heads = self._heads()
        index = heads.index(max(heads))
        return self._fds[index], *heads[index]

    @property
    def size_bytes(self) -> int:
        """How long the records are together."""
        return self._newest()[2]

    def append(self, record: bytes) -> None:
        """Add a record."""
        fd, number, size = self._newest()
        _write(fd, _HEAD.size + size, _LENGTH.pack(len(record)) + record)
        os.pwrite(fd, _HEAD.pack(number, size + _LENGTH.size + len(record)), 0)

    def begin(self, record: bytes) -> None:
        """Put one record in the place of all."""
        old, number, _ = self._newest()
        new = next(fd for fd in self._fds if fd != old)
        os.ftruncate(new, 0)
        _write(new, _HEAD.size, _LENGTH.pack(len(record)) + record)
        os.pwrite(new, _HEAD.pack(number + 1, _LENGTH.size + len(record)), 0)
        os.ftruncate(old, 0)

    def records(self) -> list[bytes]:
        """Return everything; empty before the first :meth:`begin`."""
        fd, _, size = self._newest()
        content = _read(fd, _HEAD.size, size)
        found: list[bytes] = []
        position = 0
        while position < size:
            (length,) = _LENGTH.unpack_from(content, position)
            position += _LENGTH.size + length
            found.append(content[position - length : position])
        return found

    def close(self) -> None:
        """Let go of the memory."""
        for fd in self._fds:
            os.close(fd)


def _write(fd: int, position: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # the kernel writes at most 2 GiB at once
        written = os.pwrite(fd, rest, position)
        rest, position = rest[written:], position + written


def _read(fd: int, position: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        parts.append(os.pread(fd, size, position))
        position, size = position + len(parts[-1]), size - len(parts[-1])
    return b"".join(parts)
