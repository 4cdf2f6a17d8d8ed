"""The data plane: where the bytes of rows lie, and how they get in and out.

A storage unit is one sparse file in memory that has no name, so nothing remains of it when its last process ends. Who
writes is granted an *extent* of it, fills that from the front without asking again, and tells the control plane where
each row lies; who reads copies the bytes out. On one host both map the unit's memory: a row is copied once on the way
in and once on the way out, and no byte of it passes a socket or the control plane.

An extent is used again when all its rows are gone. Pages of the few extents kept for that stay; all others are given
back to the operating system, also the pages between living rows of an extent that is mostly dead.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.messaging.memory import PAGE_BYTES, Bytes
from lightning_flashrl.streaming.ledger import Written
from lightning_flashrl.streaming.memory import BLOCK_BYTES, UnitAccess
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.schema import Column, Lengths, Schema

_UNIT_SHIFT = 44
_OFFSET_MASK = (1 << _UNIT_SHIFT) - 1
_ALIGNMENT = 64
_NUM_KEPT_BLOCKS = 2
"""Free blocks of a unit whose pages stay: a page costs more when it is touched for the first time than a row's copy."""


def place(unit: int, offset: int) -> int:
    """Return the one number that says where something lies."""
    return unit << _UNIT_SHIFT | offset


_PlaceT = TypeVar("_PlaceT", int, Rows)


def unit_of(where: _PlaceT) -> _PlaceT:
    """Return the unit of a place, or of many."""
    return where >> _UNIT_SHIFT


# --------------------------------------------------------------------------- who may write where
@dataclass(slots=True)
class Extent:
    """Blocks of one unit that one writer fills.

    Attributes:
        place: where they begin.
        size_bytes: how long they are.
        owner: who writes.
        live_bytes: what readers may still read.
        is_sealed: whether the writer is done with them.
    """

    place: int
    size_bytes: int
    owner: str
    live_bytes: int = 0
    is_sealed: bool = False
    dead: list[tuple[Rows, Rows]] = field(default_factory=list)
    dead_bytes: int = 0


