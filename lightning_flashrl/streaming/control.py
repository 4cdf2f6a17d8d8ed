"""The ledger at work: requests that may have to wait, room for new rows, and memory that comes back.

=====================  =========================================================  ==================================
a request              waits for                                                  unblocked by
=====================  =========================================================  ==================================
lease                  enough rows that are ready for its task and not leased     put · release · expiry · clear · close
put of new rows        room: fewer rows and bytes than the bounds                 commit by the last task · clear
put of more fields     nothing: only complete rows can leave and make room
=====================  =========================================================  ==================================

A request that waits is a :class:`Ticket`; whoever changes something serves the tickets that it concerns, first come,
first served. Nothing here blocks: a caller in the same process waits for its ticket, one behind a socket for an answer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_flashrl.errors import (
    ConfigurationError,
    EndOfStream,
    FlashRLError,
    LeaseTimeoutError,
    QueueFullError,
)
from lightning_flashrl.streaming.ledger import LeaseRecord, Ledger, Origin, Pool, Task, TaskStatistics, Written
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.samplers import Demand, Sampler
from lightning_flashrl.streaming.schema import Schema
from lightning_flashrl.streaming.storage import Allocator, unit_of


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What is in a queue, and what has passed.

    Attributes:
        is_closed: whether new rows are refused.
        num_rows: rows in the queue.
        num_bytes: payload of these rows.
        num_put: rows put since the start.
        num_cleared: rows that are gone.
        num_waiting_puts: producers that wait for room.
        num_waiting_leases: consumers that wait for rows.
        tasks: by name.
    """

    is_closed: bool
    num_rows: int
    num_bytes: int
    num_put: int
    num_cleared: int
    num_waiting_puts: int
    num_waiting_leases: int
    tasks: dict[str, TaskStatistics]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a queue takes before producers of new rows wait.

    Attributes:
        max_rows: rows in the queue; 0 for no bound.
        max_bytes: their payload; 0 for no bound.

    Raises:
        ConfigurationError: a negative bound.
    """

    max_rows: int = 0
    max_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_bytes"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name}={getattr(self, name)}; use 0 for no bound, or more")


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a consumer asks for.

    Attributes:
        task: for which task.
        fields: what to bring; empty for the task's own.
        demand: how much.
        owner: who asks.
        timeout_s: how long the lease lasts without being renewed.
        sampler: another one than the task's, or the name under which the queue knows it.
        origin: who asks, and the number of the request; ``None`` if it is never asked again.
    """

    task: str
    fields: tuple[str, ...]
    demand: Demand
    owner: str
    timeout_s: float
    sampler: Sampler | str | None = None
    origin: Origin = None


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease and where its rows lie."""

    lease: LeaseRecord
    written: list[Written]


class Ticket:
    """A request that may wait.

    Attributes:
        is_done: whether it has its answer.
        answer: what it asked for.
        error: why it will not get that.
    """

    def __init__(self, attempt: Callable[[], Any], on_done: Callable[[Ticket], None], replica_rank: int = 0) -> None:
        self.is_done = False
        self.answer: Any = None
        self.error: FlashRLError | None = None
        self.replica_rank = replica_rank
        self._attempt = attempt
        self._on_done = on_done

    def serve(self) -> bool:
        """Try again; return whether there is an answer now."""
        try:
            self.answer = self._attempt()
        except FlashRLError as error:
            self.error = error
        if self.answer is None and self.error is None:
            return False
        self.finish()
        return True

    def finish(self, error: FlashRLError | None = None) -> None:
        """End the wait."""
        self.error = error or self.error
        self.is_done = True
        self._on_done(self)


@dataclass(slots=True)
class _Line:
    """Tickets in the order in which they came."""

    tickets: list[Ticket] = field(default_factory=list)

    def serve(self) -> None:
        """Serve whom it is possible to serve; nobody overtakes an earlier ticket of the same replica."""
        blocked: set[int] = set()
        for ticket in list(self.tickets):
            if ticket.replica_rank not in blocked:
                if ticket.serve():
                    self.tickets.remove(ticket)
                else:
                    blocked.add(ticket.replica_rank)


class Control:
    """All decisions about a queue's rows, for threads of one process. Take :attr:`lock` around several calls.

    Args:
        schema: of the rows.
        tasks: who reads them.
        allocators: of each storage unit.
        bounds: how much the queue takes.
        clear_consumed: whether a row goes once all tasks have committed it.
        samplers: more samplers, by the name that a lease uses.
        now_s: the clock.
    """

    def __init__(
        self,
        schema: Schema,
        tasks: dict[str, Task],
        allocators: Sequence[Allocator],
        bounds: Bounds,
        *,
        clear_consumed: bool,
        samplers: dict[str, Sampler],
        now_s: Callable[[], float],
    ) -> None:
        self.lock = threading.RLock()
        self.schema = schema
        self.bounds = bounds
        self.ledger = Ledger(schema, tasks, clear_consumed=clear_consumed)
        self._allocators = allocators
        self._samplers = samplers
        self._now_s = now_s
        self._next_unit = 0
        self._lines: dict[Pool, _Line] = {}
        self._puts = _Line()
        self._num_cleared_seen = 0
        self._is_settling = False

    # ------------------------------------------------------------------ storage
    def grant(self, num_bytes: int, owner: str) -> tuple[int, int]:
        """Give a writer an extent; return its place and size in bytes."""
        with self.lock:
            allocator = self._allocators[self._next_unit]
            self._next_unit = (self._next_unit + 1) % len(self._allocators)
            extent = allocator.grant(num_bytes, owner)
            return extent.place, extent.size_bytes

    def seal(self, where: int, owner: str) -> None:
        """A writer is done with an extent."""
        with self.lock:
            allocator = self._allocator(where)
            extent = None if allocator is None else allocator.find(where)
            if allocator is not None and extent is not None and extent.owner == owner and not extent.is_sealed:
                allocator.seal(extent)

    def _allocator(self, where: int) -> Allocator | None:
        unit = unit_of(where)
        return self._allocators[unit] if 0 <= unit < len(self._allocators) else None

    def _count(self, written: Sequence[Written]) -> None:
        for column in written:
            sizes = column.lengths * self.schema[column.field].entry_bytes
            total = int(sizes.sum())
            if total:
                where = int(column.places[sizes > 0][0])
                allocator = self._allocator(where)
                extent = None if allocator is None else allocator.find(where)
                assert allocator is not None
                assert extent is not None
                allocator.add(extent, total)

    @contextlib.contextmanager
    def _acting(self) -> Iterator[None]:
        """Change something, and let it have its consequences, also if it ends with an error."""
        with self.lock:
            try:
                yield
            finally:
                self._settle()

    def _settle(self) -> None:
        """Memory comes back, producers find room, consumers get rows; until nothing follows any more."""
        if self._is_settling:
            return
        self._is_settling = True
        try:
            while True:
                self._free()
                if self.ledger.num_cleared != self._num_cleared_seen:
                    self._num_cleared_seen = self.ledger.num_cleared
                    self._puts.serve()
                pools = self.ledger.take_filled()
                if not pools:
                    return
                for pool in pools:
                    if pool in self._lines:
                        self._serve(pool)
        finally:
            self._is_settling = False

    def _free(self) -> None:
        places, sizes = self.ledger.take_freed()
        if not len(places):
            return
        units = unit_of(places)
        if (units == units[0]).all():
            self._allocators[int(units[0])].free(places, sizes)
        else:
            for unit in np.unique(units).tolist():
                self._allocators[unit].free(places[units == unit], sizes[units == unit])

    # ------------------------------------------------------------------ verbs
    def put(
        self,
        written: Sequence[Written],
        rows: Rows | None,
        on_done: Callable[[Ticket], None],
        lease: tuple[int, str, str] | None = None,
        origin: Origin = None,
    ) -> Ticket:
        """Make fields visible; new rows wait for room. The answer is the rows.

        Args:
            written: the fields.
            rows: of which rows; ``None`` for new ones.
            on_done: called once, perhaps at once.
            lease: its id, task and owner: its rows that are written are committed with it, or nothing is done. Not for
                new rows.
            origin: who asks, and the number of the request.

        Raises:
            ConfigurationError: more than the bounds, so that it would wait for ever.
        """
        assert lease is None or rows is not None
        num_rows = 0 if rows is not None else len(written[0].lengths)
        num_bytes = sum(int(column.lengths.sum()) * self.schema[column.field].entry_bytes for column in written)

        def attempt() -> Rows | None:
            ledger, now_s = self.ledger, self._now_s()
            if lease is not None and rows is not None:
                ledger.put_and_commit(now_s, written, rows, *lease, origin)
                self._count(written)
                return rows
            if rows is None and not ledger.is_closed and not self._has_room(num_rows, num_bytes):
                return None
            taken = ledger.put(written, rows, origin)
            self._count(written)
            return taken

        with self._acting():
            ticket = Ticket(attempt, on_done)
            if rows is not None:
                ticket.serve()
            else:
                self._check_fits(num_rows, num_bytes)
                self._puts.tickets.append(ticket)
                self._puts.serve()
            return ticket

    def restore(
        self,
        rows: Rows,
        written: Sequence[Written],
        committed: Mapping[str, npt.NDArray[np.bool_]],
        leased: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        """Take rows of an earlier queue; see :meth:`Ledger.restore`."""
        with self._acting():
            self.ledger.restore(rows, written, committed, leased)
            self._count(written)

    def _check_fits(self, num_rows: int, num_bytes: int) -> None:
        bounds = self.bounds
        if num_rows > (bounds.max_rows or num_rows) or num_bytes > (bounds.max_bytes or num_bytes):
            raise ConfigurationError(
                f"a put of {num_rows} row(s) and {num_bytes} bytes never fits into max_rows={bounds.max_rows}, "
                f"max_bytes={bounds.max_bytes}; put fewer rows at a time, or raise the bound"
            )

    def _has_room(self, num_rows: int, num_bytes: int) -> bool:
        ledger, bounds = self.ledger, self.bounds
        return (not bounds.max_rows or ledger.num_rows + num_rows <= bounds.max_rows) and (
            not bounds.max_bytes or ledger.num_bytes + num_bytes <= bounds.max_bytes
        )

    def full_error(self, timeout_s: float) -> QueueFullError:
        """Return what to tell a producer that waited long enough."""
        ledger = self.ledger
        return QueueFullError(timeout_s, ledger.num_rows, self.bounds.max_rows, ledger.num_bytes, self.bounds.max_bytes)

    def lease(self, request: LeaseRequest, on_done: Callable[[Ticket], None]) -> Ticket:
        """Lease rows, once enough are ready. The answer is a :class:`Grant`.

        Raises:
            UnknownTaskError: no such task.
            UnknownFieldError: no such field.
            ConfigurationError: the demand can never be met, or there is no sampler of that name.
        """
        with self._acting():
            pool = self._pool(request)
            pool.sampler.check(request.demand)
            fields = self.ledger.wanted_fields(request.task, request.fields)

            def attempt() -> Grant | None:
                taken = self.ledger.lease(
                    self._now_s(), pool, request.demand, fields, request.owner, request.timeout_s, request.origin
                )
                return None if taken is None else Grant(*taken)

            ticket = Ticket(attempt, on_done, request.demand.replica_rank)
            line = self._lines.setdefault(pool, _Line())
            line.tickets.append(ticket)
            self.ledger.expire(self._now_s())
            self._serve(pool)
            return ticket

    def _serve(self, pool: Pool) -> None:
        line = self._lines[pool]
        line.serve()
        if not line.tickets:
            self._lines.pop(pool, None)

    def _pool(self, request: LeaseRequest) -> Pool:
        sampler = request.sampler
        if isinstance(sampler, str):
            if sampler not in self._samplers:
                raise ConfigurationError(
                    f"unknown sampler {sampler!r}; the queue was made with samplers={{{', '.join(self._samplers)}}}"
                )
            sampler = self._samplers[sampler]
        return self.ledger.pool(request.task, request.fields, sampler)

    def cancel(self, ticket: Ticket) -> bool:
        """Give up a wait; return whether it was one. Those who stood behind it may have their turn now."""
        with self._acting():
            if ticket in self._puts.tickets:
                self._puts.tickets.remove(ticket)
                self._puts.serve()
                return True
            for pool, line in self._lines.items():
                if ticket in line.tickets:
                    line.tickets.remove(ticket)
                    self._serve(pool)
                    return True
            return False

    def lease_again(self, lease_id: int, owner: str) -> Grant | None:
        """Say again what a lease brought; ``None`` if it is over."""
        with self.lock:
            found = self.ledger.lease_again(lease_id, owner)
            return None if found is None else Grant(*found)

    def commit(self, lease_id: int, task: str, owner: str, rows: Rows | None = None, origin: Origin = None) -> None:
        """End a lease, or a part of it: its rows are done for this task.

        Raises:
            LeaseLostError: the lease is not alive, belongs to somebody else, or does not have a row.
            DuplicateRowError: a row twice.
        """
        with self._acting():
            self.ledger.commit(self._now_s(), lease_id, task, owner, rows, origin)

    def release(self, lease_id: int, task: str, owner: str, rows: Rows | None = None, origin: Origin = None) -> None:
        """Give a lease's rows, or some of them, back.

        Raises:
            LeaseLostError: the lease is not alive, belongs to somebody else, or does not have a row.
            DuplicateRowError: a row twice.
        """
        with self._acting():
            self.ledger.release(self._now_s(), lease_id, task, owner, rows, origin)

    def renew(self, lease_id: int, task: str, owner: str) -> float:
        """Begin a lease's time anew; return its new deadline.

        Raises:
            LeaseLostError: the lease is not alive, or belongs to somebody else.
        """
        with self._acting():
            return self.ledger.renew(self._now_s(), lease_id, task, owner)

    def clear(self, rows: Rows | None, origin: Origin = None) -> None:
        """Forget rows; ``None`` for all.

        Raises:
            DuplicateRowError: a row twice.
            UnknownRowError: a row is not in the queue.
        """
        with self._acting():
            self.ledger.clear(rows, origin)

    def refresh(self, task: str) -> None:
        """Look at a task's rows again: what its sampler decides by has changed outside of the queue.

        Raises:
            UnknownTaskError: no such task.
        """
        with self._acting():
            for pool in self.ledger.pools(task):
                self.ledger.drain(pool)
                if pool in self._lines:
                    self._serve(pool)

    def tagged(self, field: str, tasks: Sequence[str]) -> tuple[dict[int, Any], dict[str, set[int]]]:
        """Return a field's value of each row that has it, and which of these rows each task has not committed.

        Args:
            field: one number a row.
            tasks: their names.
        """
        values: dict[int, Any] = {}
        is_open: dict[str, set[int]] = {task: set() for task in tasks}
        with self.lock:
            for rows, written, committed in self.ledger.contents():
                tags = next((column.tags for column in written if column.field == field), None)
                if tags is None:
                    continue
                values.update(zip(rows.tolist(), tags.tolist(), strict=True))
                for task in tasks:
                    is_open[task].update(rows[~committed[task]].tolist())
        return values, is_open

    def close(self) -> None:
        """No more rows will come: waiting producers are refused, consumers get what is left, then the end."""
        with self._acting():
            self.ledger.close()
            self._puts.serve()

    def abandon(self) -> None:
        """End every wait: the queue goes."""
        with self.lock:
            self.ledger.close()
            self._puts.serve()
            for pool, line in self._lines.items():
                tickets, line.tickets = line.tickets, []
                for ticket in tickets:
                    ticket.finish(EndOfStream(pool.task))

    def release_owner(self, owner: str) -> None:
        """A client's leases go back."""
        with self._acting():
            self.ledger.release_owner(owner)

    def forget_owner(self, owner: str) -> None:
        """A client is gone: its leases go back, its extents are sealed."""
        with self._acting():
            self.ledger.release_owner(owner)
            self.seal_owner(owner)

    def seal_owner(self, owner: str) -> None:
        """Nothing more is written into a client's extents."""
        with self._acting():
            for allocator in self._allocators:
                for extent in allocator.extents():
                    if extent.owner == owner and not extent.is_sealed:
                        allocator.seal(extent)

    def tick(self) -> float | None:
        """Let leases run out; return when the next one may."""
        with self._acting():
            self.ledger.expire(self._now_s())
        with self.lock:
            return self.ledger.next_deadline_s()

    def timeout_error(self, request: LeaseRequest, timeout_s: float) -> LeaseTimeoutError:
        """Return what to tell a consumer that waited long enough."""
        num_ready = len(self._pool(request).sampler)
        return LeaseTimeoutError(request.task, timeout_s, num_ready, str(request.demand))

    def check_written(self, written: Sequence[Written], rows: Rows | None, owner: str) -> None:
        """Check what a client says it wrote: whole rows inside an extent of its own.

        Raises:
            ValueError: it is not so.
        """
        num_rows = {len(column.lengths) for column in written} | ({len(rows)} if rows is not None else set())
        if len(num_rows) != 1 or len({column.field for column in written}) != len(written) or num_rows == {0}:
            raise ValueError("fields of different numbers of rows")
        with self.lock:
            for column in written:
                start = int(column.places[0])
                end = int(column.places[-1] + column.lengths[-1] * self.schema[column.field].entry_bytes)
                allocator = self._allocator(start)
                extent = None if allocator is None else allocator.find(start)
                if start != end and (
                    extent is None
                    or extent.owner != owner
                    or extent.is_sealed
                    or start < extent.place
                    or end > extent.place + extent.size_bytes
                ):
                    raise ValueError("places that the writer was not granted")

    def statistics(self) -> QueueStatistics:
        """Return what is in the queue."""
        with self.lock:
            ledger = self.ledger
            return QueueStatistics(
                ledger.is_closed,
                ledger.num_rows,
                ledger.num_bytes,
                ledger.num_put,
                ledger.num_cleared,
                len(self._puts.tickets),
                sum(len(line.tickets) for line in self._lines.values()),
                ledger.statistics(),
            )
