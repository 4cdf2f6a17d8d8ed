"""What a queue must know again when its process is gone: every change of its rows, in a file that only grows.

::

    magic · header (fields, tasks) · record · record · …        record = length, CRCs of message and of this, message

A record is written before the change that it tells is made, and before anybody is answered; so a change that was
answered is there, and one that could not be written did not happen. What the process has written survives it: the
kernel has it. Against the loss of the machine nothing is synchronized.

The last record may be cut short, if the process died while it wrote: it is left out, nobody was told of it. Anything
else that does not fit is damage, and said.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from lightning_flashrl.errors import ConfigurationError, JournalError
from lightning_flashrl.streaming.ledger import Origin

_MAGIC = b"flashrl queue journal 2\n"
_FRAME = struct.Struct("<III")


class _Record(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all records; the class name is the tag."""


class FieldData(msgspec.Struct, frozen=True, array_like=True):
    """A field of some rows.

    Attributes:
        name: of the field.
        lengths: int64, entries of each row.
        values: the rows' bytes, one after the other.
        tags: the values, if samplers may look at them.
    """

    name: str
    lengths: bytes
    values: bytes
    tags: bytes | None


class Put(_Record, frozen=True):
    """Fields were written. Rows are int64; those that are not known yet are new.

    Attributes:
        rows: which.
        fields: what.
        origin: who asked for it, and the number of the request.
        done_by: the task that was done with these rows in the same instant.
    """

    rows: bytes
    fields: tuple[FieldData, ...]
    origin: Origin = None
    done_by: str | None = None


class Leased(_Record, frozen=True):
    """Rows were leased; see :class:`~lightning_flashrl.streaming.ledger.LeaseRecord`."""

    lease_id: int
    task: str
    owner: str
    rows: bytes
    fields: tuple[str, ...]
    timeout_s: float
    origin: Origin = None


class Released(_Record, frozen=True):
    """Rows are no longer leased for a task."""

    task: str
    rows: bytes
    origin: Origin = None


class Commit(_Record, frozen=True):
    """A task is done with rows."""

    task: str
    rows: bytes
    origin: Origin = None
    is_stale: bool = False


class Clear(_Record, frozen=True):
    """Rows were forgotten."""

    rows: bytes
    origin: Origin = None


class Answered(_Record, frozen=True):
    """What a request was answered, of which nothing else is left here.

    Attributes:
        owner: who asked.
        number: of the request.
        rows: that it put.
        lease_id: that it got; 0 for none.
    """

    owner: str
    number: int
    rows: bytes
    lease_id: int


class Close(_Record, frozen=True):
    """No new rows will come."""


class Totals(_Record, frozen=True):
    """What had passed when the file was written anew: it counts, whatever stands before it.

    Attributes:
        queue_id: by which a client knows the queue again.
        next_row: number of the next new row.
        num_put: rows put.
        num_cleared: rows gone.
        num_committed: rows that each task has committed.
        num_stale: rows that each task's sampler has found too old.
        num_dropped: rows that were cleared before each task had committed them.
    """

    queue_id: str
    next_row: int
    num_put: int
    num_cleared: int
    num_committed: dict[str, int]
    num_stale: dict[str, int]
    num_dropped: dict[str, int]


class Note(_Record, frozen=True):
    """What the application has to say. The last one counts."""

    payload: bytes


Record: TypeAlias = Put | Leased | Released | Commit | Clear | Answered | Close | Totals | Note


