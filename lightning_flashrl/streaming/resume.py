"""A queue's changes into its journal, and a journal's rows into a new queue."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lightning_flashrl.streaming.journal import (
    Clear,
    Close,
    Commit,
    FieldData,
    Header,
    Journal,
    Note,
    Put,
    Record,
    Totals,
)
from lightning_flashrl.streaming.ledger import Ledger, Written
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.schema import Column, Schema
from lightning_flashrl.streaming.storage import Writer

_COMPACT_FACTOR, _COMPACT_BYTES = 4, 64 << 20
"""A journal is written anew when it is so much larger than what it was at its beginning, and than this."""
_PART_ROWS = 4096
Restore = Callable[[Rows, Sequence[Written], Mapping[str, npt.NDArray[np.bool_]]], None]
"""See :meth:`~lightning_flashrl.streaming.ledger.Ledger.restore`."""
Read = Callable[[Written], bytes]
"""Returns the bytes of a field's rows, one after the other."""


@dataclass(slots=True)
class _Row:
    """A row, as a journal tells of it: its fields' bytes and tags, and the tasks that are done with it."""

    fields: dict[str, tuple[bytes, bytes | None]] = field(default_factory=dict)
    committed: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Found:
    """What a journal holds."""

    rows: dict[int, _Row] = field(default_factory=dict)
    next_row: int = 0
    num_put: int = 0
    num_cleared: int = 0
    num_committed: collections.Counter[str] = field(default_factory=collections.Counter)
    num_stale: collections.Counter[str] = field(default_factory=collections.Counter)
    is_closed: bool = False
    notes: list[bytes] = field(default_factory=list)


