"""A queue's changes into its journal, and a journal's rows into a new queue."""

from __future__ import annotations

import collections
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lightning_flashrl.streaming.journal import (
    Answered,
    Clear,
    Close,
    Commit,
    FieldData,
    Header,
    Journal,
    Leased,
    Note,
    Put,
    Record,
    Released,
    Totals,
    whole,
)
from lightning_flashrl.streaming.ledger import LeaseRecord, Ledger, Origin, Written
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.schema import Column, Schema
from lightning_flashrl.streaming.storage import Writer

_COMPACT_FACTOR, _COMPACT_BYTES = 4, 64 << 20
"""A journal is written anew when it is so much larger than what it was at its beginning, and than this."""
_PART_ROWS = 4096
_REMEMBERED_ANSWERS = 4096
_Marks: TypeAlias = Mapping[str, npt.NDArray[np.bool_]]
Restore = Callable[[Rows, Sequence[Written], _Marks, _Marks], None]
"""See :meth:`~lightning_flashrl.streaming.ledger.Ledger.restore`."""
Read = Callable[[Written], bytes]
"""Returns the bytes of a field's rows, one after the other."""


@dataclass(slots=True)
class _Row:
    """A row, as a journal tells of it.

    Attributes:
        fields: bytes and tag of each.
        committed: tasks that are done with it.
        leases: lease of each task that has one on it.
    """

    fields: dict[str, tuple[bytes, bytes | None]] = field(default_factory=dict)
    committed: set[str] = field(default_factory=set)
    leases: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Found:
    """What a journal holds."""

    rows: dict[int, _Row] = field(default_factory=dict)
    next_row: int = 0
    num_put: int = 0
    num_cleared: int = 0
    num_committed: collections.Counter[str] = field(default_factory=collections.Counter)
    num_stale: collections.Counter[str] = field(default_factory=collections.Counter)
    num_dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    leases: dict[int, Leased] = field(default_factory=dict)
    is_closed: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered.

    Attributes:
        rows: that it put, as bytes.
        lease_id: that it got; 0 for none.
    """

    rows: bytes = b""
    lease_id: int = 0


class QueueJournal:
    """The journal of one queue.

    Args:
        path: of the file.
        schema: of the queue's rows.
        tasks: names of the queue's tasks.
        clear_consumed: whether rows go once all tasks have committed them.

    Attributes:
        queue_id: by which a client knows the queue again.
        last_note: what the application has noted last, also in the earlier queue; ``None`` for nothing.

    Raises:
        JournalError: the file is damaged, cannot be written, or is in use.
        ConfigurationError: it is another queue's.
    """

    def __init__(self, path: Path, schema: Schema, tasks: Sequence[str], *, clear_consumed: bool) -> None:
        self._schema = schema
        self._tasks = tuple(tasks)
        self._clear_consumed = clear_consumed
        self.queue_id = secrets.token_hex(8)
        self.last_note: bytes | None = None
        self._answers: collections.OrderedDict[tuple[str, int], Answer] = collections.OrderedDict()
        self._journal = Journal(path, _header(schema, tasks, clear_consumed=clear_consumed))
        self._ledger: Ledger | None = None
        self._read: Read = lambda written: b""
        self._limit_bytes = _COMPACT_BYTES

    def begin(
        self,
        ledger: Ledger,
        writer: Writer,
        restore: Restore,
        read: Read,
        now_s: float,
        hear_note: Callable[[bytes], None] | None = None,
    ) -> None:
        """Bring an earlier queue's rows and leases into a new one, and follow its changes from now on.

        Args:
            ledger: of the new queue.
            writer: brings rows into its storage.
            restore: makes them known.
            read: reads them in its storage.
            now_s: when leases that are alive begin anew.
            hear_note: gets what the application has noted last, before any row is there.
        """
        self._ledger, self._read = ledger, read
        try:
            found = self._find()
            if hear_note is not None and self.last_note is not None:
                hear_note(self.last_note)
            for rows, columns, committed, leased in self._parts(found):
                with writer.write(columns) as written:
                    restore(rows, written, committed, leased)
            for lease in self._leases(found, now_s):
                ledger.restore_lease(lease)
            ledger.restore_totals(
                found.next_row,
                found.num_put,
                found.num_cleared,
                found.num_committed,
                found.num_stale,
                found.num_dropped,
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
                case Put(rows=rows, fields=fields, origin=origin, done_by=done_by):
                    self._take_put(found, _numbers(rows).tolist(), fields)
                    self._remember(origin, Answer(rows))
                    if done_by is not None:
                        self._take_commit(found, done_by, _numbers(rows).tolist())
                case Leased(task=task, rows=rows, origin=origin):
                    found.leases[record.lease_id] = record
                    for row in _numbers(rows).tolist():
                        if row in found.rows:  # else it was cleared while it was leased
                            found.rows[row].leases[task] = record.lease_id
                    self._remember(origin, Answer(lease_id=record.lease_id))
                case Released(task=task, rows=rows, origin=origin):
                    for row in _numbers(rows).tolist():
                        if row in found.rows:
                            found.rows[row].leases.pop(task, None)
                    self._remember(origin, Answer())
                case Commit(task=task, rows=rows, origin=origin, is_stale=is_stale):
                    self._take_commit(found, task, _numbers(rows).tolist(), is_stale=is_stale)
                    self._remember(origin, Answer())
                case Clear(rows=rows, origin=origin):
                    self._take_clear(found, _numbers(rows).tolist())
                    self._remember(origin, Answer())
                case Answered(owner=owner, number=number, rows=rows, lease_id=lease_id):
                    self._remember((owner, number), Answer(rows, lease_id))
                case Close():
                    found.is_closed = True
                case Note(payload=payload):
                    self.last_note = payload
                case Totals():
                    self.queue_id = record.queue_id
                    found.next_row, found.num_put, found.num_cleared = (
                        record.next_row,
                        record.num_put,
                        record.num_cleared,
                    )
                    found.num_committed = collections.Counter(record.num_committed)
                    found.num_stale = collections.Counter(record.num_stale)
                    found.num_dropped = collections.Counter(record.num_dropped)
        return found

    def _remember(self, origin: Origin, answer: Answer) -> None:
        if origin is not None:
            self._answers[origin] = answer
            if len(self._answers) > _REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)

    def answer_to(self, owner: str, number: int) -> Answer | None:
        """Return what a request was answered; ``None`` if it is new, changed nothing, or was long ago."""
        return self._answers.get((owner, number))

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

    def _take_clear(self, found: _Found, rows: list[int]) -> None:
        for row in rows:
            gone = found.rows.pop(row, None)
            if gone is not None:
                found.num_cleared += 1
                found.num_dropped.update(task for task in self._tasks if task not in gone.committed)

    def _take_commit(self, found: _Found, task: str, rows: list[int], *, is_stale: bool = False) -> None:
        (found.num_stale if is_stale else found.num_committed)[task] += len(rows)
        for row in rows:
            if row in found.rows:
                found.rows[row].committed.add(task)
                found.rows[row].leases.pop(task, None)
                if self._clear_consumed and len(found.rows[row].committed) == len(self._tasks):
                    del found.rows[row]
                    found.num_cleared += 1

    def _leases(self, found: _Found, now_s: float) -> Iterator[LeaseRecord]:
        """Iterate over leases that have rows."""
        for record in found.leases.values():
            rows = [
                row
                for row in _numbers(record.rows).tolist()
                if row in found.rows and found.rows[row].leases.get(record.task) == record.lease_id
            ]
            if rows:
                yield LeaseRecord(
                    record.lease_id,
                    record.task,
                    record.owner,
                    np.array(rows, np.int64),
                    record.fields,
                    record.timeout_s,
                    now_s + record.timeout_s,
                )

    def _parts(self, found: _Found) -> Iterator[tuple[Rows, list[Column], _Marks, _Marks]]:
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
            leased = {task: np.array([task in row.leases for row in rows]) for task in self._tasks}
            yield np.array(numbers[begin:end], np.int64), columns, committed, leased
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
    def put(self, rows: Rows, written: Sequence[Written], origin: Origin, *, done_by: str | None) -> None:
        """Fields become visible."""
        self._append(Put(rows.tobytes(), _data(written, self._read), origin, done_by))
        self._remember(origin, Answer(rows.tobytes()))

    def lease(self, lease: LeaseRecord, origin: Origin) -> None:
        """Rows are leased."""
        self._append(_leased(lease, origin))
        self._remember(origin, Answer(lease_id=lease.lease_id))

    def release(self, task: str, rows: Rows, origin: Origin) -> None:
        """Rows are no longer leased."""
        self._append(Released(task, rows.tobytes(), origin))
        self._remember(origin, Answer())

    def commit(self, task: str, rows: Rows, origin: Origin, *, is_stale: bool) -> None:
        """A task is done with rows."""
        self._append(Commit(task, rows.tobytes(), origin, is_stale))
        self._remember(origin, Answer())

    def clear(self, rows: Rows, origin: Origin) -> None:
        """Rows are forgotten."""
        self._append(Clear(rows.tobytes(), origin))
        self._remember(origin, Answer())

    def close(self) -> None:
        """No new rows will come."""
        self._append(Close())

    def note(self, payload: bytes) -> None:
        """Keep what the application has to say; the last one counts."""
        self._append(Note(payload))
        self.last_note = payload

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
        yield from _rows(ledger, self._read)
        for lease in ledger.leases:
            yield _leased(lease, None)
        for (owner, number), answer in self._answers.items():
            yield Answered(owner, number, answer.rows, answer.lease_id)
        yield Totals(
            self.queue_id,
            ledger.next_row,
            ledger.num_put,
            ledger.num_cleared,
            {name: count.num_committed for name, count in counts.items()},
            {name: count.num_stale for name, count in counts.items()},
            {name: count.num_dropped for name, count in counts.items()},
        )
        if self.last_note is not None:
            yield Note(self.last_note)
        if ledger.is_closed:
            yield Close()

    def end(self) -> None:
        """Let go of the file."""
        self._journal.close()


def take_snapshot(ledger: Ledger, read: Read, note: bytes | None, without: tuple[str, str] | None) -> bytes:
    """Return a journal of the rows that are in a queue now, as if they had just been put, and nobody leased them.

    Args:
        ledger: of the queue.
        read: reads rows in its storage.
        note: what the application has to say; ``None`` for nothing.
        without: a task and a field that are left out; ``None`` for all that is there.
    """

    def records() -> Iterator[Record]:
        committed: collections.Counter[str] = collections.Counter()
        for record in _rows(ledger, read, without):
            if isinstance(record, Commit):
                committed[record.task] += len(_numbers(record.rows))
            yield record
        yield Totals(secrets.token_hex(8), ledger.next_row, ledger.num_rows, 0, dict(committed), {}, {})
        if note is not None:
            yield Note(note)

    header = _header(ledger.schema, tuple(ledger.statistics()), clear_consumed=ledger.clear_consumed)
    return whole(header, records())


def _header(schema: Schema, tasks: Sequence[str], *, clear_consumed: bool) -> Header:
    fields = tuple(f"{name} {spec.dtype} {spec.shape}" for name, spec in schema.items())
    return Header(fields, tuple(tasks), clear_consumed)


def _rows(ledger: Ledger, read: Read, without: tuple[str, str] | None = None) -> Iterator[Record]:
    task_left_out, field_left_out = without or (None, None)
    for rows, found, done in ledger.contents():
        written = [column for column in found if column.field != field_left_out]
        committed = {task: is_done for task, is_done in done.items() if task != task_left_out}
        for begin in range(0, len(rows), _PART_ROWS):
            part = slice(begin, begin + _PART_ROWS)
            yield Put(rows[part].tobytes(), _data([_part(column, part) for column in written], read))
            for task, is_done in committed.items():
                if is_done[part].any():
                    yield Commit(task, rows[part][is_done[part]].tobytes())


def _data(written: Sequence[Written], read: Read) -> tuple[FieldData, ...]:
    return tuple(
        FieldData(
            column.field,
            column.lengths.tobytes(),
            read(column),
            None if column.tags is None else np.ascontiguousarray(column.tags).tobytes(),
        )
        for column in written
    )


def _leased(lease: LeaseRecord, origin: Origin) -> Leased:
    rows = lease.rows.tobytes()
    return Leased(lease.lease_id, lease.task, lease.owner, rows, lease.fields, lease.timeout_s, origin)


def _part(column: Written, part: slice) -> Written:
    tags = None if column.tags is None else column.tags[part]
    return Written(column.field, column.places[part], column.lengths[part], tags)


def _numbers(data: bytes) -> Rows:
    return np.frombuffer(data, np.int64)