class Header(msgspec.Struct, frozen=True):
    """Of which queue a journal is.

    Attributes:
        fields: name, type and shape of each, as text.
        tasks: their names.
        clear_consumed: whether rows go once all tasks have committed them.
    """

    fields: tuple[str, ...]
    tasks: tuple[str, ...]
    clear_consumed: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class Journal:
    """The file.

    Args:
        path: of the file; made if it is not there.
        header: of the queue.

    Attributes:
        size_bytes: of the file.
        num_torn_bytes: of a last record that was cut short, and is left out.

    Raises:
        JournalError: it is damaged, or another process writes to it, or it cannot be written.
        ConfigurationError: it is another queue's, or no journal at all.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.size_bytes = 0
        self.num_torn_bytes = 0
        self._header = header
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(str(path), f"cannot be opened ({error})") from error
        try:
            self._lock(self._fd)
            _remove_unfinished(path)
            self._begin()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(str(self.path), "is written by another queue; end that first") from error

    def _begin(self) -> None:
        head = _head(self._header)
        found = os.pread(self._fd, len(head), 0)
        if len(found) < len(head) and head.startswith(found):  # new, or its maker died while it wrote this
            self._write(head)
        elif found == head:
            self.size_bytes = len(head)
        elif found.startswith(_MAGIC):
            raise ConfigurationError(
                f"{self.path} is the journal of a queue with other fields or tasks; give the same ones, or another path"
            )
        else:
            raise ConfigurationError(f"{self.path} is no journal of a queue; give another path")

    # ------------------------------------------------------------------ reading
    def records(self) -> Iterator[Record]:
        """Iterate over all records, once, before the first is appended.

        Raises:
            JournalError: one in the middle is damaged.
        """
        end = os.fstat(self._fd).st_size
        with open(self.path, "rb") as file:
            file.seek(self.size_bytes)
            while self.size_bytes < end:
                body = self._body(file, end - self.size_bytes)
                if body is None:
                    self.num_torn_bytes = end - self.size_bytes
                    os.ftruncate(self._fd, self.size_bytes)
                    return
                yield _decode(body)
                self.size_bytes += _FRAME.size + len(body)

    def _body(self, file: IO[bytes], left: int) -> bytes | None:
        """Return the next record; ``None`` if the file ends before it does."""
        frame = file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        length, crc, frame_crc = _FRAME.unpack(frame)
        if zlib.crc32(frame[:8]) == frame_crc:
            body = file.read(length)
            if len(body) < length:
                return None
            if zlib.crc32(body) == crc:
                return body
        raise JournalError(
            str(self.path),
            f"is damaged at byte {self.size_bytes}, and {left} bytes follow; to go on without them, cut it there: "
            f"truncate -s {self.size_bytes} {self.path}",
        )

    # ------------------------------------------------------------------ writing
    def append(self, record: Record) -> None:
        """Write a record.

        Raises:
            JournalError: it could not be written, and nothing of it is there.
        """
        self._write(_framed(record))

    def _write(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:] if done else data, self.size_bytes + done)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size_bytes)
            raise JournalError(str(self.path), f"cannot be written ({error})") from error
        self.size_bytes += len(data)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Put these records in the place of all others, at once.

        Raises:
            JournalError: they could not be written; the file is as it was.
        """
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        before = self._fd, self.size_bytes
        try:
            self._fd, self.size_bytes = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), 0
            try:
                self._lock(self._fd)
                self._write(_head(self._header))
                for record in records:
                    self.append(record)
                beside.replace(self.path)
            except BaseException:
                os.close(self._fd)
                beside.unlink(missing_ok=True)
                raise
        except BaseException as error:
            self._fd, self.size_bytes = before
            if isinstance(error, OSError):
                raise JournalError(str(self.path), f"cannot be written anew ({error})") from error
            raise
        os.close(before[0])

    def close(self) -> None:
        """Let go of the file, which stays."""
        os.close(self._fd)


def remove_journal(path: Path) -> None:
    """Remove a journal that nobody needs any more, and what was left of it when it was rewritten."""
    path.unlink(missing_ok=True)
    _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    """Whoever rewrote the journal was killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def whole(header: Header, records: Iterable[Record]) -> bytes:
    """Return a journal that holds these records."""
    return b"".join([_head(header), *map(_framed, records)])


def _head(header: Header) -> bytes:
    return _MAGIC + _framed(header)


def _framed(message: msgspec.Struct) -> bytes:
    body = _encode(message)
    sums = struct.pack("<II", len(body), zlib.crc32(body))
    return sums + struct.pack("<I", zlib.crc32(sums)) + body