class QueueJournal:
    """The journal of one queue.

    Args:
        path: of the file.
        schema: of the queue's rows.
        tasks: names of the queue's tasks.
        clear_consumed: whether rows go once all tasks have committed them.

    Attributes:
        notes: what the application has noted, from the earlier queue on.

    Raises:
        JournalError: the file is damaged, cannot be written, or is in use.
        ConfigurationError: it is another queue's.
    """

    def __init__(self, path: Path, schema: Schema, tasks: Sequence[str], *, clear_consumed: bool) -> None:
        self._schema = schema
        self._tasks = tuple(tasks)
        self._clear_consumed = clear_consumed
        fields = tuple(f"{name} {spec.dtype} {spec.shape}" for name, spec in schema.items())
        self.notes: list[bytes] = []
        self._journal = Journal(path, Header(fields, self._tasks, clear_consumed))
        self._ledger: Ledger | None = None
        self._read: Read = lambda written: b""
        self._limit_bytes = _COMPACT_BYTES

    def begin(self, ledger: Ledger, writer: Writer, restore: Restore, read: Read) -> None:
        """Bring an earlier queue's rows into a new one, and follow its changes from now on.

        Args:
            ledger: of the new queue.
            writer: brings rows into its storage.
            restore: makes them known.
            read: reads them in its storage.
        """
        self._ledger, self._read = ledger, read
        try:
            found = self._find()
            self.notes = found.notes
            for rows, columns, committed in self._parts(found):
                with writer.write(columns) as written:
                    restore(rows, written, committed)
            ledger.restore_totals(
                found.next_row, found.num_put, found.num_cleared, found.num_committed, found.num_stale
            )
            if found.is_closed:
                ledger.close()
            self.compact()
        except BaseException:
            self._journal.close()
            raise
        ledger.log = self

    # ------------------------------------------------------------------ what was
    def _find(self) -> _Found:
        found = _Found()
        for record in self._journal.records():
            match record:
                case Put(rows=rows, fields=fields):
                    self._take_put(found, _numbers(rows).tolist(), fields)
                case Commit(task=task, rows=rows, is_stale=is_stale):
                    self._take_commit(found, task, _numbers(rows).tolist(), is_stale=is_stale)
                case Clear(rows=rows):
                    for row in _numbers(rows).tolist():
                        found.num_cleared += found.rows.pop(row, None) is not None
                case Close():
                    found.is_closed = True
                case Note(payload=payload):
                    found.notes.append(payload)
                case Totals():
                    found.next_row, found.num_put, found.num_cleared = (
                        record.next_row,
                        record.num_put,
                        record.num_cleared,
                    )
                    found.num_committed = collections.Counter(record.num_committed)
                    found.num_stale = collections.Counter(record.num_stale)
        return found

    def _take_put(self, found: _Found, rows: list[int], fields: Sequence[FieldData]) -> None:
        for row in rows:
            if row >= found.next_row:
                found.num_put += 1
                found.next_row = row + 1
            found.rows.setdefault(row, _Row())
        for data in fields:
            sizes = np.frombuffer(data.lengths, np.int64) * self._schema[data.name].entry_bytes
            ends = np.cumsum(sizes)
            tag_bytes = len(data.tags or b"") // len(rows)
            for index, (row, begin, end) in enumerate(zip(rows, (ends - sizes).tolist(), ends.tolist(), strict=True)):
                tag = None if data.tags is None else data.tags[index * tag_bytes : (index + 1) * tag_bytes]
                found.rows[row].fields[data.name] = (data.values[begin:end], tag)

    def _take_commit(self, found: _Found, task: str, rows: list[int], *, is_stale: bool) -> None:
        (found.num_stale if is_stale else found.num_committed)[task] += len(rows)
        for row in rows:
            if row in found.rows:
                found.rows[row].committed.add(task)
                if self._clear_consumed and len(found.rows[row].committed) == len(self._tasks):
                    del found.rows[row]
                    found.num_cleared += 1

    def _parts(self, found: _Found) -> Iterator[tuple[Rows, list[Column], dict[str, npt.NDArray[np.bool_]]]]:
        """Iterate over stretches of rows with the same fields, ascending."""
        numbers = sorted(found.rows)
        begin = 0
        while begin < len(numbers):
            fields = found.rows[numbers[begin]].fields.keys()
            end = begin + 1
            while end < min(len(numbers), begin + _PART_ROWS) and found.rows[numbers[end]].fields.keys() == fields:
                end += 1
            rows = [found.rows[number] for number in numbers[begin:end]]
            columns = [self._column(name, rows) for name in self._schema if name in fields]
            committed = {task: np.array([task in row.committed for row in rows]) for task in self._tasks}
            yield np.array(numbers[begin:end], np.int64), columns, committed
            begin = end

    def _column(self, name: str, rows: Sequence[_Row]) -> Column:
        spec = self._schema[name]
        parts = [row.fields[name] for row in rows]
        raw = bytearray(b"".join(values for values, _ in parts))
        lengths = np.array([len(values) for values, _ in parts], np.int64) // max(1, spec.entry_bytes)
        tensor = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
        typed = tensor.view(spec.stored_dtype).view(-1, *spec.inner_shape)
        tags = None
        if spec.is_tag:
            tags = np.frombuffer(b"".join(tag or b"" for _, tag in parts), spec.tag_dtype)
        return Column(name, [typed], lengths, spec.entry_bytes, tags)

    # ------------------------------------------------------------------ what is
    def put(self, rows: Rows, written: Sequence[Written]) -> None:
        """Fields become visible."""
        self._append(Put(rows.tobytes(), self._data(written)))

    def _data(self, written: Sequence[Written]) -> tuple[FieldData, ...]:
        return tuple(
            FieldData(
                column.field,
                column.lengths.tobytes(),
                self._read(column),
                None if column.tags is None else np.ascontiguousarray(column.tags).tobytes(),
            )
            for column in written
        )

    def commit(self, task: str, rows: Rows, *, is_stale: bool) -> None:
        """A task is done with rows."""
        self._append(Commit(task, rows.tobytes(), is_stale))

    def clear(self, rows: Rows) -> None:
        """Rows are forgotten."""
        self._append(Clear(rows.tobytes()))

    def close(self) -> None:
        """No new rows will come."""
        self._append(Close())

    def note(self, payload: bytes) -> None:
        """Keep what the application has to say."""
        self.notes.append(payload)
        self._append(Note(payload))

    def _append(self, record: Record) -> None:
        if self._journal.size_bytes > self._limit_bytes:
            self.compact()
        self._journal.append(record)

    def compact(self) -> None:
        """Write the journal anew, with what is there now."""
        self._journal.rewrite(self._contents())
        self._limit_bytes = max(_COMPACT_BYTES, _COMPACT_FACTOR * self._journal.size_bytes)

    def _contents(self) -> Iterator[Record]:
        ledger = self._ledger
        assert ledger is not None
        counts = ledger.statistics()
        for rows, written, committed in ledger.contents():
            for begin in range(0, len(rows), _PART_ROWS):
                part = slice(begin, begin + _PART_ROWS)
                some = [_part(column, part) for column in written]
                yield Put(rows[part].tobytes(), self._data(some))
                for task, is_done in committed.items():
                    if is_done[part].any():
                        yield Commit(task, rows[part][is_done[part]].tobytes())
        yield Totals(
            ledger.next_row,
            ledger.num_put,
            ledger.num_cleared,
            {name: count.num_committed for name, count in counts.items()},
            {name: count.num_stale for name, count in counts.items()},
        )
        for payload in self.notes:
            yield Note(payload)
        if ledger.is_closed:
            yield Close()

    def end(self) -> None:
        """Let go of the file."""
        self._journal.close()


def _part(column: Written, part: slice) -> Written:
    tags = None if column.tags is None else column.tags[part]
    return Written(column.field, column.places[part], column.lengths[part], tags)


def _numbers(data: bytes) -> Rows:
    return np.frombuffer(data, np.int64)
