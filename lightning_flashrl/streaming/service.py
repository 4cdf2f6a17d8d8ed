"""The queue's verbs behind a socket: a server in front of a :class:`TransferQueue`, and the client.

========================  =============================================  =======================================
who                       waits for                                      unblocked by
========================  =============================================  =======================================
server thread             requests; leases that run out; time-outs       sockets, timers, other threads' changes
client                    the answer to its request                      the server, or its silence for too long
========================  =============================================  =======================================

Only decisions pass the server. On the server's host a client maps the storage units' memory and copies rows itself;
elsewhere it asks the units. Everybody needs the queue's secret: the connection is authenticated and encrypted by
CURVE, messages are decoded into the types of :mod:`lightning_flashrl.streaming.protocol` and nothing else. A client on
the server's host is then told a Unix socket, which answers in a third of the time and tells at once that a client is
gone; it is open only to processes of the same user that name a token.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import functools
import hashlib
import hmac
import itertools
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError, FlashRLError, LeaseLostError, QueueUnavailableError
from lightning_flashrl.messaging.frames import CHUNK_BYTES, FrameBuffer, FrameChannel, frame
from lightning_flashrl.messaging.local import listen_locally, peer_pid
from lightning_flashrl.messaging.loop import EventLoop, Timer
from lightning_flashrl.messaging.memory import attach_memory
from lightning_flashrl.messaging.security import DoorKeeper, JobKeys
from lightning_flashrl.streaming import protocol
from lightning_flashrl.streaming.control import Grant, LeaseRequest, QueueStatistics, Ticket
from lightning_flashrl.streaming.ledger import LeaseRecord
from lightning_flashrl.streaming.memory import UnitAccess
from lightning_flashrl.streaming.queue import Lease, QueueVerbs, TransferQueue
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.samplers import Demand
from lightning_flashrl.streaming.schema import Column
from lightning_flashrl.streaming.storage import Writer
from lightning_flashrl.streaming.unit import RemoteAccess, UnitServer, UnitSpec

_OWNER_BYTES = 16
_BOOT_BYTES = 8
_TOKEN_BYTES = 32
_NUMBER_BYTES = 8
_NO_BOOT = bytes(_BOOT_BYTES)
_OWNER = struct.Struct("<4sI8s")
"""Which host, process and client; by the first two the server of a queue that goes on knows who is gone."""
_ANCHOR, _THREAD = b"A", b"T"
"""After the token: the connection that lives as long as its client, or one of the client's threads."""
_SILENCE_S = 10.0
"""A client that waits over TCP says each second that it still does; without that its place goes to others."""
_PING_INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 10.0
_RECONNECT_TIMEOUT_S = 60.0
_RECONNECT_PAUSE_S = 0.05
_SESSION_TIMEOUT_S = 600.0
_BACKLOG = 4096
_REMEMBERED_GRANTS = 4096
_UNANSWERED = 0
"""Number of messages that nobody waits for an answer to."""
_AnswerT = TypeVar("_AnswerT", bound=protocol.Message)
_ResultT = TypeVar("_ResultT")
Transport = Literal["auto", "shared_memory", "socket"]


