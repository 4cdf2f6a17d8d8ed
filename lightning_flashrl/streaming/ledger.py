"""The control plane: which fields of which rows are ready, who has leased them, who has committed them. No payload.

A row is *ready* for a task when all fields that the task reads have been written. It is then *held* by the task's
sampler, *leased* to one consumer, and *committed* when the consumer says so; a lease that ends in any other way gives
its rows back to the sampler. Tasks do not see each other. A row is *gone* when it is cleared, or when all tasks have
committed it, and its memory is given back when the last lease on it is over.

Time comes in as an argument, and nothing here waits.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import heapq
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_flashrl.errors import (
    ConfigurationError,
    DuplicateRowError,
    EndOfStream,
    LeaseLostError,
    QueueClosedError,
    UnknownRowError,
    UnknownTaskError,
)
from lightning_flashrl.streaming.rows import PagedArray, Rows, RowTable
from lightning_flashrl.streaming.samplers import Candidates, Demand, OldestFirst, Sampler
from lightning_flashrl.streaming.schema import Schema

MAX_TASKS = 62
_REMEMBERED_ENDS = 4096
_READY, _COMMITTED, _LEASED, _PLACES = range(4)
"""What stands in a row's cells, as bits: fields written, tasks that committed, tasks that lease; then a place
for each field, then a length for each field."""


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of the workflow that reads rows.

    Attributes:
        fields: what it reads when a lease names nothing else; empty for all fields of the schema.
        sampler: which ready rows it gets next.
        token_fields: ragged fields whose entries count as tokens; empty for all that it reads.

    >>> Task(fields=("prompt", "response"))  # doctest: +ELLIPSIS
    Task(fields=('prompt', 'response'), sampler=..., token_fields=())
    """

    fields: Sequence[str] = ()
    sampler: Sampler = field(default_factory=OldestFirst)
    token_fields: Sequence[str] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """Where one field of some rows lies.

    Attributes:
        field: its name.
        places: ``[N]`` int64, where each row's entries begin.
        lengths: ``[N]`` int64, entries of each row.
        tags: ``[N]`` the values, if samplers may look at them.
    """

    field: str
    places: Rows
    lengths: Rows
    tags: npt.NDArray[Any] | None = None


Origin: TypeAlias = tuple[str, int] | None
"""Who asked for a change, and the number of the request: one that is asked twice is done once. ``None`` for nobody."""


class Log(Protocol):
    """Is told of each change of rows before it is made, and may refuse it by raising."""

    def put(self, rows: Rows, written: Sequence[Written], origin: Origin, *, done_by: str | None) -> None:
        """Fields become visible; rows that are not known yet are new. A task may be done with them in that instant."""

    def lease(self, lease: LeaseRecord, origin: Origin) -> None:
        """Rows are leased, also those that another lease of the task had."""

    def release(self, task: str, rows: Rows, origin: Origin) -> None:
        """Rows are no longer leased for a task."""

    def commit(self, task: str, rows: Rows, origin: Origin, *, is_stale: bool) -> None:
        """A task is done with rows."""

    def clear(self, rows: Rows, origin: Origin) -> None:
        """Rows are forgotten."""

    def close(self) -> None:
        """No new rows will come."""


@dataclass(slots=True)
class LeaseRecord:
    """Rows that one consumer works on.

    Attributes:
        lease_id: unguessable number.
        task: for which task.
        owner: who may commit it.
        rows: ``[N]`` int64 in the order of use.
        fields: what the consumer reads.
        timeout_s: how long each renewal lasts.
        deadline_s: when the rows go back.
        done: rows that were committed before the others, and pools whose samplers hear of that if the others go back:
            their groups are complete without them.
    """

    lease_id: int
    task: str
    owner: str
    rows: Rows
    fields: tuple[str, ...]
    timeout_s: float
    deadline_s: float
    done: list[tuple[Pool, Candidates]] = field(default_factory=list)


