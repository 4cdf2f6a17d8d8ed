"""The shared-memory slot of a rank: its heartbeat and everything it needs to be reborn. It outlives the rank.

The agent creates one anonymous memory file (memfd) for each of its ranks; ranks and their replacements inherit the
descriptor. Nothing has a name in the file system, so nothing can be left behind. A slot has one writer (the rank) and
several readers (the agent, the other ranks of the node, the replacement).

Layout: one page of 8-byte header words, then fixed regions. Memory of a region is only used once it is written.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
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
    STRUCK = 9
    """Faults on purpose that have struck, appended before they do."""


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

    def __init__(self, fd: int, region_bytes: int) -> None:
        self.fd = fd
        self.region_bytes = region_bytes
        self._map = mmap.mmap(fd, _HEADER_BYTES + len(Region) * region_bytes)
        self._view = memoryview(self._map)
        self._words = self._view[:_HEADER_BYTES].cast("Q")

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
        self._view.release()
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

    def reset(self) -> None:
        """Forget everything but faults on purpose: the job starts again from its beginning, and is not struck again."""
        for word in Word:
            self._words[word] = 0
        for region in Region:
            if region is not Region.STRUCK:
                self.clear(region)

    # ------------------------------------------------------------------ regions
    def _start(self, region: Region) -> int:
        return _HEADER_BYTES + region * self.region_bytes

    def clear(self, region: Region) -> None:
        """Make a region empty."""
        _PREFIX.pack_into(self._map, self._start(region), 0, 0)

    def write(self, region: Region, parts: Sequence[Buffer]) -> None:
        """Replace a region's content with the concatenation of ``parts``.

        A reader sees the old content, nothing, or the whole new content: the length is set last and a checksum
        covers the bytes.

        Raises:
            SnapshotTooLargeError: the content does not fit; the region is empty then.
        """
        start = self._start(region)
        self.clear(region)
        size = sum(len(part) for part in parts)
        if size > self.region_bytes - _PREFIX.size:
            raise SnapshotTooLargeError(size, self.region_bytes - _PREFIX.size)
        position, checksum = start + _PREFIX.size, 0
        for part in parts:
            self._view[position : position + len(part)] = part
            checksum = zlib.crc32(part, checksum)
            position += len(part)
        _PREFIX.pack_into(self._map, start, size, checksum)

    def read(self, region: Region) -> bytes | None:
        """Return a region's content, or ``None`` when it is empty or was being written when its writer died."""
        start = self._start(region)
        size, checksum = _PREFIX.unpack_from(self._map, start)
        if size == 0 or size > self.region_bytes - _PREFIX.size:
            return None
        content = bytes(self._view[start + _PREFIX.size : start + _PREFIX.size + size])
        return content if zlib.crc32(content) == checksum else None

    def append(self, region: Region, record: Buffer) -> None:
        """Add one record to an appended region.

        Raises:
            SnapshotTooLargeError: the region is full; its content stays.
        """
        start = self._start(region)
        used, _ = _PREFIX.unpack_from(self._map, start)
        end = used + _PREFIX.size + len(record)
        if end > self.region_bytes - _PREFIX.size:
            raise SnapshotTooLargeError(end, self.region_bytes - _PREFIX.size)
        position = start + _PREFIX.size + used
        _PREFIX.pack_into(self._map, position, len(record), zlib.crc32(record))
        self._view[position + _PREFIX.size : position + _PREFIX.size + len(record)] = record
        _PREFIX.pack_into(self._map, start, end, 0)

    def records(self, region: Region) -> list[bytes]:
        """Return the complete records of an appended region, oldest first."""
        start = self._start(region)
        used, _ = _PREFIX.unpack_from(self._map, start)
        position, end = start + _PREFIX.size, start + _PREFIX.size + min(used, self.region_bytes - _PREFIX.size)
        found: list[bytes] = []
        while position + _PREFIX.size <= end:
            size, checksum = _PREFIX.unpack_from(self._map, position)
            record = bytes(self._view[position + _PREFIX.size : position + _PREFIX.size + size])
            if len(record) != size or zlib.crc32(record) != checksum:
                break
            found.append(record)
            position += _PREFIX.size + size
        return found
