"""The TransferQueue: rows and fields between the tasks of a workflow.

::

    put(prompt) ─▶ rollout: lease(prompt) … commit(lease, {response}) ─▶ update: lease(prompt, response) … commit

:class:`TransferQueue` lives in the process that makes it, :mod:`lightning_flashrl.streaming.server` puts the same
verbs behind a socket.

Source: AsyncFlow (arXiv 2507.01663), section 3.
"""

from __future__ import annotations

import abc
import functools
import os
import secrets
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import msgspec
import numpy as np

from lightning_flashrl import clock
from lightning_flashrl.errors import (
    ConfigurationError,
    EndOfStream,
    LeaseLostError,
    QueueClosedError,
    SchemaMismatchError,
    WouldBlock,
)
from lightning_flashrl.files import replacing
from lightning_flashrl.messaging.memory import make_memory
from lightning_flashrl.streaming.control import Bounds, Control, Grant, LeaseRequest, QueueStatistics, Ticket
from lightning_flashrl.streaming.ledger import Ledger, Task, Written
from lightning_flashrl.streaming.memory import UnitAccess, default_capacity_bytes
from lightning_flashrl.streaming.resume import QueueJournal, take_snapshot
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.samplers import Demand, Sampler
from lightning_flashrl.streaming.schema import Batch, Column, Schema
from lightning_flashrl.streaming.storage import Allocator, Writer, gather
from lightning_flashrl.streaming.unit import UnitProcess, UnitSpec

DEFAULT_LEASE_TIMEOUT_S = 300.0
_LOCAL = "local"
_TICK_S = 0.5
"""How often a thread that waits looks whether leases have run out."""


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """Rows of one consumer, until it commits or releases them or their time is over.

    Attributes:
        lease_id: unguessable number.
        task: for which task.
        rows: their numbers, in the order of the batch.
        batch: their fields.
        deadline_s: when they go to somebody else, on :func:`lightning_flashrl.clock.now_s`; :meth:`QueueVerbs.renew`
            gives a new one.
        timeout_s: how long each renewal lasts.
    """

    lease_id: int
    task: str
    rows: tuple[int, ...]
    batch: Batch
    deadline_s: float
    timeout_s: float

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, field: str) -> Any:
        return self.batch[field]


class LeaseOptions(TypedDict, total=False):
    """What else :meth:`QueueVerbs.lease` takes."""

    sampler: Sampler | str | None
    allow_partial: bool
    replica_rank: int
    policy_version: int | None
    micro_batch: int | None
    lease_timeout_s: float | None


