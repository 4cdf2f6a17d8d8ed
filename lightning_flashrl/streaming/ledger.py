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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

MAX_TASKS = 64
_REMEMBERED_ENDS = 4096
_TAG_DTYPES: dict[Any, npt.DTypeLike] = {int: np.int64, float: np.float64, bool: np.bool_}


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of the workflow that reads rows.

    Attributes:
        fields: what it reads when a lease names nothing else; empty for all fields of the schema.
        sampler: which ready rows it gets next.

    >>> Task(fields=("prompt", "response"))  # doctest: +ELLIPSIS
    Task(fields=('prompt', 'response'), sampler=...)
    """

    fields: Sequence[str] = ()
    sampler: Sampler = field(default_factory=OldestFirst)


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
    """

    lease_id: int
    task: str
    owner: str
    rows: Rows
    fields: tuple[str, ...]
    timeout_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
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
    """

    num_ready: int = 0
    num_leased: int = 0
    num_open: int = 0
    num_committed: int = 0
    num_redelivered: int = 0
    num_expired: int = 0
    num_stale: int = 0


@dataclass(slots=True, eq=False)
class Pool:
    """Rows of a task that are ready in certain fields.

    Attributes:
        task: whose.
        mask: the fields.
        token_fields: those whose lengths are tokens.
        prototype: what the caller gave.
        sampler: a copy of it, which holds the rows.
        failure: what the sampler raised. It concerns who reads the pool, not who happened to write a row.
    """

    task: str
    mask: int
    token_fields: tuple[str, ...]
    prototype: Sampler
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
    pools: list[Pool] = field(default_factory=list)
    num_open: int = 0
    num_leased: int = 0
    num_committed: int = 0
    num_redelivered: int = 0
    num_expired: int = 0
    num_stale: int = 0


class Ledger:
    """Readiness, leases and commits of all rows.

    Args:
        schema: the rows' fields.
        tasks: who reads them.
        clear_consumed: whether a row is gone once all tasks have committed it.

    Raises:
        ConfigurationError: no tasks or too many, or a sampler that looks at a field which is not one number a row.
        UnknownFieldError: a task or sampler names a field that is not in the schema.
    """

    def __init__(self, schema: Schema, tasks: Mapping[str, Task], *, clear_consumed: bool = True) -> None:
        if not tasks or len(tasks) > MAX_TASKS:
            raise ConfigurationError(f"a queue for {len(tasks)} tasks; name 1 to {MAX_TASKS} of them in tasks={{...}}")
        self.schema = schema
        self.clear_consumed = clear_consumed
        self.is_closed = False
        self.num_put = 0
        self.num_cleared = 0
        self.num_bytes = 0
        self._table = RowTable()
        self._ready = self._table.column(np.uint64)
        self._committed = self._table.column(np.uint64)
        self._num_leases = self._table.column(np.int32)
        self._places = {name: self._table.column(np.int64) for name in schema}
        self._lengths = {name: self._table.column(np.int64) for name in schema}
        self._tags: dict[str, PagedArray] = {
            name: self._table.column(_TAG_DTYPES[field.dtype]) for name, field in schema.items() if field.is_tag
        }
        self._leases: dict[int, LeaseRecord] = {}
        self._ends: dict[int, str] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._held: dict[int, tuple[int, Rows, Rows]] = {}
        self._freed: list[tuple[Rows, Rows]] = []
        self._tasks: dict[str, _TaskState] = {}
        for index, (name, task) in enumerate(tasks.items()):
            fields = schema.select(task.fields or schema)
            self._tasks[name] = _TaskState(1 << index, fields, task.sampler)
        self._all_tasks = np.uint64((1 << len(tasks)) - 1)
        for name, state in self._tasks.items():
            self.pool(name, state.fields, state.sampler)

    # ------------------------------------------------------------------ writing
    @property
    def num_rows(self) -> int:
        """Rows in the queue."""
        return self._table.num_rows

    def put(self, written: Sequence[Written], rows: Rows | None = None) -> tuple[Rows, list[Pool]]:
        """Make fields visible, all at once.

        Args:
            written: the fields, each of as many rows.
            rows: ``[N]``; ``None`` for new rows.

        Returns:
            The rows, and the pools that have got some of them.

        Raises:
            QueueClosedError: new rows after :meth:`close`.
            UnknownRowError: a row does not exist.
            DuplicateRowError: a row twice, or a field that the row has already.
        """
        mask = np.uint64(self.schema.bits(column.field for column in written))
        if rows is None:
            if self.is_closed:
                raise QueueClosedError
            rows = self._table.append(len(written[0].lengths))
            self.num_put += len(rows)
            for state in self._tasks.values():
                state.num_open += len(rows)
            before = np.zeros(len(rows), np.uint64)
        else:
            before = self._check_rows(rows, mask)
        for column in written:
            self._places[column.field][rows] = column.places
            self._lengths[column.field][rows] = column.lengths
            self.num_bytes += int(column.lengths.sum()) * self.schema[column.field].entry_bytes
            if column.tags is not None and column.field in self._tags:
                self._tags[column.field][rows] = column.tags
        after = before | mask
        self._ready[rows] = after
        filled = []
        for state in self._tasks.values():
            for pool in state.pools:
                wanted = np.uint64(pool.mask)
                is_new = ((after & wanted) == wanted) & ((before & wanted) != wanted)
                if is_new.any():
                    self._add(rows if is_new.all() else rows[is_new], pool)
                    filled.append(pool)
        return rows, filled

    def _check_rows(self, rows: Rows, mask: np.uint64) -> npt.NDArray[np.uint64]:
        if len(np.unique(rows)) != len(rows):
            values, counts = np.unique(rows, return_counts=True)
            raise DuplicateRowError(tuple(values[counts > 1].tolist()), "stand twice in one call")
        missing = self._table.missing(rows)
        if len(missing):
            raise UnknownRowError(tuple(missing.tolist()))
        before: npt.NDArray[np.uint64] = self._ready[rows]
        again = before & mask
        if again.any():
            names = self.schema.names(int(np.bitwise_or.reduce(again)))
            raise DuplicateRowError(tuple(rows[again != 0].tolist()), f"have {', '.join(names)} already")
        return before

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
        prototype = sampler or state.sampler
        mask = self.schema.bits((*names, *self._checked_tags(prototype)))
        for pool in state.pools:
            if pool.mask == mask and pool.prototype is prototype:
                return pool
        ragged = tuple(name for name in names if self.schema[name].is_ragged and not self.schema[name].is_python)
        pool = Pool(task, mask, ragged, prototype, copy.deepcopy(prototype))
        state.pools.append(pool)
        rows = self._table.all_rows()
        leased = [lease.rows for lease in self._leases.values() if lease.task == task]
        wanted = np.uint64(mask)
        is_open = ((self._ready[rows] & wanted) == wanted) & ((self._committed[rows] & np.uint64(state.bit)) == 0)
        rows = rows[is_open & ~np.isin(rows, np.concatenate(leased) if leased else [])]
        if len(rows):
            self._add(rows, pool)
        return pool

    def lease(
        self, now_s: float, pool: Pool, demand: Demand, fields: tuple[str, ...], owner: str, timeout_s: float
    ) -> LeaseRecord | None:
        """Lease rows from a pool; ``None`` if the demand cannot be met yet.

        Raises:
            EndOfStream: it never will.
            ConfigurationError: the sampler failed.
        """
        pool.check()
        state = self._tasks[pool.task]
        if self.is_closed and not state.num_open:
            raise EndOfStream(pool.task)
        if not demand.is_last and self.is_closed and len(pool.sampler) == state.num_open - state.num_leased:
            demand = dataclasses.replace(demand, is_last=True)
        try:
            taken = np.array(pool.sampler.take(demand), dtype=np.int64)
        except Exception as error:  # noqa: BLE001 - the user's own class
            pool.failure = error
        pool.check()
        self._drop_stale(state, pool)
        if not len(taken):
            if self.is_closed and not state.num_open:
                raise EndOfStream(pool.task)
            return None
        self._discard(state, taken, pool)
        lease = LeaseRecord(secrets.randbits(63), pool.task, owner, taken, fields, timeout_s, now_s + timeout_s)
        self._leases[lease.lease_id] = lease
        self._num_leases[taken] = self._num_leases[taken] + 1
        state.num_leased += len(taken)
        heapq.heappush(self._deadlines, (lease.deadline_s, lease.lease_id))
        return lease

    def locate(self, rows: Rows, fields: Iterable[str]) -> list[Written]:
        """Return where the fields of rows lie."""
        return [Written(name, self._places[name][rows], self._lengths[name][rows]) for name in fields]

    def _drop_stale(self, state: _TaskState, pool: Pool) -> None:
        stale = np.array(pool.sampler.take_stale(), dtype=np.int64)
        if len(stale):
            self._discard(state, stale, pool)
            state.num_stale += len(stale)
            self._commit_rows(state, stale)

    def _discard(self, state: _TaskState, rows: Rows, but: Pool) -> None:
        for pool in state.pools:
            if pool is not but:
                pool.feed(functools.partial(pool.sampler.discard, rows.tolist()))

    # ------------------------------------------------------------------ leases end
    def check_lease(self, now_s: float, lease_id: int, task: str, owner: str) -> LeaseRecord:
        """Return a lease that is alive.

        Raises:
            LeaseLostError: it is not, or belongs to somebody else.
        """
        self.expire(now_s)
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseLostError(lease_id, task, self._ends.get(lease_id, "was not given by this queue"))
        if lease.owner != owner:
            raise LeaseLostError(lease_id, task, "belongs to another consumer")
        return lease

    def commit(self, now_s: float, lease_id: int, task: str, owner: str) -> None:
        """Say that a lease's rows are done: the task never sees them again.

        Raises:
            LeaseLostError: the lease is not alive, or belongs to somebody else.
        """
        lease = self.check_lease(now_s, lease_id, task, owner)
        rows = self._end(lease, "was committed before")
        state = self._tasks[lease.task]
        state.num_committed += len(rows)
        self._commit_rows(state, rows)

    def release(self, now_s: float, lease_id: int, task: str, owner: str) -> list[Pool]:
        """Give a lease's rows back, to be leased again. Returns the pools that have got them.

        Raises:
            LeaseLostError: the lease is not alive, or belongs to somebody else.
        """
        return self._give_back(self.check_lease(now_s, lease_id, task, owner), "was released before")

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

    def expire(self, now_s: float) -> list[Pool]:
        """Give back the rows of leases that ran out. Returns the pools that have got them."""
        filled = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, lease_id = heapq.heappop(self._deadlines)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.deadline_s > now_s:
                heapq.heappush(self._deadlines, (lease.deadline_s, lease_id))
                continue
            self._tasks[lease.task].num_expired += 1
            filled += self._give_back(lease, f"ran out after {lease.timeout_s:g} s")
        return filled

    def release_owner(self, owner: str) -> list[Pool]:
        """Give back all that a consumer had leased: it is gone."""
        filled = []
        for lease in [lease for lease in self._leases.values() if lease.owner == owner]:
            filled += self._give_back(lease, "was given back, because its owner was gone")
        return filled

    def _give_back(self, lease: LeaseRecord, why: str) -> list[Pool]:
        rows = self._end(lease, why)
        state = self._tasks[lease.task]
        state.num_redelivered += len(rows)
        filled = []
        for pool in state.pools:
            wanted = np.uint64(pool.mask)
            ready = rows[(self._ready[rows] & wanted) == wanted]
            if len(ready):
                self._add(ready, pool)
                filled.append(pool)
        return filled

    def _end(self, lease: LeaseRecord, why: str) -> Rows:
        """Take a lease off its rows; return those that still exist."""
        del self._leases[lease.lease_id]
        self._ends[lease.lease_id] = why
        if len(self._ends) > _REMEMBERED_ENDS:
            del self._ends[next(iter(self._ends))]
        rows = lease.rows
        if self._held:
            is_held = np.array([row in self._held for row in rows.tolist()])
            for row in rows[is_held].tolist():
                num_leases, places, sizes = self._held.pop(row)
                if num_leases > 1:
                    self._held[row] = (num_leases - 1, places, sizes)
                else:
                    self._freed.append((places, sizes))
            rows = rows[~is_held]
        self._tasks[lease.task].num_leased -= len(rows)
        self._num_leases[rows] = self._num_leases[rows] - 1
        return rows

    def _commit_rows(self, state: _TaskState, rows: Rows) -> None:
        committed = self._committed[rows] | np.uint64(state.bit)
        self._committed[rows] = committed
        state.num_open -= len(rows)
        if self.clear_consumed:
            done = rows[committed == self._all_tasks]
            if len(done):
                self._remove(done)

    # ------------------------------------------------------------------ rows go
    def clear(self, rows: Rows | None = None) -> None:
        """Forget rows, whoever has not seen them yet.

        Args:
            rows: which; ``None`` for all.

        Raises:
            DuplicateRowError: a row twice.
            UnknownRowError: a row does not exist.
        """
        if rows is None:
            rows = self._table.all_rows()
        self._check_rows(rows, np.uint64(0))
        committed = self._committed[rows]
        if self._num_leases[rows].any():
            for lease in self._leases.values():
                self._tasks[lease.task].num_leased -= int(np.isin(lease.rows, rows).sum())
        for state in self._tasks.values():
            unseen = rows[(committed & np.uint64(state.bit)) == 0]
            state.num_open -= len(unseen)
            if len(unseen):
                for pool in state.pools:
                    for candidates in self._known(unseen, pool):
                        pool.feed(functools.partial(pool.sampler.drop, candidates))
        self._remove(rows)

    def close(self) -> None:
        """No more rows will come."""
        self.is_closed = True

    def take_freed(self) -> tuple[Rows, Rows]:
        """Return places and sizes in bytes that nobody will read again, since the last call."""
        freed, self._freed = self._freed, []
        if not freed:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        places = np.concatenate([places for places, _ in freed])
        sizes = np.concatenate([sizes for _, sizes in freed])
        return places[sizes > 0], sizes[sizes > 0]

    def _remove(self, rows: Rows) -> None:
        ready = self._ready[rows]
        num_leases = self._num_leases[rows]
        is_leased = num_leases > 0
        free = ~is_leased
        for name in self.schema:
            has = (ready & np.uint64(self.schema.bits((name,)))) != 0
            sizes = self._lengths[name][rows] * self.schema[name].entry_bytes
            self.num_bytes -= int(sizes[has].sum())
            if (has & free).any():
                self._freed.append((self._places[name][rows[has & free]], sizes[has & free]))
        for row, count, word in zip(
            rows[is_leased].tolist(), num_leases[is_leased].tolist(), ready[is_leased].tolist(), strict=True
        ):
            one = np.array([row])
            names = self.schema.names(word)
            places = np.concatenate([self._places[name][one] for name in names])
            sizes = np.concatenate([self._lengths[name][one] * self.schema[name].entry_bytes for name in names])
            self._held[row] = (count, places, sizes)
        self._table.remove(rows)
        self.num_cleared += len(rows)

    # ------------------------------------------------------------------ looking
    def statistics(self) -> dict[str, TaskStatistics]:
        """Return each task's view."""
        return {
            name: TaskStatistics(
                len(state.pools[0].sampler),
                state.num_leased,
                state.num_open,
                state.num_committed,
                state.num_redelivered,
                state.num_expired,
                state.num_stale,
            )
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

    def _add(self, rows: Rows, pool: Pool) -> None:
        pool.feed(functools.partial(pool.sampler.add, self._candidates(rows, pool)))

    def _candidates(self, rows: Rows, pool: Pool) -> Candidates:
        num_tokens = np.zeros(len(rows), np.int64)
        for name in pool.token_fields:
            num_tokens += self._lengths[name][rows]
        return Candidates(rows, num_tokens, {tag: self._tags[tag][rows] for tag in pool.sampler.tags})

    def _known(self, rows: Rows, pool: Pool) -> list[Candidates]:
        """Return rows with the tags that were written: one part with all of them, one with none."""
        wanted = np.uint64(self.schema.bits(pool.sampler.tags))
        has_tags = (self._ready[rows] & wanted) == wanted
        with_tags = self._candidates(rows[has_tags], pool)
        without = Candidates(rows[~has_tags], np.zeros(int((~has_tags).sum()), np.int64))
        return [part for part in (with_tags, without) if len(part.rows)]