@dataclass(slots=True)
class TaskStatistics:
    """A task's view of the queue.

    Attributes:
        num_ready: rows that can be leased now, in the task's own fields.
        num_leased: rows under lease.
        num_open: rows in the queue that the task has not committed.
        num_committed: rows committed since the start.
        num_redelivered: rows that came back from leases.
        num_expired: leases that ran out.
        num_stale: rows that the sampler found too old.
        num_dropped: rows that were cleared before the task had committed them.
    """

    num_ready: int = 0
    num_leased: int = 0
    num_open: int = 0
    num_committed: int = 0
    num_redelivered: int = 0
    num_expired: int = 0
    num_stale: int = 0
    num_dropped: int = 0


@dataclass(slots=True, eq=False)
class Pool:
    """Rows of a task that are ready in certain fields.

    Attributes:
        task: whose.
        mask: the fields.
        token_fields: those whose lengths are tokens.
        prototype: what the caller gave; the pool goes with it.
        sampler: a copy of it, which holds the rows.
        failure: what the sampler raised. It concerns who reads the pool, not who happened to write a row.
    """

    task: str
    mask: int
    token_fields: tuple[str, ...]
    prototype: weakref.ref[Sampler]
    sampler: Sampler
    failure: Exception | None = None

    def feed(self, change: Callable[[], None]) -> None:
        """Change the sampler; once it has failed it is not used again."""
        if self.failure is None:
            try:
                change()
            except Exception as error:  # noqa: BLE001 - the user's own class; raised again in `lease`
                self.failure = error

    def check(self) -> None:
        """Say what the sampler raised.

        Raises:
            ConfigurationError: it did.
        """
        if self.failure is not None:
            raise ConfigurationError(
                f"the sampler {type(self.sampler).__name__} of task {self.task!r} raised {self.failure!r}; mend it"
            ) from self.failure


@dataclass(slots=True)
class _TaskState:
    bit: int
    fields: tuple[str, ...]
    sampler: Sampler
    token_fields: tuple[str, ...]
    pools: list[Pool] = field(default_factory=list)
    counts: TaskStatistics = field(default_factory=TaskStatistics)


