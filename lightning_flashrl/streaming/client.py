"""The verbs of a queue that another process serves.

========================  =============================================  =======================================
who                       waits for                                      unblocked by
========================  =============================================  =======================================
client                    the answer to its request                      the server, or its silence for too long
one that has lost it      the next server of a queue with a journal      that one; the end of its patience
========================  =============================================  =======================================
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError, QueueUnavailableError
from lightning_flashrl.messaging.memory import attach_memory
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.streaming import protocol
from lightning_flashrl.streaming.connection import (
    Connection,
    LocalConnection,
    RemoteConnection,
    ThreadedAccess,
    enter,
)
from lightning_flashrl.streaming.control import Grant, LeaseRequest, QueueStatistics
from lightning_flashrl.streaming.identity import ANCHOR, NO_BOOT, OWNER, host_mark
from lightning_flashrl.streaming.ledger import LeaseRecord
from lightning_flashrl.streaming.memory import UnitAccess
from lightning_flashrl.streaming.queue import Lease, QueueVerbs
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.schema import Column
from lightning_flashrl.streaming.storage import Writer
from lightning_flashrl.streaming.unit import UnitSpec

_ANSWER_TIMEOUT_S = 10.0
_RECONNECT_TIMEOUT_S = 60.0
_RECONNECT_PAUSE_S = 0.05
_AnswerT = TypeVar("_AnswerT", bound=protocol.Message)
_ResultT = TypeVar("_ResultT")
Transport = Literal["auto", "shared_memory", "socket"]


class TransferQueueClient(QueueVerbs):
    """A queue that is served elsewhere; for many threads, and it may be pickled for other processes.

    Args:
        endpoint: of the server.
        secret: of the queue.
        transport: ``"shared_memory"`` maps the storage units' memory, ``"socket"`` asks them for rows, ``"auto"`` maps
            what can be mapped.
        answer_timeout_s: how long the server may be silent before it counts as gone.
        reconnect_timeout_s: how long to look for the next server of a queue that has a journal: what was asked is asked
            there again, and done once. Leases go on. 0 to be told at once that the server is gone, as clients of a
            queue without a journal are. It may be changed.
        connect_timeout_s: how long to look for a server at first, where one may be about to come; each try takes
            ``answer_timeout_s``.
        on_lost: is called when a server is gone, before the next one is looked for, in the thread that has noticed it,
            and again whenever that has not answered for ``answer_timeout_s``; also where there was none at first.

    Raises:
        QueueUnavailableError: nobody answers, or the secret is not the queue's.
        ConfigurationError: a unit cannot be mapped and must be.
    """

    def __init__(
        self,
        endpoint: str,
        secret: str,
        *,
        transport: Transport = "auto",
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
        reconnect_timeout_s: float = _RECONNECT_TIMEOUT_S,
        connect_timeout_s: float = 0.0,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        if transport not in ("auto", "shared_memory", "socket"):
            raise ConfigurationError(f"transport={transport!r}; use 'auto', 'shared_memory' or 'socket'")
        self.endpoint = endpoint
        self._secret = secret
        self._transport: Transport = transport
        self._answer_timeout_s = answer_timeout_s
        self.reconnect_timeout_s = reconnect_timeout_s
        self._on_lost = on_lost
        self._keys = JobKeys.derive(secret)
        self._owner_id = OWNER.pack(host_mark(), os.getpid(), secrets.token_bytes(8))
        self._owner = self._owner_id.hex()
        self._pid = os.getpid()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._numbers = itertools.count(1)
        self._local = threading.local()
        self._is_open = True
        self._reconnecting = threading.Lock()
        deadline_s = clock.now_s() + connect_timeout_s
        try:
            self._link = self._hello_until(deadline_s)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.schema = self._link.schema
        self.lease_timeout_s = self._link.welcome.lease_timeout_s

    def _hello_until(self, deadline_s: float) -> _Link:
        """Say hello, again and again if need be, to a server that answers."""
        while True:
            try:
                return self._hello()
            except QueueUnavailableError:
                if clock.now_s() > deadline_s:
                    raise
            if self._on_lost is not None:
                self._on_lost()

    def _hello(self) -> _Link:
        """Say hello to the server that is there now."""
        door = RemoteConnection(self._context, self.endpoint, self._keys, self._answer_timeout_s)
        try:
            sender = self._owner_id + NO_BOOT
            welcome = door.ask(protocol.Hello(), sender, next(self._numbers), protocol.Welcome)
        finally:
            door.close(0)
        return _Link(self, welcome, None if self._transport == "socket" else self._enter_local(welcome))

    def _enter_local(self, welcome: protocol.Welcome) -> socket.socket | None:
        """Use the server's Unix socket if this is its host."""
        try:
            return enter(welcome.local_address, welcome.local_token, ANCHOR, self._owner_id)
        except OSError:
            return None

    def _reconnect(self, lost: _Link, error: QueueUnavailableError) -> None:
        """Find the queue's next server.

        Raises:
            QueueUnavailableError: there is none, or the queue has no journal.
        """
        with self._reconnecting:
            if self._link is not lost:  # another thread has found it
                return
            is_unit = error.endpoint != self.endpoint  # that comes again, whether there is a journal or not
            if not ((is_unit or lost.welcome.queue_id) and self.reconnect_timeout_s and self._is_open):
                raise error
            deadline_s = clock.now_s() + self.reconnect_timeout_s
            while True:
                if self._on_lost is not None and not is_unit:
                    self._on_lost()
                try:
                    found = self._hello()
                    # If it is the same server, it must have seen the new anchor before the old one goes.
                    found.ask(protocol.Ping(), next(self._numbers), protocol.Pong)
                    if not is_unit or found.welcome.units != lost.welcome.units:
                        break
                    found.close()
                    raise error
                except QueueUnavailableError:
                    if clock.now_s() > deadline_s or not self._is_open:
                        raise
                clock.sleep(_RECONNECT_PAUSE_S)
            if found.welcome.queue_id != lost.welcome.queue_id:
                found.close()
                raise QueueUnavailableError(self.endpoint, 0.0, "find the queue again: another one answers there")
            lost.close()
            self._link = found

    def _retrying(self, attempt: Callable[[_Link, int], _ResultT]) -> _ResultT:
        """Do something at the queue's server, and again under the same number at its next one."""
        number = next(self._numbers)
        while True:
            link = self._link
            try:
                return attempt(link, number)
            except QueueUnavailableError as error:
                self._reconnect(link, error)

    def _access(self, spec: UnitSpec) -> UnitAccess:
        if self._transport != "socket":
            try:
                return UnitAccess(attach_memory(spec.pid, spec.fd, spec.capacity_bytes, spec.mark))
            except OSError as error:
                if self._transport == "shared_memory":
                    raise ConfigurationError(
                        f"the memory of storage unit {spec.endpoint} cannot be mapped here ({error}); use "
                        "transport='auto' on another host"
                    ) from error
        spec = msgspec.structs.replace(spec, endpoint=_reachable(spec.endpoint, self.endpoint))
        return ThreadedAccess(self._context, spec, self._keys, self._answer_timeout_s)

    def __reduce__(self) -> Any:
        return (
            _connect,
            (self.endpoint, self._secret, self._transport, self._answer_timeout_s, self.reconnect_timeout_s),
        )

    # ------------------------------------------------------------------ verbs
    def close(self) -> None:
        """Say that no new rows will come, for everybody. To end only this client, use :meth:`disconnect`."""
        self._ask(protocol.Close(), protocol.Done)

    def statistics(self) -> QueueStatistics:
        """Return what is in the queue, and what has passed."""
        answer = self._ask(protocol.AskStatistics(), protocol.StatisticsAre)
        return msgspec.json.decode(answer.json, type=QueueStatistics)

    def call(self, payload: bytes) -> bytes:
        """Ask whoever serves the queue something beside the queue's verbs; see ``TransferQueueServer.answer_call``."""
        return self._ask(protocol.Call(payload), protocol.Called).payload

    def disconnect(self) -> None:
        """End this client: its leases go back. The queue goes on."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(zmq.ZMQError, OSError, QueueUnavailableError):
                connection = self._connection(self._link)
                connection.send(protocol.Goodbye(), self._link.sender, next(self._numbers))
                connection.close(linger_ms=1000)
            for unit in self._link.units:
                unit.close()
            self._context.destroy(linger=1000)
            self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    # ------------------------------------------------------------------ there
    def _write(
        self,
        columns: Sequence[Column],
        rows: Rows | None,
        timeout_s: float | None,
        lease: tuple[int, str] | None = None,
    ) -> Rows:
        some = None if rows is None else rows.tobytes()

        def attempt(link: _Link, number: int) -> Rows:
            with link.writer.write(columns) as written:
                request = protocol.Put(protocol.pack_written(written), some, lease, timeout_s)
                return protocol.numbers(link.ask(request, number, protocol.Stored).rows)

        return self._retrying(attempt)

    def _lease(self, request: LeaseRequest, timeout_s: float | None) -> Lease:
        if request.sampler is not None and not isinstance(request.sampler, str):
            raise ConfigurationError(
                f"sampler={request.sampler!r} cannot be sent to a server; name it in TransferQueue(samplers={{...}}) "
                "there and give its name"
            )
        demand = request.demand
        message = protocol.TakeLease(
            request.task,
            request.fields,
            demand.count,
            demand.tokens,
            demand.allow_partial,
            demand.replica_rank,
            demand.policy_version,
            demand.micro_batch,
            request.sampler,
            request.timeout_s,
            timeout_s,
        )

        def attempt(link: _Link, number: int) -> Lease:
            answer = link.ask(message, number, protocol.Leased)
            lease = LeaseRecord(
                answer.lease_id,
                request.task,
                self._owner,
                protocol.numbers(answer.rows),
                request.fields,
                request.timeout_s,
                self._connection(link).heard_s + request.timeout_s,  # the lease began later than that
            )
            return self._open(Grant(lease, protocol.unpack_located(answer.located)), link.units)

        return self._retrying(attempt)

    def _commit(self, lease_id: int, task: str, rows: Rows | None) -> None:
        self._ask(protocol.EndLease(lease_id, task, True, None if rows is None else rows.tobytes()), protocol.Done)

    def _release(self, lease_id: int, task: str, rows: Rows | None = None) -> None:
        self._ask(protocol.EndLease(lease_id, task, False, None if rows is None else rows.tobytes()), protocol.Done)

    def _renew(self, lease_id: int, task: str, timeout_s: float) -> float:
        asked_s = clock.now_s()
        self._ask(protocol.Renew(lease_id, task), protocol.Done)
        return asked_s + timeout_s

    def _clear(self, rows: Rows | None) -> None:
        self._ask(protocol.Clear(None if rows is None else rows.tobytes()), protocol.Done)

    def _ask(self, request: protocol.Request, expected: type[_AnswerT]) -> _AnswerT:
        return self._retrying(lambda link, number: link.ask(request, number, expected))

    def _connection(self, link: _Link) -> Connection:
        if os.getpid() != self._pid:
            raise ConfigurationError(
                "this TransferQueueClient was made before a fork; make one in each process (it can be pickled)"
            )
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None or self._local.link is not link:
            welcome = link.welcome
            if link.anchor is not None:
                door = (welcome.local_address, welcome.local_token)
                connection = LocalConnection(*door, self._owner_id, self.endpoint, self._answer_timeout_s)
            else:
                connection = RemoteConnection(self._context, self.endpoint, self._keys, self._answer_timeout_s)
            self._local.connection, self._local.link = connection, link
        return connection


class _Link:
    """A client's way to one server of its queue, which may be gone.

    Args:
        client: whose it is.
        welcome: what the server said.
        anchor: first connection to the server's Unix socket; ``None`` on another host.

    Attributes:
        sender: what requests begin with.
        schema: of the rows.
        units: how this process reaches the storage units.
        writer: puts columns there.
    """

    def __init__(self, client: TransferQueueClient, welcome: protocol.Welcome, anchor: socket.socket | None) -> None:
        self.welcome = welcome
        self.anchor = anchor
        self.sender = client._owner_id + welcome.boot
        self.schema = protocol.unpack_schema(welcome.fields)
        self._client = client
        try:
            self.units = [client._access(spec) for spec in welcome.units]
        except BaseException:
            self.close()
            raise
        this = weakref.proxy(self)  # a lost server's memory goes with the last use of it, and waits for no collector

        def grant(num_bytes: int) -> tuple[int, int]:
            found: tuple[int, int] = this._grant(num_bytes)
            return found

        def seal(where: int) -> None:
            this._seal(where)

        self.writer = Writer(self.schema, self.units, grant, seal, max_idle_s=welcome.session_timeout_s / 2)

    def ask(self, request: protocol.Request, number: int, expected: type[_AnswerT]) -> _AnswerT:
        return self._client._connection(self).ask(request, self.sender, number, expected)

    def _grant(self, num_bytes: int) -> tuple[int, int]:
        number = next(self._client._numbers)
        answer = self.ask(protocol.GrantExtent(num_bytes), number, protocol.ExtentGranted)
        return answer.place, answer.size_bytes

    def _seal(self, where: int) -> None:
        with contextlib.suppress(QueueUnavailableError):  # with the server its extents are gone
            self._client._connection(self).send(protocol.SealExtent(where), self.sender, next(self._client._numbers))

    def close(self) -> None:
        """Let go of the server; its memory stays mapped as long as somebody reads there."""
        if self.anchor is not None:
            self.anchor.close()


def _reachable(endpoint: str, known: str) -> str:
    """Return a unit's endpoint; where it says only "any address", with the host by which the queue is known.

    >>> _reachable("tcp://0.0.0.0:77", "tcp://node7:1234")
    'tcp://node7:77'
    >>> _reachable("tcp://10.0.0.3:77", "tcp://node7:1234")
    'tcp://10.0.0.3:77'
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host not in ("0.0.0.0", "*", "[::]"):
        return endpoint
    return f"{known.rpartition(':')[0]}:{port}"


def _connect(
    endpoint: str, secret: str, transport: Transport, answer_timeout_s: float, reconnect_timeout_s: float
) -> TransferQueueClient:
    return TransferQueueClient(
        endpoint,
        secret,
        transport=transport,
        answer_timeout_s=answer_timeout_s,
        reconnect_timeout_s=reconnect_timeout_s,
    )
