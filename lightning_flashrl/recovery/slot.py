"""The shared-memory slot of a rank: its heartbeat and everything it needs to be reborn. It outlives the rank.

The agent creates one anonymous memory file (memfd) for each of its ranks; ranks and their replacements inherit the
descriptor. Nothing has a name in the file system, so nothing can be left behind. A slot has one writer (the rank) and
several readers (the agent, the other ranks of the node, the replacement).

Layout: one page of 8-byte header words, then regions at fixed places, each with room for as much as the machine could
hold. Memory of a region is only used once it is written. Only the header is mapped; regions are read and written by
system calls, so their size counts towards no limit of the process's address space, and a machine without free memory
answers with an error instead of a signal.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_flashrl import clock
from lightning_flashrl.errors import SnapshotTooLargeError

Buffer = bytes | bytearray | memoryview

_HEADER_BYTES = mmap.PAGESIZE
_PREFIX = struct.Struct("<QQ")
"""Length and checksum of a region's content."""


class RankState(enum.IntEnum):
    """What the process behind a slot is doing, as it says itself."""

    EMPTY = 0
    STARTING = 1
    SETUP = 2
    TRAINING = 3
    RESTORING = 4
    FINISHED = 5
    """``fit`` is over; the process may still run the user's script."""


class Word(enum.IntEnum):
    """Index of each 8-byte header word."""

    PID = 0
    INCARNATION = 1
    STATE = 2
    THREAD_BEAT_NS = 3
    LOOP_BEAT_NS = 4
    LOOP_BEATS = 5
    WAITING_SINCE_NS = 6
    """Non-zero while the program waits for other ranks; then a late loop beat is not its fault."""
    SEQ_ISSUED = 7
    GLOBAL_STEP = 8
    PHASE = 9
    STEP_TIME_NS = 10
    PAUSED = 11
    """Non-zero while the user suspended hang detection."""
    READY_TO_COMMIT = 12
    """Optimizer updates for which this rank has complete gradients and a published state."""
    COMMITTED = 13
    STOP_REQUESTED = 14
    QUORUM_ID = 15
    AWARE = 16
    """Non-zero once a flash strategy runs in the process; before, the agent treats it as a plain script."""
    LARGEST_GAP_NS = 17
    WATCHED_THREAD = 18
    """A thread whose end tells that the process is about to end; 0 where that must not be told early."""
    LOG_SHOWN = 19
    """Bytes of the process's log that its agent has shown."""


class Region(enum.IntEnum):
    """Named areas of a slot. The numbered ones are buffers that a resume point refers to."""

    COMMIT_A = 0
    COMMIT_B = 1
    MID_A = 2
    MID_B = 3
    STATIC = 4
    """What changes rarely: bucket layout, logger versions."""
    INDEX_A = 5
    INDEX_B = 6
    """The resume points, double-buffered; the newer complete one counts."""
    JOURNAL = 7
    """Results of the collectives of set-up, appended."""
    FILES = 8
    """Files created since the last commit, appended."""
    BULK_COMMIT_A = 9
    BULK_COMMIT_B = 10
    BULK_MID_A = 11
    BULK_MID_B = 12
    """Tensors that belong to the content of the buffer of that name."""
    STRUCK = 13
    """Faults on purpose that have struck, appended before they do."""
    RAISED = 14
    """What the process reported of an exception, for an agent that did not get the report."""

    @property
    def bulk(self) -> Region:
        """Where the tensors that belong to this buffer's content lie."""
        return _BULK_OF[self]


_BULK_OF = {
    Region.COMMIT_A: Region.BULK_COMMIT_A,
    Region.COMMIT_B: Region.BULK_COMMIT_B,
    Region.MID_A: Region.BULK_MID_A,
    Region.MID_B: Region.BULK_MID_B,
}