# --------------------------------------------------------------------------- server
class TransferQueueServer:
    """Lets other processes use a queue.

    Args:
        queue: the queue; this process may go on using it.
        port: TCP port on the queue's ``host``; 0 for any that is free.
        session_timeout_s: after this time without a word from a client, what it had begun to write is given up.

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

    def __init__(self, queue: TransferQueue, port: int = 0, *, session_timeout_s: float = _SESSION_TIMEOUT_S) -> None:
        self.queue = queue
        self.secret = queue.secret
        self.answer_call: Callable[[bytes], bytes] | None = None
        self.num_undecodable = 0
        self._boot = secrets.token_bytes(_BOOT_BYTES)
        self._queue_id = "" if queue.journal is None else queue.journal.queue_id
        self._absent = {lease.owner for lease in queue.control.ledger.leases if len(lease.owner) == 2 * _OWNER_BYTES}
        """Clients of the server before, not heard yet."""
        self._session_timeout_s = session_timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._loop = EventLoop()
        keys = JobKeys.derive(queue.secret)
        self._door = DoorKeeper(self._context, self._loop, keys)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
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
        self._door_local = _LocalDoor(self._loop, self._on_local_frame, self._on_local_end)
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
        self._thread.start()

    @property
    def num_refused(self) -> int:
        """Strangers that the handshake turned away."""
        return self._door.num_refused

    def close(self) -> None:
        """Stop serving. The queue goes on."""
        if not self._is_closed:
            self._is_over = self._is_closed = True
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
        begin, end = _NUMBER_BYTES, _NUMBER_BYTES + _OWNER_BYTES + _BOOT_BYTES
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
        if len(sender) != _OWNER_BYTES + _BOOT_BYTES or len(request_id) != _NUMBER_BYTES:
            self.num_undecodable += 1
            return
        owner, boot = sender[:_OWNER_BYTES], sender[_OWNER_BYTES:]
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
        for name in [name for name in self._absent if _is_gone(bytes.fromhex(name))]:
            self._absent.discard(name)
            self.queue.control.forget_owner(name)
        self._flush()


def _leased(grant: Grant) -> protocol.Leased:
    lease = grant.lease
    return protocol.Leased(lease.lease_id, lease.rows.tobytes(), protocol.pack_located(grant.written))


@functools.cache
def _host_mark() -> bytes:
    """Return four bytes that this host has until it is started anew."""
    return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).digest()[:4]


def _is_gone(owner: bytes) -> bool:
    """Whether a client's process was one of this host, and is no more."""
    host, pid, _ = _OWNER.unpack(owner)
    return bool(host == _host_mark()) and not Path(f"/proc/{pid}").exists()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that has no answer yet, and whose it is."""

    ticket: Ticket
    owner: bytes
    timer: Timer | None

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class _LocalDoor:
    """A Unix socket without a path, for clients of the same user that know the token.

    Args:
        loop: calls this object back.
        on_frame: takes each frame of a client that was let in, with the name of its connection.
        on_end: is told that a connection has ended, and whose client that was if it was the client's first.

    Attributes:
        address: in the abstract namespace, without the leading zero.
        token: what the first frame must begin with.
        num_refused: connections of other users, or without the token.
    """

    def __init__(
        self,
        loop: EventLoop,
        on_frame: Callable[[bytes, bytes], None],
        on_end: Callable[[bytes, bytes | None], None],
    ) -> None:
        self.address = f"flashrl-queue-{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.num_refused = 0
        self._loop = loop
        self._on_frame = on_frame
        self._on_end = on_end
        self._numbers = itertools.count()
        self._channels: dict[bytes, FrameChannel] = {}
        self._let_in: dict[bytes, bytes | None] = {}  # connection → client, if it is the client's first
        self._socket = listen_locally(self.address, _BACKLOG)
        self._socket.setblocking(False)
        loop.add_reader(self._socket.fileno(), self._on_connection)

    def _on_connection(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except OSError:  # gone again
            return
        if not peer_pid(accepted):
            self.num_refused += 1
            accepted.close()
            return
        peer = b"local-%d" % next(self._numbers)
        channel = self._channels[peer] = FrameChannel(accepted)
        self._loop.add_reader(channel.fileno(), functools.partial(self._on_readable, peer))

    def _on_readable(self, peer: bytes) -> None:
        channel = self._channels[peer]
        for received in channel.receive():
            if peer in self._let_in:
                self._on_frame(peer, received)
            elif hmac.compare_digest(received[:_TOKEN_BYTES], self.token):
                kind, owner = received[_TOKEN_BYTES : _TOKEN_BYTES + 1], received[_TOKEN_BYTES + 1 :]
                self._let_in[peer] = owner if kind == _ANCHOR else None
            else:
                self.num_refused += 1
                channel.is_open = False
                break
        if not channel.is_open and peer in self._channels:
            self._end(peer)

    def _end(self, peer: bytes) -> None:
        channel = self._channels.pop(peer)
        self._loop.remove(channel.fileno())
        channel.close()
        if peer in self._let_in:
            self._on_end(peer, self._let_in.pop(peer))

    def has(self, owner: bytes) -> bool:
        """Whether a client's first connection is there."""
        return owner in self._let_in.values()

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Send a frame; ``False`` if the name is not that of a connection here."""
        if not peer.startswith(b"local-"):
            return False
        channel = self._channels.get(peer)
        if channel is not None:
            channel.send(frame)
            self._write_later(channel)
        return True

    def _write_later(self, channel: FrameChannel) -> None:
        if not channel.has_pending:
            self._loop.set_writer(channel.fileno(), None)
            return

        def on_writable() -> None:
            channel.flush()
            self._write_later(channel)

        self._loop.set_writer(channel.fileno(), on_writable)

    def close(self) -> None:
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        for channel in self._channels.values():
            self._loop.remove(channel.fileno())
            channel.close()
        self._channels.clear()


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


# --------------------------------------------------------------------------- client
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
        on_lost: is called before that, once for each server that is gone, in the thread that has noticed it.

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
        self._owner_id = _OWNER.pack(_host_mark(), os.getpid(), secrets.token_bytes(8))
        self._owner = self._owner_id.hex()
        self._pid = os.getpid()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._numbers = itertools.count(1)
        self._local = threading.local()
        self._is_open = True
        self._reconnecting = threading.Lock()
        try:
            self._link = self._hello()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.schema = self._link.schema
        self.lease_timeout_s = self._link.welcome.lease_timeout_s

    def _hello(self) -> _Link:
        """Say hello to the server that is there now."""
        door = _RemoteConnection(self._context, self.endpoint, self._keys, self._answer_timeout_s)
        try:
            sender = self._owner_id + _NO_BOOT
            welcome = door.ask(protocol.Hello(), sender, next(self._numbers), protocol.Welcome)
        finally:
            door.close(0)
        return _Link(self, welcome, None if self._transport == "socket" else self._enter_local(welcome))

    def _enter_local(self, welcome: protocol.Welcome) -> socket.socket | None:
        """Use the server's Unix socket if this is its host."""
        try:
            return _enter(welcome.local_address, welcome.local_token, _ANCHOR, self._owner_id)
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
            if self._on_lost is not None and not is_unit:
                self._on_lost()
            deadline_s = clock.now_s() + self.reconnect_timeout_s
            while True:
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
        return _ThreadedAccess(self._context, spec, self._keys, self._answer_timeout_s)

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

    def _connection(self, link: _Link) -> _Connection:
        if os.getpid() != self._pid:
            raise ConfigurationError(
                "this TransferQueueClient was made before a fork; make one in each process (it can be pickled)"
            )
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None or self._local.link is not link:
            welcome = link.welcome
            if link.anchor is not None:
                door = (welcome.local_address, welcome.local_token)
                connection = _LocalConnection(*door, self._owner_id, self.endpoint, self._answer_timeout_s)
            else:
                connection = _RemoteConnection(self._context, self.endpoint, self._keys, self._answer_timeout_s)
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
        self.writer = Writer(self.schema, self.units, self._grant, self._seal, max_idle_s=welcome.session_timeout_s / 2)

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


