"""A server in front of a :class:`TransferQueue`: its verbs for other processes.

========================  =============================================  =======================================
who                       waits for                                      unblocked by
========================  =============================================  =======================================
server thread             requests; leases that run out; time-outs       sockets, timers, other threads' changes
========================  =============================================  =======================================

Only decisions pass the server. On the server's host a client maps the storage units' memory and copies rows itself;
elsewhere it asks the units. Everybody needs the queue's secret: the connection is authenticated and encrypted by
CURVE, messages are decoded into the types of :mod:`lightning_flashrl.streaming.protocol` and nothing else. A client on
the server's host is then told a Unix socket, see :mod:`lightning_flashrl.streaming.door`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError, FlashRLError, LeaseLostError
from lightning_flashrl.messaging.loop import EventLoop, Timer
from lightning_flashrl.messaging.security import DoorKeeper, JobKeys
from lightning_flashrl.streaming import protocol
from lightning_flashrl.streaming.control import Grant, LeaseRequest, Ticket
from lightning_flashrl.streaming.door import BACKLOG, LocalDoor
from lightning_flashrl.streaming.identity import BOOT_BYTES, NUMBER_BYTES, OWNER_BYTES, is_gone
from lightning_flashrl.streaming.queue import TransferQueue
from lightning_flashrl.streaming.samplers import Demand
from lightning_flashrl.streaming.unit import UnitServer, UnitSpec

_SILENCE_S = 10.0
"""A client that waits over TCP says each second that it still does; without that its place goes to others."""
_SESSION_TIMEOUT_S = 600.0
_REMEMBERED_GRANTS = 4096


class TransferQueueServer:
    """Lets other processes use a queue.

    Args:
        queue: the queue; this process may go on using it.
        port: TCP port on the queue's ``host``; 0 for any that is free.
        session_timeout_s: after this time without a word from a client, what it had begun to write is given up.
        starts: whether it answers at once; else whoever asks waits for :meth:`start`.

    Attributes:
        endpoint: where clients connect.
        secret: what they need.
        answer_call: answers what clients ask beside the queue's verbs with :meth:`TransferQueueClient.call`, in the
            server's thread; ``None`` refuses that.

    Raises:
        ConfigurationError: the address is taken, or not of this host.

    >>> import torch
    >>> from lightning_flashrl.streaming import Field, TransferQueue, TransferQueueClient
    >>> with TransferQueue({"x": Field(int)}, ["square"]) as queue, TransferQueueServer(queue) as server:
    ...     with TransferQueueClient(server.endpoint, server.secret) as client:
    ...         rows = client.put({"x": [2, 3]})
    ...     queue.lease("square", count=2)["x"]
    [2, 3]
    """

    def __init__(
        self,
        queue: TransferQueue,
        port: int = 0,
        *,
        session_timeout_s: float = _SESSION_TIMEOUT_S,
        starts: bool = True,
    ) -> None:
        self.queue = queue
        self.secret = queue.secret
        self.answer_call: Callable[[bytes], bytes] | None = None
        self.num_undecodable = 0
        self._boot = secrets.token_bytes(BOOT_BYTES)
        self._queue_id = "" if queue.journal is None else queue.journal.queue_id
        self._absent = {lease.owner for lease in queue.control.ledger.leases if len(lease.owner) == 2 * OWNER_BYTES}
        """Clients of the server before, not heard yet."""
        self._session_timeout_s = session_timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._loop = EventLoop()
        keys = JobKeys.derive(queue.secret)
        self._door = DoorKeeper(self._context, self._loop, keys)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.setsockopt(zmq.BACKLOG, BACKLOG)
        keys.guard_server(self._socket)
        try:
            if port:
                self._socket.bind(f"tcp://{queue.host}:{port}")
            else:
                port = self._socket.bind_to_random_port(f"tcp://{queue.host}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigurationError(
                f"the queue cannot listen on tcp://{queue.host}:{port} ({error}); choose another port, or an "
                "address of this machine"
            ) from error
        self.endpoint = f"tcp://{queue.host}:{port}"
        self._units = [_UnitThread(queue, keys)] if not queue.unit_processes else []
        self._door_local = LocalDoor(self._loop, self._on_local_frame, self._on_local_end)
        self._tickets: dict[tuple[bytes, bytes], _Waiting] = {}
        self._granted: dict[tuple[bytes, bytes], tuple[int, str]] = {}
        self._answers: collections.deque[tuple[bytes, bytes, bytes]] = collections.deque()
        self._owners: dict[bytes, float] = {}
        self._gone: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._expiry: Timer | None = None
        self._is_over = self._is_closed = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._socket, self._on_readable)
        self._loop.add_reader(self._wake_fd, self._on_wake)
        self._loop.call_every(min(session_timeout_s / 4, _SILENCE_S / 4), self._forget_silent_owners)
        self._thread = threading.Thread(target=self._serve, name="flashrl-queue", daemon=True)
        if starts:
            self.start()

    def start(self) -> None:
        """Answer from now on."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def num_refused(self) -> int:
        """Strangers that the handshake turned away."""
        return self._door.num_refused

    def close(self) -> None:
        """Stop serving. The queue goes on."""
        if not self._is_closed:
            self._is_over = self._is_closed = True
            self.start()  # it closes what is its own
            self._wake()
            self._thread.join()
            for unit in self._units:
                unit.close()
            os.close(self._wake_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the thread
    def _serve(self) -> None:
        self._loop.run_until(lambda: self._is_over)
        for waiting in self._tickets.values():
            self.queue.control.cancel(waiting.ticket)
        self._flush()
        self._door_local.close()
        self._loop.remove(self._socket)
        self._socket.close()
        self._door.close()
        self._context.term()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._flush()

    def _flush(self) -> None:
        while self._answers:
            peer, request_id, payload = self._answers.popleft()
            if not self._door_local.send(peer, request_id + payload):
                self._socket.send_multipart([peer, request_id, payload])

    def _on_readable(self) -> None:
        for _ in range(256):  # then other sources have their turn
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) == 4:
                self._on_request(*frames)
            else:
                self.num_undecodable += 1
        self._after_requests()

    def _on_local_frame(self, peer: bytes, frame: bytes) -> None:
        begin, end = NUMBER_BYTES, NUMBER_BYTES + OWNER_BYTES + BOOT_BYTES
        self._on_request(peer, frame[:begin], frame[begin:end], frame[end:])
        self._after_requests()

    def _on_local_end(self, peer: bytes, owner: bytes | None) -> None:
        """A connection has ended; with its first one the client has (``owner``)."""
        if owner is not None and not self._door_local.has(owner):
            self._forget(owner)
        self._give_up([key for key in self._tickets if key[0] == peer])
        self._after_requests()

    def _forget(self, owner: bytes) -> None:
        """A client is gone. What it has asked for is not given to it, also if it is read only now."""
        self._gone[owner] = None
        if len(self._gone) > _REMEMBERED_GRANTS:
            self._gone.popitem(last=False)
        self._give_up([key for key, waiting in self._tickets.items() if waiting.owner == owner])
        self._owners.pop(owner, None)
        self.queue.control.forget_owner(owner.hex())

    def _give_up(self, keys: Sequence[tuple[bytes, bytes]]) -> None:
        for key in keys:
            waiting = self._tickets.pop(key)
            waiting.stop()
            self.queue.control.cancel(waiting.ticket)

    def _after_requests(self) -> None:
        self._flush()
        self._arm_expiry()

    def _on_request(self, peer: bytes, request_id: bytes, sender: bytes, payload: bytes) -> None:
        if len(sender) != OWNER_BYTES + BOOT_BYTES or len(request_id) != NUMBER_BYTES:
            self.num_undecodable += 1
            return
        owner, boot = sender[:OWNER_BYTES], sender[OWNER_BYTES:]
        if owner in self._gone:
            return
        answer: protocol.Answer | None
        try:
            request = protocol.decode_request(payload)
            if boot != self._boot and not isinstance(request, protocol.Hello):
                answer = protocol.Moved()
            else:
                self._owners[owner] = clock.now_s()
                self._absent.discard(owner.hex())
                answer = self._answer_again(owner.hex(), int.from_bytes(request_id, "little"), request)
                if answer is None:
                    self._give_up([key for key in self._tickets if key == (peer, request_id)])  # asked before
                    answer = self._handle(peer, request_id, owner.hex(), request)
        except FlashRLError as error:
            answer = protocol.pack_error(error)
        except Exception as error:  # noqa: BLE001 - messages that are none, a user's sampler: others are served on
            self.num_undecodable += 1
            answer = protocol.pack_error(
                ConfigurationError(
                    f"the request cannot be: {type(error).__name__}: {error}; look at the types of its arguments, and "
                    "use one version of the package"
                )
            )
        if answer is not None:
            self._answers.append((peer, request_id, protocol.encode(answer)))

    def _unit_specs(self) -> tuple[UnitSpec, ...]:
        return tuple(
            msgspec.structs.replace(spec, endpoint=spec.endpoint or self._units[0].endpoint)
            for spec in self.queue.unit_specs
        )

    def _answer_again(self, owner: str, number: int, request: protocol.Request) -> protocol.Answer | None:
        """Answer a request that was carried out, here or by the server before, without an answer that was heard."""
        journal = self.queue.journal
        if journal is None:
            return None
        with self.queue.control.lock:
            known = journal.answer_to(owner, number)
        match request:
            case _ if known is None:
                return None
            case protocol.Put():
                return protocol.Stored(known.rows)
            case protocol.TakeLease():
                grant = self.queue.control.lease_again(known.lease_id, owner)
                return None if grant is None else _leased(grant)
        return protocol.Done()

    def _handle(self, peer: bytes, request_id: bytes, owner: str, request: protocol.Request) -> protocol.Answer | None:
        control = self.queue.control
        origin = (owner, int.from_bytes(request_id, "little"))
        match request:
            case protocol.Ping():
                return protocol.Pong()
            case protocol.Put():
                self._put(peer, request_id, owner, request)
                return None
            case protocol.TakeLease():
                self._lease(peer, request_id, owner, request)
                return None
            case protocol.EndLease(lease_id=lease_id, task=task, is_commit=is_commit, rows=packed):
                some = None if packed is None else protocol.numbers(packed)
                (control.commit if is_commit else control.release)(lease_id, task, owner, some, origin)
            case protocol.Renew(lease_id=lease_id, task=task):
                control.renew(lease_id, task, owner)
            case protocol.Clear(rows=rows):
                control.clear(None if rows is None else protocol.numbers(rows), origin)
            case protocol.Close():
                self.queue.close()
            case protocol.GrantExtent(num_bytes=num_bytes):
                return protocol.ExtentGranted(*control.grant(num_bytes, owner))
            case protocol.SealExtent(place=where):
                control.seal(where, owner)
                return None
            case protocol.AskStatistics():
                return protocol.StatisticsAre(msgspec.json.encode(control.statistics()))
            case protocol.Hello():
                fields = protocol.pack_schema(self.queue.schema)
                door = self._door_local
                return protocol.Welcome(
                    fields,
                    self.queue.lease_timeout_s,
                    self._unit_specs(),
                    door.address,
                    door.token,
                    self._session_timeout_s,
                    self._boot,
                    self._queue_id,
                )
            case protocol.Cancel(request_id=number):
                self._cancel(peer, number.to_bytes(8, "little"), owner)
                return None
            case protocol.Call(payload=payload):
                if self.answer_call is None:
                    raise ConfigurationError("nobody answers calls to this queue's server; set its answer_call")
                return protocol.Called(self.answer_call(payload))
            case protocol.Goodbye():
                self._forget(bytes.fromhex(owner))
                return None
        return protocol.Done()

    def _put(self, peer: bytes, request_id: bytes, owner: str, request: protocol.Put) -> None:
        control = self.queue.control
        written = protocol.unpack_written(request.written, self.queue.schema)
        rows = None if request.rows is None else protocol.numbers(request.rows)
        control.check_written(written, rows, owner)
        lease = None if request.lease is None else (*request.lease, owner)
        if lease is not None and rows is None:
            raise ValueError("a lease for new rows")
        origin = (owner, int.from_bytes(request_id, "little"))
        ticket = control.put(written, rows, lambda ticket: self._on_done(peer, request_id, ticket), lease, origin)
        self._wait(
            peer, request_id, owner, ticket, request.timeout_s, lambda: control.full_error(request.timeout_s or 0.0)
        )

    def _lease(self, peer: bytes, request_id: bytes, owner: str, request: protocol.TakeLease) -> None:
        control = self.queue.control
        demand = Demand(
            request.count,
            request.tokens,
            request.allow_partial,
            False,
            request.replica_rank,
            request.policy_version,
            request.micro_batch,
        )
        asked = LeaseRequest(
            request.task,
            request.fields,
            demand,
            owner,
            request.lease_timeout_s,
            request.sampler,
            (owner, int.from_bytes(request_id, "little")),
        )
        ticket = control.lease(asked, lambda ticket: self._on_done(peer, request_id, ticket))
        self._wait(
            peer,
            request_id,
            owner,
            ticket,
            request.timeout_s,
            lambda: control.timeout_error(asked, request.timeout_s or 0.0),
        )

    def _wait(
        self,
        peer: bytes,
        request_id: bytes,
        owner: str,
        ticket: Ticket,
        timeout_s: float | None,
        too_late: Callable[[], FlashRLError],
    ) -> None:
        """Remember a ticket that has no answer yet."""
        if ticket.is_done:
            return

        def on_timeout() -> None:
            if self.queue.control.cancel(ticket):
                self._tickets.pop((peer, request_id), None)
                self._answers.append((peer, request_id, protocol.encode(protocol.pack_error(too_late()))))
                self._flush()

        timer = None if timeout_s is None else self._loop.call_later(timeout_s, on_timeout)
        self._tickets[peer, request_id] = _Waiting(ticket, bytes.fromhex(owner), timer)

    def _on_done(self, peer: bytes, request_id: bytes, ticket: Ticket) -> None:
        """Answer a ticket. Called in whichever thread made it possible."""
        answer: protocol.Answer
        if ticket.error is not None:
            answer = protocol.pack_error(ticket.error)
        elif isinstance(ticket.answer, Grant):
            lease = ticket.answer.lease
            self._granted[peer, request_id] = (lease.lease_id, lease.task)
            if len(self._granted) > _REMEMBERED_GRANTS:
                del self._granted[next(iter(self._granted))]
            answer = _leased(ticket.answer)
        else:
            answer = protocol.Stored(ticket.answer.tobytes())
        self._answers.append((peer, request_id, protocol.encode(answer)))
        if threading.current_thread() is not self._thread:
            self._wake()

    def _cancel(self, peer: bytes, request_id: bytes, owner: str) -> None:
        waiting = self._tickets.pop((peer, request_id), None)
        if waiting is not None:
            waiting.stop()
            self.queue.control.cancel(waiting.ticket)
        granted = self._granted.pop((peer, request_id), None)  # the answer and the cancellation have crossed
        if granted is not None:
            with contextlib.suppress(LeaseLostError):
                self.queue.control.release(*granted, owner)

    # ------------------------------------------------------------------ time
    def _arm_expiry(self) -> None:
        for key in [key for key, waiting in self._tickets.items() if waiting.ticket.is_done]:
            self._tickets.pop(key).stop()
        due_s = self.queue.control.tick()
        if due_s is None or (self._expiry is not None and self._expiry.callback and self._expiry.due_s <= due_s):
            return
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = self._loop.call_later(max(0.0, due_s - clock.now_s()), self._on_expiry)

    def _on_expiry(self) -> None:
        self._expiry = None
        self._arm_expiry()
        self._flush()

    def _forget_silent_owners(self) -> None:
        now_s = clock.now_s()
        for key, waiting in list(self._tickets.items()):
            is_silent = now_s - self._owners.get(waiting.owner, now_s) > _SILENCE_S
            if is_silent and self.queue.control.cancel(waiting.ticket):
                self._tickets.pop(key).stop()
                self._answers.append((*key, protocol.encode(protocol.Again())))
        for owner, heard_s in list(self._owners.items()):
            # The end of a client on this host is seen at its first connection; another's leases run out.
            if now_s - heard_s > self._session_timeout_s and not self._door_local.has(owner):
                del self._owners[owner]
                self.queue.control.seal_owner(owner.hex())
        for name in [name for name in self._absent if is_gone(bytes.fromhex(name))]:
            self._absent.discard(name)
            self.queue.control.forget_owner(name)
        self._flush()


def _leased(grant: Grant) -> protocol.Leased:
    lease = grant.lease
    return protocol.Leased(lease.lease_id, lease.rows.tobytes(), protocol.pack_located(grant.written))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that has no answer yet, and whose it is."""

    ticket: Ticket
    owner: bytes
    timer: Timer | None

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class _UnitThread:
    """Serves the rows that the queue's own process holds, to clients that cannot map them."""

    def __init__(self, queue: TransferQueue, keys: JobKeys) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._loop = EventLoop()
        self._server = UnitServer(self._context, self._loop, queue.units[0].memory, keys, queue.host)
        self.endpoint = self._server.endpoint
        self._is_over = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._wake_fd, lambda: None)
        self._thread = threading.Thread(target=self._serve, name="flashrl-unit", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._loop.run_until(lambda: self._is_over)
        self._server.close()
        self._context.term()

    def close(self) -> None:
        self._is_over = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        os.close(self._wake_fd)