@dataclass(slots=True)
class _Usage:
    """How much of a region holds memory, as far as its writer knows."""

    held_bytes: int = 0
    recent_bytes: int = 0
    """Most that a recent write needed."""
    num_recent: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One look at a rank's sign of life. Times are nanoseconds of the host's monotonic clock; 0 means never."""

    pid: int
    incarnation: int
    state: RankState
    thread_beat_ns: int
    loop_beat_ns: int
    loop_beats: int
    waiting_since_ns: int
    seq_issued: int
    global_step: int
    phase: int
    step_time_ns: int
    largest_gap_ns: int
    is_paused: bool
    is_aware: bool


class RankSlot:
    """One rank's shared memory.

    Args:
        fd: descriptor of a memory file made by :meth:`create`.
        region_bytes: capacity of each region; the same number that :meth:`create` was given.
    """

    NUM_RECENT_WRITES = 16
    """Writes after which memory that none of them needed is given back."""
    SPARE_BYTES = 1 << 20
    """Less than this is not worth giving back."""

    def __init__(self, fd: int, region_bytes: int) -> None:
        self.fd = fd
        self.region_bytes = region_bytes
        self._map = mmap.mmap(fd, _HEADER_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._usage: dict[Region, _Usage] = {}

    @staticmethod
    def create(global_rank: int, region_bytes: int) -> int:
        """Make an anonymous memory file for one slot and return its inheritable descriptor."""
        fd = os.memfd_create(f"flashrl-rank{global_rank}")
        os.set_inheritable(fd, True)
        os.ftruncate(fd, _HEADER_BYTES + len(Region) * region_bytes)
        return fd

    def close(self) -> None:
        """Unmap the memory; the descriptor stays open."""
        self._words.release()
        self._map.close()

    # ------------------------------------------------------------------ header
    def __getitem__(self, word: Word) -> int:
        return self._words[word]

    def __setitem__(self, word: Word, value: int) -> None:
        self._words[word] = value

    def beat_loop(self) -> None:
        """Say that the program advanced (called by the training loop)."""
        words, now = self._words, clock.now_ns()
        last = words[Word.LOOP_BEAT_NS]
        if last and not words[Word.WAITING_SINCE_NS] and now - last > words[Word.LARGEST_GAP_NS]:
            words[Word.LARGEST_GAP_NS] = now - last
        words[Word.LOOP_BEAT_NS] = now
        words[Word.LOOP_BEATS] += 1

    def begin_phase(self, phase: int, global_step: int) -> None:
        """Say that the program advanced to a phase of a step."""
        self.beat_loop()
        self._words[Word.PHASE] = phase
        self._words[Word.GLOBAL_STEP] = global_step

    def beat_thread(self) -> None:
        """Say that the interpreter runs (called by a thread; stops when something holds the GIL)."""
        self._words[Word.THREAD_BEAT_NS] = clock.now_ns()

    def heartbeat(self) -> Heartbeat:
        """Read the header."""
        w = self._words
        return Heartbeat(
            pid=w[Word.PID],
            incarnation=w[Word.INCARNATION],
            state=RankState(w[Word.STATE]),
            thread_beat_ns=w[Word.THREAD_BEAT_NS],
            loop_beat_ns=w[Word.LOOP_BEAT_NS],
            loop_beats=w[Word.LOOP_BEATS],
            waiting_since_ns=w[Word.WAITING_SINCE_NS],
            seq_issued=w[Word.SEQ_ISSUED],
            global_step=w[Word.GLOBAL_STEP],
            phase=w[Word.PHASE],
            step_time_ns=w[Word.STEP_TIME_NS],
            largest_gap_ns=w[Word.LARGEST_GAP_NS],
            is_paused=bool(w[Word.PAUSED]),
            is_aware=bool(w[Word.AWARE]),
        )

    def begin_incarnation(self, pid: int, incarnation: int) -> None:
        """Hand the slot to a new process: the heartbeat starts anew, the published state stays."""
        keep = (Word.READY_TO_COMMIT, Word.COMMITTED, Word.LARGEST_GAP_NS, Word.STEP_TIME_NS)
        for word in Word:
            if word not in keep:
                self._words[word] = 0
        self._words[Word.PID] = pid
        self._words[Word.INCARNATION] = incarnation
        self._words[Word.STATE] = RankState.STARTING
        self._words[Word.THREAD_BEAT_NS] = clock.now_ns()
        self.clear(Region.RAISED)

    def reset(self) -> None:
        """Forget everything but faults on purpose: the job starts again from its beginning, and is not struck again.

        The memory is given back.
        """
        struck = self.records(Region.STRUCK)
        for word in Word:
            self._words[word] = 0
        os.ftruncate(self.fd, _HEADER_BYTES)
        os.ftruncate(self.fd, _HEADER_BYTES + len(Region) * self.region_bytes)
        self._usage.clear()
        for record in struck:
            self.append(Region.STRUCK, record)

    # ------------------------------------------------------------------ regions
    def _start(self, region: Region) -> int:
        return _HEADER_BYTES + region * self.region_bytes

    def clear(self, region: Region) -> None:
        """Make a region empty."""
        self._set_prefix(region, 0, 0)

    def _set_prefix(self, region: Region, size: int, checksum: int) -> None:
        _write_at(self.fd, _PREFIX.pack(size, checksum), self._start(region))

    def _prefix(self, region: Region) -> tuple[int, int]:
        size, checksum = _PREFIX.unpack(os.pread(self.fd, _PREFIX.size, self._start(region)))
        return size, checksum

    def write(
        self,
        region: Region,
        parts: Sequence[Buffer],
        bulk: Iterable[tuple[int, Buffer]] = (),
        bulk_bytes: int = 0,
    ) -> None:
        """Replace a region's content with the concatenation of ``parts``, and pieces of the bulk that belongs to it.

        A reader sees the old content, nothing, or the whole new content: the region is emptied first and its length
        set last, and a checksum covers ``parts``. No checksum covers the bulk, which would cost more than its copy.
        It needs none: bulk is read only by way of a content, and while it is being written there is no content. What
        was there before is in the other buffer, with a bulk of its own.

        Args:
            region: where to.
            parts: the new content.
            bulk: (offset, bytes) of the pieces that changed since this region was last written; the others stay.
            bulk_bytes: where the bulk ends, written pieces and others.

        Raises:
            SnapshotTooLargeError: it does not fit; the old content is still there then.
        """
        size = sum(len(part) for part in parts)
        if size > self.region_bytes - _PREFIX.size:
            raise SnapshotTooLargeError(size, self.region_bytes - _PREFIX.size)
        if bulk_bytes > self.region_bytes:
            raise SnapshotTooLargeError(bulk_bytes, self.region_bytes)
        self.clear(region)
        if region in _BULK_OF:
            start = self._start(region.bulk)
            for offset, piece in bulk:
                _write_at(self.fd, piece, start + offset)
            self._note_use(region.bulk, bulk_bytes)
        position, checksum = self._start(region) + _PREFIX.size, 0
        for part in parts:
            _write_at(self.fd, part, position)
            checksum = zlib.crc32(part, checksum)
            position += len(part)
        self._set_prefix(region, size, checksum)
        self._note_use(region, _PREFIX.size + size)

    def _note_use(self, region: Region, size: int) -> None:
        """Give back what lies behind ``size``, once no recent write needed it."""
        usage = self._usage.setdefault(region, _Usage())
        usage.held_bytes = max(usage.held_bytes, size)
        usage.recent_bytes = max(usage.recent_bytes, size)
        usage.num_recent += 1
        if usage.num_recent < self.NUM_RECENT_WRITES:
            return
        kept = -(-usage.recent_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if usage.held_bytes - kept >= max(self.SPARE_BYTES, kept):
            start = self._start(region) + kept
            with mmap.mmap(self.fd, usage.held_bytes - kept, offset=start) as spare:
                spare.madvise(mmap.MADV_REMOVE)
            usage.held_bytes = kept
        usage.recent_bytes = usage.num_recent = 0

    def read(self, region: Region) -> bytes | None:
        """Return a region's content, or ``None`` when it is empty or was being written when its writer died."""
        size, checksum = self._prefix(region)
        if size == 0 or size > self.region_bytes - _PREFIX.size:
            return None
        content = bytearray(size)
        _read_into(self.fd, memoryview(content), self._start(region) + _PREFIX.size)
        return bytes(content) if zlib.crc32(content) == checksum else None

    def read_bulk(self, region: Region, offset: int, target: memoryview) -> None:
        """Fill ``target`` from the bulk that belongs to a region's content."""
        _read_into(self.fd, target, self._start(region.bulk) + offset)

    def append(self, region: Region, record: Buffer) -> None:
        """Add one record to an appended region.

        Raises:
            SnapshotTooLargeError: the region is full; its content stays.
        """
        used, _ = self._prefix(region)
        end = used + _PREFIX.size + len(record)
        if end > self.region_bytes - _PREFIX.size:
            raise SnapshotTooLargeError(end, self.region_bytes - _PREFIX.size)
        position = self._start(region) + _PREFIX.size + used
        _write_at(self.fd, _PREFIX.pack(len(record), zlib.crc32(record)), position)
        _write_at(self.fd, record, position + _PREFIX.size)
        self._set_prefix(region, end, 0)

    def records(self, region: Region) -> list[bytes]:
        """Return the complete records of an appended region, oldest first."""
        used, _ = self._prefix(region)
        content = memoryview(bytearray(min(used, self.region_bytes - _PREFIX.size)))
        _read_into(self.fd, content, self._start(region) + _PREFIX.size)
        found: list[bytes] = []
        position = 0
        while position + _PREFIX.size <= len(content):
            size, checksum = _PREFIX.unpack_from(content, position)
            record = bytes(content[position + _PREFIX.size : position + _PREFIX.size + size])
            if len(record) != size or zlib.crc32(record) != checksum:
                break
            found.append(record)
            position += _PREFIX.size + size
        return found


def _write_at(fd: int, content: Buffer, position: int) -> None:
    rest = memoryview(content)
    while rest:  # the kernel writes at most 2 GiB at once
        written = os.pwrite(fd, rest, position)
        rest, position = rest[written:], position + written


def _read_into(fd: int, target: memoryview, position: int) -> None:
    while target:
        count = os.preadv(fd, [target], position)
        if count == 0:
            raise EOFError(f"the slot ends {len(target)} bytes before the content that it should hold")
        target, position = target[count:], position + count