class Allocator:
    """Hands out extents of a unit and notices when they can be used again.

    Args:
        unit: its number.
        capacity_bytes: its size.
        forget: gives pages back, by offset and size.
    """

    def __init__(self, unit: int, capacity_bytes: int, forget: Callable[[int, int], None]) -> None:
        self._unit = unit
        self._forget = forget
        self._is_free = np.ones(capacity_bytes // BLOCK_BYTES, dtype=np.bool_)
        self._is_free[0] = False  # there stands the mark of the unit
        self._kept: list[int] = []
        self._extents: dict[int, Extent] = {}  # by each of its blocks

    def grant(self, num_bytes: int, owner: str) -> Extent:
        """Give a writer room.

        Raises:
            ConfigurationError: there is none.
        """
        num_blocks = max(1, -(-num_bytes // BLOCK_BYTES))
        if num_blocks >= len(self._is_free):
            raise self._no_room(num_blocks)
        first = self._kept.pop() if num_blocks == 1 and self._kept else self._first_run(num_blocks)
        self._kept = [block for block in self._kept if not first <= block < first + num_blocks]
        self._is_free[first : first + num_blocks] = False
        extent = Extent(place(self._unit, first * BLOCK_BYTES), num_blocks * BLOCK_BYTES, owner)
        self._extents.update(dict.fromkeys(range(first, first + num_blocks), extent))
        return extent

    def _first_run(self, num_blocks: int) -> int:
        free = self._is_free.astype(np.int32)
        if num_blocks == 1:
            first = int(free.argmax())
            if free[first]:
                return first
        else:
            sums = np.convolve(free, np.ones(num_blocks, np.int32), "valid")
            found = np.flatnonzero(sums == num_blocks)
            if len(found):
                return int(found[0])
        raise self._no_room(num_blocks)

    def _no_room(self, num_blocks: int) -> ConfigurationError:
        return ConfigurationError(
            f"a storage unit of {len(self._is_free) * BLOCK_BYTES} bytes has no {num_blocks * BLOCK_BYTES} bytes in a "
            "row left; bound the queue with max_bytes, or commit and clear rows sooner"
        )

    def find(self, where: int) -> Extent | None:
        """Return the extent in which a place lies."""
        return self._extents.get((where & _OFFSET_MASK) // BLOCK_BYTES)

    def extents(self) -> list[Extent]:
        """Return all extents in use."""
        return list({id(extent): extent for extent in self._extents.values()}.values())

    def add(self, extent: Extent, num_bytes: int) -> None:
        """Count bytes that have become readable."""
        extent.live_bytes += num_bytes

    def seal(self, extent: Extent) -> None:
        """Take note that the writer is done."""
        extent.is_sealed = True
        self._reuse(extent)

    def free(self, places: Rows, sizes: Rows) -> None:
        """Take note of bytes that nobody will read again. Sizes are above zero."""
        blocks = (places & _OFFSET_MASK) // BLOCK_BYTES
        if (blocks == blocks[0]).all():
            self._free_in(self._extents[int(blocks[0])], places, sizes)
            return
        for block in np.unique(blocks).tolist():
            here = blocks == block
            self._free_in(self._extents[block], places[here], sizes[here])

    def _free_in(self, extent: Extent, places: Rows, sizes: Rows) -> None:
        num_bytes = int(sizes.sum())
        extent.live_bytes -= num_bytes
        extent.dead.append((places, sizes))
        extent.dead_bytes += num_bytes
        self._reuse(extent)

    def _reuse(self, extent: Extent) -> None:
        if not extent.is_sealed:
            return
        if extent.live_bytes == 0:
            self._take_back(extent)
        elif extent.dead_bytes > extent.size_bytes // 8 and extent.live_bytes < extent.size_bytes // 2:
            self._forget_dead_pages(extent)

    def _take_back(self, extent: Extent) -> None:
        first = (extent.place & _OFFSET_MASK) // BLOCK_BYTES
        for block in range(first, first + extent.size_bytes // BLOCK_BYTES):
            del self._extents[block]
            self._is_free[block] = True
            if len(self._kept) < _NUM_KEPT_BLOCKS:
                self._kept.append(block)
            else:
                self._forget(block * BLOCK_BYTES, BLOCK_BYTES)

    def _forget_dead_pages(self, extent: Extent) -> None:
        """Give back the pages of which every byte is dead."""
        num_pages = extent.size_bytes // PAGE_BYTES
        starts = np.concatenate([places for places, _ in extent.dead]) - extent.place
        ends = starts + np.concatenate([sizes for _, sizes in extent.dead])
        num_dead = np.zeros(num_pages + 1, np.int64)  # dead bytes by page; whole pages by differences, ends one by one
        first, last = starts // PAGE_BYTES, ends // PAGE_BYTES
        np.add.at(num_dead, first, PAGE_BYTES)
        np.add.at(num_dead, last, -PAGE_BYTES)
        num_dead = np.cumsum(num_dead)
        np.add.at(num_dead, first, -(starts % PAGE_BYTES))
        np.add.at(num_dead, last, ends % PAGE_BYTES)
        is_dead = num_dead[:num_pages] >= PAGE_BYTES
        edges = np.flatnonzero(np.diff(np.concatenate(([False], is_dead, [False])).astype(np.int8)))
        base = extent.place & _OFFSET_MASK
        for start, end in edges.reshape(-1, 2).tolist():
            self._forget(base + start * PAGE_BYTES, (end - start) * PAGE_BYTES)
        # Pages that are only partly dead stay in the account.
        is_partial = ~is_dead[first] | ~is_dead[(ends - 1) // PAGE_BYTES]
        extent.dead = [(starts[is_partial] + extent.place, (ends - starts)[is_partial])]
        extent.dead_bytes = 0


# --------------------------------------------------------------------------- in and out
@dataclass(slots=True)
class _OpenExtent:
    place: int
    size_bytes: int
    used_bytes: int = 0
    num_writing: int = 0
    is_left: bool = False


class Writer:
    """Puts columns into extents; for many threads.

    Args:
        schema: of the rows.
        units: how to reach each unit.
        grant: asks the control plane for an extent of at least so many bytes; returns its place and size.
        seal: tells the control plane that the extent at a place is done with.
        max_idle_s: an extent that was not written to for so long is left: it may have been taken back.
    """

    def __init__(
        self,
        schema: Schema,
        units: Sequence[UnitAccess],
        grant: Callable[[int], tuple[int, int]],
        seal: Callable[[int], None],
        *,
        max_idle_s: float = math.inf,
    ) -> None:
        self._max_idle_s = max_idle_s
        self._used_s = clock.now_s()
        self._schema = schema
        self._units = units
        self._grant = grant
        self._seal = seal
        self._lock = threading.Lock()
        self._extent: _OpenExtent | None = None

    @contextlib.contextmanager
    def write(self, columns: Sequence[Column]) -> Iterator[list[Written]]:
        """Copy columns into a unit and say where they lie.

        What was written is only kept if the control plane is told so before the block ends.

        Raises:
            SchemaMismatchError: NaN where it is forbidden.
        """
        starts, end = [], 0
        for column in columns:
            starts.append(end)
            end = -(-(end + column.num_bytes) // _ALIGNMENT) * _ALIGNMENT
        extent, where = self._reserve(end)
        try:
            unit, offset = unit_of(where), where & _OFFSET_MASK
            written = []
            with self._units[unit].writing(offset, end) as memory:
                for column, start in zip(columns, starts, strict=True):
                    self._copy(column, memory[start : start + column.num_bytes])
                    sizes = column.lengths * column.entry_bytes
                    places = np.cumsum(sizes) - sizes + (where + start)
                    written.append(Written(column.field, places, column.lengths, column.tags))
            yield written
        finally:
            self._done(extent)

    def _copy(self, column: Column, memory: Bytes) -> None:
        if len(memory):
            first = column.parts[0]
            target = torch.from_numpy(memory).view(first.dtype).view(-1, *first.shape[1:])
            with torch.no_grad():
                torch.cat(column.parts, out=target)
            self._schema.refuse_nan(column.field, target)

    def _reserve(self, num_bytes: int) -> tuple[_OpenExtent, int]:
        with self._lock:
            extent, idle_s = self._extent, clock.now_s() - self._used_s
            self._used_s += idle_s
            if extent is None or idle_s > self._max_idle_s or extent.used_bytes + num_bytes > extent.size_bytes:
                if extent is not None:  # before the next one is granted, perhaps in its place
                    self._extent = None
                    extent.is_left = True
                    if not extent.num_writing:
                        self._seal(extent.place)
                extent = self._extent = _OpenExtent(*self._grant(max(num_bytes, 1)))
            where = extent.place + extent.used_bytes
            extent.used_bytes += num_bytes
            extent.num_writing += 1
            return extent, where

    def _done(self, extent: _OpenExtent) -> None:
        with self._lock:
            extent.num_writing -= 1
            if extent.is_left and not extent.num_writing:
                self._seal(extent.place)


def gather(units: Sequence[UnitAccess], places: Rows, lengths: Lengths, entry_bytes: int) -> Tensor:
    """Copy rows out.

    Args:
        units: how to reach each unit.
        places: ``[N]`` where each row begins.
        lengths: ``[N]`` entries of each row.
        entry_bytes: size of an entry.

    Returns:
        ``[total bytes]`` uint8, the rows one after the other.

    Raises:
        QueueUnavailableError: a storage unit does not answer.
    """
    sizes = lengths * entry_bytes
    out = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    if not len(out):
        return out
    ends = places + sizes
    is_break = places[1:] != ends[:-1]
    firsts = np.concatenate(([0], np.flatnonzero(is_break) + 1))
    lasts = np.concatenate((firsts[1:] - 1, [len(places) - 1]))
    run_starts, run_ends = places[firsts], ends[lasts]
    run_units = unit_of(run_starts)
    target = out.numpy()
    at = 0
    for begin, end in _same(run_units):
        size = int((run_ends[begin:end] - run_starts[begin:end]).sum())
        offsets = (run_starts[begin:end] & _OFFSET_MASK).tolist()
        stops = (run_starts[begin:end] & _OFFSET_MASK) + run_ends[begin:end] - run_starts[begin:end]
        units[int(run_units[begin])].read(offsets, stops.tolist(), target[at : at + size])
        at += size
    return out


def _same(values: Rows) -> Iterator[tuple[int, int]]:
    """Split into stretches of equal values."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return itertools.pairwise(edges)