def _enter(address: str, token: bytes, kind: bytes, owner: bytes) -> socket.socket:
    """Connect to the server's Unix socket.

    Raises:
        OSError: it is not there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(f"\0{address}")
        sock.sendall(frame(token + kind + owner))
    except OSError:
        sock.close()
        raise
    return sock


class _Connection(abc.ABC):
    """One thread's way to the server.

    Attributes:
        heard_s: when the server was last heard before it gave the last answer.
    """

    def __init__(self, endpoint: str, answer_timeout_s: float) -> None:
        self.heard_s = clock.now_s()
        self._endpoint = endpoint
        self._answer_timeout_s = answer_timeout_s

    def send(self, request: protocol.Request, sender: bytes, number: int) -> None:
        """Send a request.

        Raises:
            QueueUnavailableError: the server is gone.
        """
        self._send(number.to_bytes(_NUMBER_BYTES, "little"), sender, protocol.encode(request))

    def ask(self, request: protocol.Request, sender: bytes, number: int, expected: type[_AnswerT]) -> _AnswerT:
        """Send a request and wait for its answer, as long as the server gives signs of life.

        Raises:
            QueueUnavailableError: it does not, or another server has taken its place.
        """
        while True:
            self.send(request, sender, number)
            try:
                answer = self._wait(number, request, sender)
            except BaseException:
                with contextlib.suppress(zmq.ZMQError, OSError, QueueUnavailableError):
                    self.send(protocol.Cancel(number), sender, _UNANSWERED)
                raise
            if not isinstance(answer, protocol.Again):  # else this process has been stopped for a while
                break
        if isinstance(answer, protocol.Failed):
            raise protocol.unpack_error(answer)
        assert isinstance(answer, expected)
        return answer

    def _wait(self, number: int, request: protocol.Request, sender: bytes) -> protocol.Answer:
        wanted = number.to_bytes(_NUMBER_BYTES, "little")
        last_s = self.heard_s = clock.now_s()
        while True:
            received = self._receive(_PING_INTERVAL_S)
            if received is None:
                if clock.now_s() - last_s > self._answer_timeout_s:
                    raise self._unavailable(type(request).__name__.lower())
                self.send(protocol.Ping(), sender, _UNANSWERED)
                continue
            request_id, payload = received
            answer: protocol.Answer = protocol.decode_answer(payload)
            if isinstance(answer, protocol.Moved) and not sender.endswith(_NO_BOOT):
                raise QueueUnavailableError(self._endpoint, 0.0, "go on there: another server has taken its place")
            if request_id == wanted:
                return answer
            # A pong, or the answer to a request that was given up.
            self.heard_s = last_s
            last_s = clock.now_s()

    def _unavailable(self, doing: str) -> QueueUnavailableError:
        return QueueUnavailableError(self._endpoint, self._answer_timeout_s, doing)

    @abc.abstractmethod
    def _send(self, request_id: bytes, owner: bytes, payload: bytes) -> None: ...

    @abc.abstractmethod
    def _receive(self, timeout_s: float) -> tuple[bytes, bytes] | None: ...

    @abc.abstractmethod
    def close(self, linger_ms: int) -> None:
        """Close the socket; what was sent may still leave for so long."""

    def __del__(self) -> None:
        self.close(0)


class _RemoteConnection(_Connection):
    """Over TCP, with CURVE."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: JobKeys, answer_timeout_s: float
    ) -> None:
        super().__init__(endpoint, answer_timeout_s)
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = 0
        keys.guard_client(self._socket)
        self._socket.connect(endpoint)

    def _send(self, request_id: bytes, owner: bytes, payload: bytes) -> None:
        self._socket.send_multipart([request_id, owner, payload])

    def _receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        request_id, payload = self._socket.recv_multipart()
        return request_id, payload

    def close(self, linger_ms: int) -> None:
        self._socket.close(linger_ms)