class Ledger:
    """Readiness, leases and commits of all rows.

    Args:
        schema: the rows' fields.
        tasks: who reads them.
        clear_consumed: whether a row is gone once all tasks have committed it.

    Attributes:
        log: is told of changes; ``None`` for nobody.

    Raises:
        ConfigurationError: no tasks or too many, or a sampler that looks at a field which is not one number a row.
        UnknownFieldError: a task or sampler names a field that is not in the schema.
    """

    def __init__(self, schema: Schema, tasks: Mapping[str, Task], *, clear_consumed: bool = True) -> None:
        if not tasks or len(tasks) > MAX_TASKS:
            raise ConfigurationError(f"a queue for {len(tasks)} tasks; name 1 to {MAX_TASKS} of them in tasks={{...}}")
        self.schema = schema
        self.clear_consumed = clear_consumed
        self.log: Log | None = None
        self.is_closed = False
        self.num_put = 0
        self.num_cleared = 0
        self.num_bytes = 0
        self._table = RowTable()
        self._cells = self._table.column(np.int64, _PLACES + 2 * len(schema))
        self._column = {name: index for index, name in enumerate(schema)}
        self._entry_bytes = np.array([schema[name].entry_bytes for name in schema], np.int64)
        self._bits = np.array([schema.bits((name,)) for name in schema], np.int64)
        self._tags: dict[str, PagedArray] = {
            name: self._table.column(field.tag_dtype) for name, field in schema.items() if field.is_tag
        }
        self._leases: dict[int, LeaseRecord] = {}
        self._ends: dict[int, str] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._held: dict[int, tuple[int, Rows, Rows]] = {}
        self._freed: list[tuple[Rows, Rows]] = []
        self._filled: dict[Pool, None] = {}
        self._tasks: dict[str, _TaskState] = {}
        for index, (name, task) in enumerate(tasks.items()):
            fields = schema.select(task.fields or schema)
            counted = schema.select(task.token_fields) if task.token_fields else ()
            self._tasks[name] = _TaskState(1 << index, fields, task.sampler, counted)
        self._all_tasks = (1 << len(tasks)) - 1
        for name, state in self._tasks.items():
            self.pool(name, state.fields, state.sampler)

    # ------------------------------------------------------------------ writing
    @property
    def num_rows(self) -> int:
        """Rows in the queue."""
        return self._table.num_rows

    def put(
        self,
        written: Sequence[Written],
        rows: Rows | None = None,
        origin: Origin = None,
        *,
        done_by: str | None = None,
    ) -> Rows:
        """Make fields visible, all at once.

        Args:
            written: the fields, each of as many rows.
            rows: ``[N]``; ``None`` for new rows.
            origin: whose request it is.
            done_by: the task that commits these rows in the same instant, for the log.

        Returns:
            The rows.

        Raises:
            QueueClosedError: new rows after :meth:`close`.
            UnknownRowError: a row does not exist.
            DuplicateRowError: a row twice, or a field that the row has already.
        """
        mask = self.schema.bits(column.field for column in written)
        if rows is None:
            if self.is_closed:
                raise QueueClosedError
            if self.log is not None:
                upcoming = self._table.upcoming(len(written[0].lengths))
                self.log.put(upcoming, written, origin, done_by=done_by)
            rows = self._table.append(len(written[0].lengths))
            self.num_put += len(rows)
            for state in self._tasks.values():
                state.counts.num_open += len(rows)
            cells = np.zeros((len(rows), _PLACES + 2 * len(self._column)), np.int64)
        else:
            cells = self._check_rows(rows, mask)
            if self.log is not None:
                self.log.put(rows, written, origin, done_by=done_by)
        for column in written:
            index = self._column[column.field]
            cells[:, _PLACES + index] = column.places
            cells[:, _PLACES + len(self._column) + index] = column.lengths
            self.num_bytes += int(column.lengths.sum() * self._entry_bytes[index])
            if column.tags is not None:
                self._tags[column.field][rows] = column.tags
        before = cells[:, _READY].copy()
        cells[:, _READY] |= mask
        self._cells[rows] = cells
        after = cells[:, _READY]
        taken = cells[:, _COMMITTED] | cells[:, _LEASED]
        for state in self._tasks.values():
            is_free = (taken & state.bit) == 0  # another lease of the task may have needed fewer fields
            for pool in state.pools:
                is_new = is_free & ((after & pool.mask) == pool.mask) & ((before & pool.mask) != pool.mask)
                if is_new.all():
                    self._add(rows, cells, pool)
                elif is_new.any():
                    self._add(rows[is_new], cells[is_new], pool)
        return rows

    def _check_rows(self, rows: Rows, mask: int) -> npt.NDArray[np.int64]:
        _refuse_twice(rows)
        missing = self._table.missing(rows)
        if len(missing):
            raise UnknownRowError(tuple(missing.tolist()))
        cells: npt.NDArray[np.int64] = self._cells[rows]
        again = cells[:, _READY] & mask
        if again.any():
            names = self.schema.names(int(np.bitwise_or.reduce(again)))
            raise DuplicateRowError(tuple(rows[again != 0].tolist()), f"have {', '.join(names)} already")
        return cells

    # ------------------------------------------------------------------ reading
    def pool(self, task: str, fields: Iterable[str] = (), sampler: Sampler | None = None) -> Pool:
        """Return the pool for a task's fields; one that is new gets all rows that are ready for it.

        Raises:
            UnknownTaskError: the queue was not made for this task.
            UnknownFieldError: a name that the schema does not have.
            ConfigurationError: the sampler looks at a field that is not one number a row.
        """
        state = self._state(task)
        names = self.schema.select(fields) if fields else state.fields
        prototype = state.sampler if sampler is None else sampler
        mask = self.schema.bits((*names, *self._checked_tags(prototype)))
        for pool in state.pools:
            if pool.mask == mask and pool.prototype() is prototype:
                return pool
        counted = tuple(name for name in state.token_fields if name in names) or names
        ragged = tuple(name for name in counted if self.schema[name].is_ragged and not self.schema[name].is_python)
        pool = Pool(task, mask, ragged, weakref.ref(prototype), _copied(prototype))
        # The first is the task's own; others go with the samplers that leases brought along.
        state.pools = [other for other in state.pools if other.prototype() is not None]
        state.pools.append(pool)
        rows = self._table.all_rows()
        cells = self._cells[rows]
        taken = cells[:, _COMMITTED] | cells[:, _LEASED]
        chosen = ((cells[:, _READY] & mask) == mask) & ((taken & state.bit) == 0)
        if chosen.any():
            self._add(rows[chosen], cells[chosen], pool)
        return pool

    def lease(
        self,
        now_s: float,
        pool: Pool,
        demand: Demand,
        fields: tuple[str, ...],
        owner: str,
        timeout_s: float,
        origin: Origin = None,
    ) -> tuple[LeaseRecord, list[Written]] | None:
        """Lease rows from a pool, and say where they lie; ``None`` if the demand cannot be met yet.

        Raises:
            EndOfStream: it never will.
            ConfigurationError: the sampler failed.
        """
        pool.check()
        state = self._tasks[pool.task]
        if self.is_closed and not state.counts.num_open:
            raise EndOfStream(pool.task)
        if (
            not demand.is_last
            and self.is_closed
            and len(pool.sampler) == state.counts.num_open - state.counts.num_leased
        ):
            demand = dataclasses.replace(demand, is_last=True)
        try:
            taken = np.array(pool.sampler.take(demand), dtype=np.int64)
        except EndOfStream:
            self.drain(pool)
            raise
        except Exception as error:  # noqa: BLE001 - the user's own class
            pool.failure = error
        pool.check()
        lease = LeaseRecord(secrets.randbits(63), pool.task, owner, taken, fields, timeout_s, now_s + timeout_s)
        try:
            self.drain(pool)
            if len(taken) and self.log is not None:
                self.log.lease(lease, origin)
        except BaseException:
            if len(taken):
                self._add(taken, self._cells[taken], pool)
            raise
        if not len(taken):
            if self.is_closed and not state.counts.num_open:
                raise EndOfStream(pool.task)
            return None
        self._take_over(state, taken)
        self._discard(state, taken, pool)
        cells = self._cells[taken]
        cells[:, _LEASED] |= state.bit
        self._cells[taken] = cells
        self._begin_lease(lease)
        return lease, self._located(cells, fields)

    def _begin_lease(self, lease: LeaseRecord) -> None:
        self._leases[lease.lease_id] = lease
        self._tasks[lease.task].counts.num_leased += len(lease.rows)
        heapq.heappush(self._deadlines, (lease.deadline_s, lease.lease_id))

    def _located(self, cells: npt.NDArray[np.int64], fields: Sequence[str]) -> list[Written]:
        located = []
        for name in fields:
            index = _PLACES + self._column[name]
            located.append(Written(name, cells[:, index], cells[:, index + len(self._column)]))
        return located

    def lease_again(self, lease_id: int, owner: str) -> tuple[LeaseRecord, list[Written]] | None:
        """Say again what a lease brought, to who did not hear the answer; ``None`` if it is over."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.owner != owner or self._held.keys() & set(lease.rows.tolist()):
            return None
        return lease, self._located(self._cells[lease.rows], lease.fields)

    def drain(self, pool: Pool) -> None:
        """Be done with rows of which a sampler says so."""
        state = self._tasks[pool.task]
        stale = np.array(pool.sampler.take_stale(), dtype=np.int64)
        if len(stale):
            self._log_commit(pool.task, stale, is_stale=True)
            self._discard(state, stale, pool)
            state.counts.num_stale += len(stale)
            self._commit_rows(state, stale, self._cells[stale])
        done = self._uncommitted(state, pool.sampler.take_done())
        if len(done):
            self._log_commit(pool.task, done)
            self._discard(state, done, pool)
            self._end_leases(state, done, "was committed by its sampler")
            state.counts.num_committed += len(done)
            self._commit_rows(state, done, self._cells[done])

    def _uncommitted(self, state: _TaskState, numbers: Sequence[int]) -> Rows:
        """Return those that exist, and that no consumer of the task has committed."""
        rows = np.array(numbers, dtype=np.int64)
        rows = rows[~np.isin(rows, self._table.missing(rows))]
        is_open: npt.NDArray[np.bool_] = (self._cells[rows][:, _COMMITTED] & state.bit) == 0
        return rows[is_open]

    def _take_over(self, state: _TaskState, rows: Rows) -> None:
        """Rows that a sampler hands out although somebody has leased them are that consumer's no more."""
        if (self._cells[rows][:, _LEASED] & state.bit).any():
            state.counts.num_redelivered += self._end_leases(state, rows, "went to a successor")

    def _end_leases(self, state: _TaskState, rows: Rows, why: str) -> int:
        """Take the leases of a task off some rows, and return off how many."""
        num_ended = 0
        for lease in [lease for lease in self._leases.values() if self._tasks[lease.task] is state]:
            some = lease.rows[np.isin(lease.rows, rows)]
            if len(some):
                ended, cells = self._end(lease, why, some)
                self._cells[ended] = cells
                num_ended += len(ended)
        return num_ended

    def _discard(self, state: _TaskState, rows: Rows, but: Pool) -> None:
        for pool in state.pools:
            if pool is not but:
                pool.feed(functools.partial(pool.sampler.discard, rows.tolist()))

    # ------------------------------------------------------------------ leases end
    def check_lease(self, now_s: float, lease_id: int, task: str, owner: str, rows: Rows | None = None) -> LeaseRecord:
        """Return a lease that is alive, and has these rows.

        Raises:
            LeaseLostError: it is not alive, belongs to somebody else, or does not have a row.
            DuplicateRowError: a row twice.
        """
        self.expire(now_s)
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseLostError(lease_id, task, self._ends.get(lease_id, "was not given by this queue"))
        if lease.owner != owner:
            raise LeaseLostError(lease_id, task, "belongs to another consumer")
        if rows is not None:
            _refuse_twice(rows)
            foreign = rows[~np.isin(rows, lease.rows)]
            if len(foreign):
                raise LeaseLostError(
                    lease_id, task, f"does not have row(s) {', '.join(map(str, foreign.tolist()[:5]))}"
                )
        return lease

    def commit(
        self, now_s: float, lease_id: int, task: str, owner: str, rows: Rows | None = None, origin: Origin = None
    ) -> None:
        """Say that a lease's rows, or some of them, are done: the task never sees them again.

        Raises:
            LeaseLostError: the lease is not alive, belongs to somebody else, or does not have a row.
            DuplicateRowError: a row twice.
        """
        lease = self.check_lease(now_s, lease_id, task, owner, rows)
        self._log_commit(task, lease.rows if rows is None else rows, origin)
        self._commit_lease(lease, rows)

    def put_and_commit(
        self,
        now_s: float,
        written: Sequence[Written],
        rows: Rows,
        lease_id: int,
        task: str,
        owner: str,
        origin: Origin = None,
    ) -> None:
        """Write fields of a lease's rows and be done with these rows, in one instant; or do nothing.

        Raises:
            LeaseLostError: the lease is not alive, belongs to somebody else, or does not have a row.
            DuplicateRowError: a row twice, or a field that it has already.
            UnknownRowError: a row does not exist.
        """
        lease = self.check_lease(now_s, lease_id, task, owner, rows)
        self.put(written, rows, origin, done_by=task)
        self._commit_lease(lease, rows)

    def _commit_lease(self, lease: LeaseRecord, rows: Rows | None) -> None:
        rows, cells = self._end(lease, "was committed before", rows)
        state = self._tasks[lease.task]
        state.counts.num_committed += len(rows)
        if lease.lease_id in self._leases:  # it goes on with the others
            lease.done += [
                (pool, part) for pool in state.pools if pool.sampler.tags for part in self._known(rows, cells, pool)
            ]
        self._commit_rows(state, rows, cells)

    def release(
        self, now_s: float, lease_id: int, task: str, owner: str, rows: Rows | None = None, origin: Origin = None
    ) -> None:
        """Give a lease's rows, or some of them, back, to be leased again.

        Raises:
            LeaseLostError: the lease is not alive, belongs to somebody else, or does not have a row.
            DuplicateRowError: a row twice.
        """
        self._give_back(self.check_lease(now_s, lease_id, task, owner, rows), "was released before", rows, origin)

    def renew(self, now_s: float, lease_id: int, task: str, owner: str) -> float:
        """Begin a lease's time anew and return its new deadline.

        Raises:
            LeaseLostError: the lease is not alive, or belongs to somebody else.
        """
        lease = self.check_lease(now_s, lease_id, task, owner)
        lease.deadline_s = now_s + lease.timeout_s
        return lease.deadline_s

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` may have something to do."""
        while self._deadlines and self._deadlines[0][1] not in self._leases:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now_s: float) -> None:
        """Give back the rows of leases that ran out."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, lease_id = heapq.heappop(self._deadlines)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.deadline_s > now_s:
                heapq.heappush(self._deadlines, (lease.deadline_s, lease_id))
                continue
            self._tasks[lease.task].counts.num_expired += 1
            self._give_back(lease, f"ran out after {lease.timeout_s:g} s")

    def release_owner(self, owner: str) -> None:
        """Give back all that a consumer had leased: it is gone."""
        for lease in [lease for lease in self._leases.values() if lease.owner == owner]:
            self._give_back(lease, "was given back, because its owner was gone")

    def _give_back(self, lease: LeaseRecord, why: str, some: Rows | None = None, origin: Origin = None) -> None:
        if self.log is not None:
            self.log.release(lease.task, lease.rows if some is None else some, origin)
        rows, cells = self._end(lease, why, some)
        self._cells[rows] = cells
        state = self._tasks[lease.task]
        state.counts.num_redelivered += len(rows)
        done, lease.done = lease.done, []
        for pool, part in done:
            pool.feed(functools.partial(pool.sampler.drop, part))
        for pool in state.pools:
            is_ready = (cells[:, _READY] & pool.mask) == pool.mask
            if is_ready.any():
                self._add(rows[is_ready], cells[is_ready], pool)

    def _end(self, lease: LeaseRecord, why: str, some: Rows | None) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Take a lease off its rows, or some of them.

        Returns:
            Those that still exist, and their cells, which must be written back.
        """
        rows = lease.rows if some is None else some
        if len(rows) < len(lease.rows):
            lease.rows = lease.rows[~np.isin(lease.rows, rows)]
        else:
            del self._leases[lease.lease_id]
            self._ends[lease.lease_id] = why
            if len(self._ends) > _REMEMBERED_ENDS:
                del self._ends[next(iter(self._ends))]
        if self._held:
            is_held = np.array([row in self._held for row in rows.tolist()], dtype=np.bool_)
            for row in rows[is_held].tolist():
                num_leases, places, sizes = self._held.pop(row)
                if num_leases > 1:
                    self._held[row] = (num_leases - 1, places, sizes)
                else:
                    self._freed.append((places, sizes))
            rows = rows[~is_held]
        self._tasks[lease.task].counts.num_leased -= len(rows)
        cells: npt.NDArray[np.int64] = self._cells[rows]
        cells[:, _LEASED] &= ~self._tasks[lease.task].bit
        return rows, cells

    def _log_commit(self, task: str, rows: Rows, origin: Origin = None, *, is_stale: bool = False) -> None:
        if self.log is not None:
            self.log.commit(task, rows, origin, is_stale=is_stale)

    def _commit_rows(self, state: _TaskState, rows: Rows, cells: npt.NDArray[np.int64]) -> None:
        cells[:, _COMMITTED] |= state.bit
        self._cells[rows] = cells
        state.counts.num_open -= len(rows)
        if self.is_closed:  # perhaps the task's last: then its other consumers are told the end
            self._filled.update(dict.fromkeys(state.pools))
        if self.clear_consumed:
            is_done = cells[:, _COMMITTED] == self._all_tasks
            if is_done.all():
                self._remove(rows, cells)
            elif is_done.any():
                self._remove(rows[is_done], cells[is_done])

    # ------------------------------------------------------------------ rows go
    def clear(self, rows: Rows | None = None, origin: Origin = None) -> None:
        """Forget rows, whoever has not seen them yet.

        Args:
            rows: which; ``None`` for all.
            origin: whose request it is.

        Raises:
            DuplicateRowError: a row twice.
            UnknownRowError: a row does not exist.
        """
        if rows is None:
            rows = self._table.all_rows()
        cells = self._check_rows(rows, 0)
        if self.log is not None:
            self.log.clear(rows, origin)
        if cells[:, _LEASED].any():
            for lease in self._leases.values():
                self._tasks[lease.task].counts.num_leased -= int(np.isin(lease.rows, rows).sum())
        for state in self._tasks.values():
            is_unseen = (cells[:, _COMMITTED] & state.bit) == 0
            state.counts.num_open -= int(is_unseen.sum())
            state.counts.num_dropped += int(is_unseen.sum())
            if is_unseen.any():
                for pool in state.pools:
                    self._filled[pool] = None  # a group may be complete without them; fewer rows may be the last
                    for candidates in self._known(rows[is_unseen], cells[is_unseen], pool):
                        pool.feed(functools.partial(pool.sampler.drop, candidates))
        self._remove(rows, cells)

    def close(self) -> None:
        """No more rows will come."""
        if self.log is not None and not self.is_closed:
            self.log.close()
        self.is_closed = True
        for state in self._tasks.values():
            self._filled.update(dict.fromkeys(state.pools))

    def take_filled(self) -> list[Pool]:
        """Return the pools in which more may be possible than at the last call."""
        filled, self._filled = self._filled, {}
        return list(filled)

    def take_freed(self) -> tuple[Rows, Rows]:
        """Return places and sizes in bytes that nobody will read again, since the last call."""
        freed, self._freed = self._freed, []
        if not freed:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        places = np.concatenate([places for places, _ in freed])
        sizes = np.concatenate([sizes for _, sizes in freed])
        return places[sizes > 0], sizes[sizes > 0]

    def _remove(self, rows: Rows, cells: npt.NDArray[np.int64]) -> None:
        num_fields = len(self._column)
        has = (cells[:, _READY, None] & self._bits) != 0  # [N, F]
        places = cells[:, _PLACES : _PLACES + num_fields]
        sizes = cells[:, _PLACES + num_fields :] * self._entry_bytes * has
        self.num_bytes -= int(sizes.sum())
        is_leased = cells[:, _LEASED] != 0
        if is_leased.any():
            for index in np.flatnonzero(is_leased).tolist():
                self._held[int(rows[index])] = (int(cells[index, _LEASED]).bit_count(), places[index], sizes[index])
            places, sizes = places[~is_leased], sizes[~is_leased]
        self._freed.append((places.ravel(), sizes.ravel()))
        self._table.remove(rows)
        self.num_cleared += len(rows)

    # ------------------------------------------------------------------ a queue that goes on
    def restore(
        self,
        rows: Rows,
        written: Sequence[Written],
        committed: Mapping[str, npt.NDArray[np.bool_]],
        leased: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        """Take rows of an earlier queue, under their numbers.

        Args:
            rows: ``[N]`` ascending, and beyond all that are there.
            written: their fields.
            committed: ``[N]`` for each task, whether it is done with them.
            leased: ``[N]`` for each task, whether a lease has them that :meth:`restore_lease` brings later.
        """
        self._table.restore(rows)
        cells = np.zeros((len(rows), _PLACES + 2 * len(self._column)), np.int64)
        self._cells[rows] = cells
        for name, is_done in committed.items():
            state = self._tasks[name]
            cells[is_done, _COMMITTED] |= state.bit
            state.counts.num_open += int((~is_done).sum())
        for name, is_leased in leased.items():
            cells[is_leased, _LEASED] |= self._tasks[name].bit
        self._cells[rows] = cells
        self.put(written, rows)

    def restore_lease(self, lease: LeaseRecord) -> None:
        """Take a lease of an earlier queue, on rows that are here."""
        self._begin_lease(lease)

    def restore_totals(
        self,
        next_row: int,
        num_put: int,
        num_cleared: int,
        committed: Mapping[str, int],
        stale: Mapping[str, int],
        dropped: Mapping[str, int],
    ) -> None:
        """Go on counting where an earlier queue has stopped."""
        self._table.next_row = next_row
        self.num_put, self.num_cleared = num_put, num_cleared
        for name, state in self._tasks.items():
            state.counts.num_committed = committed.get(name, 0)
            state.counts.num_stale = stale.get(name, 0)
            state.counts.num_dropped = dropped.get(name, 0)

    def contents(self) -> Iterator[tuple[Rows, list[Written], dict[str, npt.NDArray[np.bool_]]]]:
        """Iterate over all rows as :meth:`restore` takes them: those with the same fields together."""
        rows = self._table.all_rows()
        cells = self._cells[rows]
        for bits in np.unique(cells[:, _READY]).tolist():
            chosen = cells[:, _READY] == bits
            some, its = rows[chosen], cells[chosen]
            written = [
                Written(
                    name,
                    its[:, _PLACES + self._column[name]],
                    its[:, _PLACES + len(self._column) + self._column[name]],
                    self._tags[name][some] if name in self._tags else None,
                )
                for name in self.schema.names(bits)
            ]
            yield some, written, {name: (its[:, _COMMITTED] & s.bit) != 0 for name, s in self._tasks.items()}

    @property
    def leases(self) -> list[LeaseRecord]:
        """All leases that are alive."""
        return list(self._leases.values())

    @property
    def next_row(self) -> int:
        """Number of the next new row."""
        return self._table.next_row

    # ------------------------------------------------------------------ looking
    def pools(self, task: str) -> list[Pool]:
        """Return the pools of a task.

        Raises:
            UnknownTaskError: the queue was not made for this task.
        """
        return list(self._state(task).pools)

    def statistics(self) -> dict[str, TaskStatistics]:
        """Return each task's view."""
        return {
            name: dataclasses.replace(state.counts, num_ready=len(state.pools[0].sampler))
            for name, state in self._tasks.items()
        }

    def wanted_fields(self, task: str, fields: Iterable[str] = ()) -> tuple[str, ...]:
        """Return what a lease of these fields brings.

        Raises:
            UnknownTaskError: the queue was not made for this task.
            UnknownFieldError: a name that the schema does not have.
        """
        state = self._state(task)
        return self.schema.select(fields) if fields else state.fields

    def _state(self, task: str) -> _TaskState:
        state = self._tasks.get(task)
        if state is None:
            raise UnknownTaskError(task, tuple(self._tasks))
        return state

    def _checked_tags(self, sampler: Sampler) -> tuple[str, ...]:
        names = []
        for tag in sampler.tags:
            (name,) = self.schema.select((tag,))
            if not self.schema[name].is_tag:
                raise ConfigurationError(
                    f"{type(sampler).__name__} looks at field {name!r}, which is not one number a row; declare it as "
                    "Field(int) or Field(float)"
                )
            names.append(name)
        return tuple(names)

    def _add(self, rows: Rows, cells: npt.NDArray[np.int64], pool: Pool) -> None:
        self._filled[pool] = None
        pool.feed(functools.partial(pool.sampler.add, self._candidates(rows, cells, pool)))

    def _candidates(self, rows: Rows, cells: npt.NDArray[np.int64], pool: Pool) -> Candidates:
        num_tokens = np.zeros(len(rows), np.int64)
        for name in pool.token_fields:
            num_tokens += cells[:, _PLACES + len(self._column) + self._column[name]]
        return Candidates(rows, num_tokens, {tag: self._tags[tag][rows] for tag in pool.sampler.tags})

    def _known(self, rows: Rows, cells: npt.NDArray[np.int64], pool: Pool) -> list[Candidates]:
        """Return rows with those tags that were written: a part for each set of tags that occurs."""
        written = cells[:, _READY] & self.schema.bits(pool.sampler.tags)
        parts = []
        for bits in np.unique(written).tolist():
            some = rows[written == bits]
            names = set(self.schema.names(bits))
            tags = {tag: self._tags[tag][some] for tag in pool.sampler.tags if tag in names}
            parts.append(Candidates(some, np.zeros(len(some), np.int64), tags))
        return parts


def _refuse_twice(rows: Rows) -> None:
    if len(rows) > 1 and len(np.unique(rows)) != len(rows):
        values, counts = np.unique(rows, return_counts=True)
        raise DuplicateRowError(tuple(values[counts > 1].tolist()), "stand twice in one call")


def _copied(sampler: Sampler) -> Sampler:
    """Return a sampler like it, which holds nothing yet.

    Raises:
        ConfigurationError: it cannot be copied.
    """
    try:
        return copy.deepcopy(sampler)
    except Exception as error:
        raise ConfigurationError(
            f"the sampler {type(sampler).__name__} cannot be copied ({error}); let it hold no locks, files or "
            "processes, or give it a __deepcopy__"
        ) from error