class QueueVerbs(abc.ABC):
    """What one does with a queue, wherever it is.

    Attributes:
        schema: of its rows.
        lease_timeout_s: how long a lease lasts without being renewed, unless it says so itself.
    """

    schema: Schema
    lease_timeout_s: float

    # ------------------------------------------------------------------ write
    def put(
        self, data: Mapping[str, Any], rows: Sequence[int] | None = None, *, timeout_s: float | None = None
    ) -> tuple[int, ...]:
        """Write new rows, or fields of rows that are there. Visible at once and whole when this returns.

        Args:
            data: column by field name (see :meth:`Schema.check`). Copied: the caller may change it afterwards.
            rows: which rows; ``None`` for new ones.
            timeout_s: how long new rows may wait for room; ``None`` for as long as it takes. Fields of rows that are
                there never wait, because only complete rows can leave.

        Returns:
            The rows' numbers, in the order of the data.

        Raises:
            SchemaMismatchError: the data is not what the schema says.
            UnknownFieldError: a field that the schema does not have.
            UnknownRowError: a row is not in the queue.
            DuplicateRowError: a row twice, or a field that it has already.
            QueueFullError: no room in time.
            QueueClosedError: new rows after :meth:`close`.
            ConfigurationError: more than the queue ever takes.
        """
        _check_timeout("timeout_s", timeout_s)
        number = None if rows is None else _as_rows(rows)
        columns = self.schema.check(data, None if number is None else len(number))
        if not len(columns[0].lengths):
            return ()
        return tuple(self._write(columns, number, timeout_s).tolist())

    # ------------------------------------------------------------------ read
    def lease(
        self,
        task: str,
        fields: Iterable[str] = (),
        count: int | None = None,
        tokens: int | None = None,
        *,
        sampler: Sampler | str | None = None,
        timeout_s: float | None = None,
        allow_partial: bool = False,
        replica_rank: int = 0,
        policy_version: int | None = None,
        micro_batch: int | None = None,
        lease_timeout_s: float | None = None,
    ) -> Lease:
        """Take rows that are ready; they are the caller's until it commits or releases them.

        Args:
            task: for which task; one that the queue was made with.
            fields: what to bring; empty for the task's own. Rows count as ready when they have all of them.
            count: this many rows, or
            tokens: as many rows as fit into so many tokens (entries of the ragged fields); a longer row comes alone.
            sampler: another than the task's, or its name in ``TransferQueue(samplers=...)``.
            timeout_s: how long to wait; ``None`` for as long as it takes.
            allow_partial: take what is ready, if it is at least one row. Once the queue is closed, the last rows of a
                task come in any case.
            replica_rank: which data-parallel replica asks, for samplers that divide rows between them.
            policy_version: the version that will be trained, for samplers that bound staleness.
            micro_batch: how many micro-batches of this step the replica has asked for before, for samplers that give
                the same rows again to who asks again.
            lease_timeout_s: how long the lease lasts without being renewed; then its rows go to others.

        Raises:
            EndOfStream: the queue is closed, and the task has committed all its rows.
            LeaseTimeoutError: not enough rows in time.
            UnknownTaskError: no such task.
            UnknownFieldError: no such field.
            ConfigurationError: a count or time-out that cannot be, or that the sampler can never serve.
        """
        demand = Demand(count, tokens, allow_partial, False, replica_rank, policy_version, micro_batch)
        request = self._request(task, fields, demand, sampler, lease_timeout_s)
        return self._lease(request, _check_timeout("timeout_s", timeout_s))

    def lease_nowait(
        self,
        task: str,
        fields: Iterable[str] = (),
        count: int | None = None,
        tokens: int | None = None,
        **options: Unpack[LeaseOptions],
    ) -> Lease:
        """Take rows that are ready now; arguments and errors as for :meth:`lease`, without ``timeout_s``.

        Raises:
            WouldBlock: not enough rows are ready.
        """
        return self.lease(task, fields, count, tokens, timeout_s=0.0, **options)

    def _request(
        self,
        task: str,
        fields: Iterable[str],
        demand: Demand,
        sampler: Sampler | str | None,
        lease_timeout_s: float | None,
    ) -> LeaseRequest:
        count, tokens = demand.count, demand.tokens
        if (count is None) == (tokens is None):
            raise ConfigurationError(f"count={count} and tokens={tokens}; give one of the two")
        for name, value in (("count", count), ("tokens", tokens)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(f"{name}={value!r}; use a whole number from 1 on")
        lasts_s = self.lease_timeout_s if lease_timeout_s is None else lease_timeout_s
        if not lasts_s > 0:
            raise ConfigurationError(f"lease_timeout_s={lasts_s}; use a time above 0 s")
        names = (fields,) if isinstance(fields, str) else tuple(fields)
        return LeaseRequest(task, names, demand, self._owner, lasts_s, sampler)

    def _open(self, grant: Grant, units: Sequence[UnitAccess]) -> Lease:
        """Copy a lease's rows out of storage units."""
        lease = grant.lease
        try:
            columns = {
                column.field: self.schema.restore(
                    column.field,
                    gather(units, column.places, column.lengths, self.schema[column.field].entry_bytes),
                    column.lengths,
                )
                for column in grant.written
            }
            if clock.now_s() > lease.deadline_s:  # the rows' memory may have been written anew while it was read
                raise LeaseLostError(
                    lease.lease_id, lease.task, f"ran out after {lease.timeout_s:g} s, while its rows were copied"
                )
        except LeaseLostError:
            raise
        except BaseException:
            self._release(lease.lease_id, lease.task)
            raise
        return Lease(
            lease.lease_id, lease.task, tuple(lease.rows.tolist()), Batch(columns), lease.deadline_s, lease.timeout_s
        )

    # ------------------------------------------------------------------ leases end
    def commit(self, lease: Lease, data: Mapping[str, Any] | None = None, *, rows: Sequence[int] | None = None) -> None:
        """Say that a lease's rows are done: this task never sees them again.

        Args:
            lease: from :meth:`lease`.
            data: fields of the rows to write in the same instant: either all is done or, if the lease was lost
                meanwhile, nothing. A worker that is slow to die can so never write over its successor's work.
            rows: which of the lease's rows; ``None`` for all that are left. The lease goes on with the others.

        Raises:
            LeaseLostError: the lease ran out, is over already, was never given by this queue, or does not have a row.
            SchemaMismatchError: the data is not what the schema says; the lease goes on.
            DuplicateRowError: a row twice, or it has one of these fields already; the lease goes on.
            UnknownRowError: a row has been cleared; the lease goes on.
        """
        some = None if rows is None else _as_rows(rows)
        if data is None or (some is not None and not len(some)):
            self._commit(lease.lease_id, lease.task, some)
            return
        some = _as_rows(lease.rows) if some is None else some
        columns = self.schema.check(data, len(some))
        self._write(columns, some, 0.0, (lease.lease_id, lease.task))

    def release(self, lease: Lease, *, rows: Sequence[int] | None = None) -> None:
        """Give a lease's rows back, to be leased again.

        Args:
            lease: from :meth:`lease`.
            rows: which of them; ``None`` for all that are left. The lease goes on with the others.

        Raises:
            LeaseLostError: the lease ran out, is over already, was never given by this queue, or does not have a row.
            DuplicateRowError: a row twice.
        """
        self._release(lease.lease_id, lease.task, None if rows is None else _as_rows(rows))

    def renew(self, lease: Lease) -> Lease:
        """Begin a lease's time anew. Returns the lease with its new deadline.

        Raises:
            LeaseLostError: the lease ran out, is over already, or was never given by this queue.
        """
        deadline_s = self._renew(lease.lease_id, lease.task, lease.timeout_s)
        return Lease(lease.lease_id, lease.task, lease.rows, lease.batch, deadline_s, lease.timeout_s)

    # ------------------------------------------------------------------ rows go
    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget rows, whoever has not seen them yet, and give their memory back.

        Args:
            rows: which; ``None`` for all. Rows under lease go too; their memory stays until the lease is over.

        Raises:
            UnknownRowError: a row is not in the queue.
            DuplicateRowError: a row twice.
        """
        self._clear(None if rows is None else _as_rows(rows))

    @abc.abstractmethod
    def close(self) -> None:
        """Say that no new rows will come.

        Fields of rows that are there are still taken; consumers get what is left, then :class:`EndOfStream`.
        """

    @abc.abstractmethod
    def statistics(self) -> QueueStatistics:
        """Return what is in the queue, and what has passed."""

    # ------------------------------------------------------------------ where it is
    _owner: str

    @abc.abstractmethod
    def _write(
        self,
        columns: Sequence[Column],
        rows: Rows | None,
        timeout_s: float | None,
        lease: tuple[int, str] | None = None,
    ) -> Rows: ...

    @abc.abstractmethod
    def _lease(self, request: LeaseRequest, timeout_s: float | None) -> Lease: ...

    @abc.abstractmethod
    def _commit(self, lease_id: int, task: str, rows: Rows | None) -> None: ...

    @abc.abstractmethod
    def _release(self, lease_id: int, task: str, rows: Rows | None = None) -> None: ...

    @abc.abstractmethod
    def _renew(self, lease_id: int, task: str, timeout_s: float) -> float: ...

    @abc.abstractmethod
    def _clear(self, rows: Rows | None) -> None: ...


class TransferQueue(QueueVerbs):
    """A queue in this process, for any number of threads.

    Args:
        schema: the rows' fields, or a mapping of such.
        tasks: who reads them, by name: a :class:`Task`, the names of the fields it reads, or nothing for all fields.
        max_rows: rows in the queue before producers of new ones wait; 0 for no bound.
        max_bytes: their payload before producers of new ones wait; 0 for no bound.
        lease_timeout_s: how long a lease lasts without being renewed.
        clear_consumed: whether a row goes once all tasks have committed it; otherwise only :meth:`clear` removes rows.
        samplers: more samplers, by the name that a lease uses.
        num_storage_units: processes that hold the rows; 0 keeps them in this process.
        host: address on which units, and a server of this queue, listen.
        secret: whoever has it may connect to them; a fresh one if none is given.
        journal: a file in which every change is written down. If it is there already, the queue goes on with the rows
            and leases of the one that wrote it, whatever ended that. Delete it to begin with nothing.
        hear_note: gets what was last written down with :meth:`note`, before any row is there.
        snapshot: what :meth:`snapshot` of another queue has returned: the queue begins with its rows. A journal that is
            there already comes first.

    Attributes:
        secret: for clients.

    Raises:
        ConfigurationError: a bound, time-out, task or sampler that cannot be.
        UnknownFieldError: a task or sampler names a field that is not in the schema.
        QueueUnavailableError: a storage unit did not come up.
        JournalError: the journal is damaged, cannot be written, or another queue writes to it.

    >>> import torch
    >>> from lightning_flashrl.streaming import Field
    >>> fields = {"prompt": Field(torch.int64, (None,)), "response": Field(torch.int64, (None,))}
    >>> with TransferQueue(fields, {"rollout": ["prompt"], "train": ["prompt", "response"]}) as queue:
    ...     rows = queue.put({"prompt": [[1, 2, 3], [4]]})
    ...     lease = queue.lease("rollout", count=2)
    ...     queue.commit(lease, {"response": [[5], [6, 7]]})
    ...     queue.lease("train", count=2)["response"].values
    tensor([5, 6, 7])
    """

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        tasks: Mapping[str, Task | Iterable[str]] | Iterable[str],
        *,
        max_rows: int = 0,
        max_bytes: int = 0,
        lease_timeout_s: float = DEFAULT_LEASE_TIMEOUT_S,
        clear_consumed: bool = True,
        samplers: Mapping[str, Sampler] | None = None,
        num_storage_units: int = 0,
        host: str = "127.0.0.1",
        secret: str | None = None,
        journal: str | Path | None = None,
        hear_note: Callable[[bytes], None] | None = None,
        snapshot: bytes | None = None,
    ) -> None:
        self._is_closed = self._is_shut_down = True  # until there is something to close
        self.schema = schema if isinstance(schema, Schema) else Schema(schema)
        if not lease_timeout_s > 0:
            raise ConfigurationError(f"lease_timeout_s={lease_timeout_s}; use a time above 0 s")
        self.lease_timeout_s = lease_timeout_s
        self._owner = _LOCAL
        if num_storage_units < 0:
            raise ConfigurationError(f"num_storage_units={num_storage_units}; use 0 or more")
        self.host = host
        self.secret = secret or secrets.token_hex(16)
        bounds, named, checked_tasks = Bounds(max_rows, max_bytes), dict(samplers or {}), _as_tasks(tasks)
        Ledger(self.schema, checked_tasks)  # says what is wrong before anything is started
        self.journal: QueueJournal | None = None
        if journal is not None:
            if snapshot is not None and not Path(journal).exists():
                with replacing(Path(journal)) as beside:
                    beside.write_bytes(snapshot)
            self.journal = QueueJournal(Path(journal), self.schema, tuple(checked_tasks), clear_consumed=clear_consumed)
        self.unit_processes = tuple(UnitProcess(self.secret, host) for _ in range(num_storage_units))
        if num_storage_units:
            memories = [process.memory for process in self.unit_processes]
        else:
            memory, mark = make_memory(default_capacity_bytes())
            self._own_unit = UnitSpec(os.getpid(), memory.fd, memory.capacity_bytes, mark, "")
            memories = [memory]
        self.units = [UnitAccess(memory) for memory in memories]
        self.control = Control(
            self.schema,
            checked_tasks,
            [Allocator(number, memory.capacity_bytes, memory.forget) for number, memory in enumerate(memories)],
            bounds,
            clear_consumed=clear_consumed,
            samplers=named,
            now_s=clock.now_s,
        )
        self._writer = Writer(
            self.schema,
            self.units,
            functools.partial(self.control.grant, owner=_LOCAL),
            functools.partial(self.control.seal, owner=_LOCAL),
        )
        self._is_closed = self._is_shut_down = False
        try:
            if self.journal is not None:
                self._follow(self.journal, hear_note)
                self.control.release_owner(_LOCAL)  # threads of a process that is gone
            elif snapshot is not None:
                with tempfile.TemporaryDirectory(prefix="flashrl-") as folder:
                    path = Path(folder) / "snapshot"
                    path.write_bytes(snapshot)
                    found = QueueJournal(path, self.schema, tuple(checked_tasks), clear_consumed=clear_consumed)
                    self._follow(found, hear_note)
                    self.control.ledger.log = None
                    found.end()
        except BaseException:
            self.journal = None
            self.shutdown()
            raise

    def _follow(self, journal: QueueJournal, hear_note: Callable[[bytes], None] | None) -> None:
        control = self.control
        journal.begin(control.ledger, self._writer, control.restore, self._bytes_of, clock.now_s(), hear_note)

    def _bytes_of(self, column: Written) -> bytes:
        entry_bytes = self.schema[column.field].entry_bytes
        return gather(self.units, column.places, column.lengths, entry_bytes).numpy().tobytes()

    @property
    def unit_specs(self) -> tuple[UnitSpec, ...]:
        """How to reach the storage units, as they are now."""
        if not self.unit_processes:
            return (self._own_unit,)
        pid = os.getpid()  # keeps their memory, whoever of them is gone
        return tuple(msgspec.structs.replace(one.spec, pid=pid, fd=one.memory.fd) for one in self.unit_processes)

    # ------------------------------------------------------------------ verbs
    def close(self) -> None:
        """Say that no new rows will come.

        Fields of rows that are there are still taken; consumers get what is left, then :class:`EndOfStream`.
        """
        self._is_closed = True
        self.control.close()

    def shutdown(self) -> None:
        """Throw away what is in the queue and end every wait. A journal stays."""
        if not self._is_shut_down:
            self._is_closed = self._is_shut_down = True
            if self.journal is not None:
                with self.control.lock:
                    self.control.ledger.log = None
                    self.journal.end()
            self.control.abandon()
            for process in self.unit_processes:  # they serve this memory
                process.close()
            for unit in self.units:
                unit.close()

    def note(self, payload: bytes) -> None:
        """Keep what the application has to say in the journal, for ``hear_note`` of the next queue.

        What was said before does not count any more.

        Raises:
            ConfigurationError: the queue has no journal.
            JournalError: it cannot be written.
        """
        if self.journal is None:
            raise ConfigurationError("note() of a queue without a journal; give TransferQueue(journal=...)")
        with self.control.lock:
            self.journal.note(payload)

    def snapshot(self, note: bytes | None = None, *, without: tuple[str, str] | None = None) -> bytes:
        """Return the rows that are in the queue, for another one: as if they had just been put and nobody leased them.

        Args:
            note: what ``hear_note`` of that queue gets.
            without: a task and a field: as if the task had not been at work, and nobody had written the field.
        """
        with self.control.lock:
            return take_snapshot(self.control.ledger, self._bytes_of, note, without)

    def statistics(self) -> QueueStatistics:
        """Return what is in the queue, and what has passed."""
        return self.control.statistics()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not self._is_closed:
            for process in self.unit_processes:
                process.close()
            warnings.warn(
                "a TransferQueue was dropped without close(); use it as a context manager",
                ResourceWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------ here
    def _write(
        self,
        columns: Sequence[Column],
        rows: Rows | None,
        timeout_s: float | None,
        lease: tuple[int, str] | None = None,
    ) -> Rows:
        held = None if lease is None else (*lease, _LOCAL)
        with self._writer.write(columns) as written:
            if self._is_shut_down:
                raise QueueClosedError
            answer: Rows = self._wait(
                lambda on_done: self.control.put(written, rows, on_done, held),
                timeout_s,
                lambda: self.control.full_error(timeout_s or 0.0),
            )
        return answer

    def _lease(self, request: LeaseRequest, timeout_s: float | None) -> Lease:
        if self._is_shut_down:
            raise EndOfStream(request.task)
        grant: Grant = self._wait(
            lambda on_done: self.control.lease(request, on_done),
            timeout_s,
            lambda: self.control.timeout_error(request, timeout_s or 0.0),
        )
        return self._open(grant, self.units)

    def _wait(
        self,
        ask: Callable[[Callable[[Ticket], None]], Ticket],
        timeout_s: float | None,
        too_late: Callable[[], WouldBlock],
    ) -> Any:
        event = threading.Event()
        ticket = ask(lambda _: event.set())
        if not ticket.is_done:
            deadline_s = None if timeout_s is None else clock.now_s() + timeout_s
            try:
                self._wait_until(event, deadline_s)
            except BaseException:
                if not self.control.cancel(ticket) and isinstance(ticket.answer, Grant):
                    self._release(ticket.answer.lease.lease_id, ticket.answer.lease.task)
                raise
            if not event.is_set() and self.control.cancel(ticket):
                raise too_late()
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def _wait_until(self, event: threading.Event, deadline_s: float | None) -> None:
        """Wait, and meanwhile let leases run out: nobody else may be there to do it."""
        while not event.is_set():
            now_s = clock.now_s()
            if deadline_s is not None and now_s >= deadline_s:
                return
            # A lease that is given meanwhile may run out before those that are known now: look again soon.
            ends = [now_s + _TICK_S, *(end for end in (deadline_s, self.control.tick()) if end is not None)]
            event.wait(max(0.0, min(ends) - now_s) + 0.0005)

    def _commit(self, lease_id: int, task: str, rows: Rows | None) -> None:
        self.control.commit(lease_id, task, _LOCAL, rows)

    def _release(self, lease_id: int, task: str, rows: Rows | None = None) -> None:
        self.control.release(lease_id, task, _LOCAL, rows)

    def _renew(self, lease_id: int, task: str, timeout_s: float) -> float:
        return self.control.renew(lease_id, task, _LOCAL)

    def _clear(self, rows: Rows | None) -> None:
        self.control.clear(rows)


def _check_timeout(name: str, timeout_s: float | None) -> float | None:
    if timeout_s is not None and not timeout_s >= 0:
        raise ConfigurationError(f"{name}={timeout_s}; use 0 s or more, or None to wait as long as it takes")
    return timeout_s


def _as_rows(rows: Sequence[int]) -> Rows:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
        raise SchemaMismatchError("rows", f"are {rows!r:.100}", "give a list of whole numbers, as put returned them")
    return numbers.astype(np.int64)


def _as_tasks(tasks: Mapping[str, Task | Iterable[str]] | Iterable[str]) -> dict[str, Task]:
    if isinstance(tasks, str):
        tasks = (tasks,)
    if not isinstance(tasks, Mapping):
        return {name: Task() for name in tasks}
    return {name: task if isinstance(task, Task) else Task(tuple(task)) for name, task in tasks.items()}