class _LocalConnection(_Connection):
    """Over the server's Unix socket."""

    def __init__(self, address: str, token: bytes, owner: bytes, endpoint: str, answer_timeout_s: float) -> None:
        self._socket: socket.socket | None = None
        super().__init__(endpoint, answer_timeout_s)
        try:
            self._socket = _enter(address, token, _THREAD, owner)
        except OSError as error:
            raise self._unavailable("connect") from error
        self._frames = FrameBuffer()
        self._received: collections.deque[bytes] = collections.deque()

    def _send(self, request_id: bytes, owner: bytes, payload: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(self._answer_timeout_s)
        try:
            self._socket.sendall(frame(request_id + owner + payload))
        except OSError as error:
            raise self._unavailable("send") from error

    def _receive(self, timeout_s: float) -> tuple[bytes, bytes] | None:
        assert self._socket is not None
        self._socket.settimeout(timeout_s)
        while not self._received:
            try:
                data = self._socket.recv(CHUNK_BYTES)
            except TimeoutError:
                return None
            except OSError as error:
                raise self._unavailable("receive") from error
            if not data:
                raise QueueUnavailableError(self._endpoint, 0.0, "it closed the connection")
            self._received += self._frames.feed(data)
        answer = self._received.popleft()
        return answer[:_NUMBER_BYTES], answer[_NUMBER_BYTES:]

    def close(self, linger_ms: int) -> None:
        if self._socket is not None:
            self._socket.close()


class _ThreadedAccess(UnitAccess):
    """A unit behind a socket, with a connection for each thread."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], spec: UnitSpec, keys: JobKeys, timeout_s: float
    ) -> None:
        self._make = functools.partial(RemoteAccess, context, spec, keys, timeout_s)
        self._local = threading.local()

    def _mine(self) -> RemoteAccess:
        access: RemoteAccess | None = getattr(self._local, "access", None)
        if access is None:
            access = self._local.access = self._make()
        return access

    @contextlib.contextmanager
    def writing(self, offset: int, num_bytes: int) -> Iterator[Any]:
        with self._mine().writing(offset, num_bytes) as memory:
            yield memory

    def read(self, offsets: Any, ends: Any, into: Any) -> None:
        self._mine().read(offsets, ends, into)

    def close(self) -> None:
        """Connections end with the client's context."""
