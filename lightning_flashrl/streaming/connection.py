"""A client's connections: to the server over TCP or its Unix socket, one for each thread, and to storage units."""

from __future__ import annotations

import abc
import collections
import contextlib
import functools
import socket
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import QueueUnavailableError
from lightning_flashrl.messaging.frames import CHUNK_BYTES, FrameBuffer, frame
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.streaming import protocol
from lightning_flashrl.streaming.identity import NO_BOOT, NUMBER_BYTES, THREAD
from lightning_flashrl.streaming.memory import UnitAccess
from lightning_flashrl.streaming.unit import RemoteAccess, UnitSpec

_PING_INTERVAL_S = 1.0
_UNANSWERED = 0
"""Number of messages that nobody waits for an answer to."""
_AnswerT = TypeVar("_AnswerT", bound=protocol.Message)


def enter(address: str, token: bytes, kind: bytes, owner: bytes) -> socket.socket:
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


class Connection(abc.ABC):
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
        self._send(number.to_bytes(NUMBER_BYTES, "little"), sender, protocol.encode(request))

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
        wanted = number.to_bytes(NUMBER_BYTES, "little")
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
            if isinstance(answer, protocol.Moved) and not sender.endswith(NO_BOOT):
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


class RemoteConnection(Connection):
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
        """See :meth:`Connection.close`."""
        self._socket.close(linger_ms)


class LocalConnection(Connection):
    """Over the server's Unix socket."""

    def __init__(self, address: str, token: bytes, owner: bytes, endpoint: str, answer_timeout_s: float) -> None:
        self._socket: socket.socket | None = None
        super().__init__(endpoint, answer_timeout_s)
        try:
            self._socket = enter(address, token, THREAD, owner)
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
        return answer[:NUMBER_BYTES], answer[NUMBER_BYTES:]

    def close(self, linger_ms: int) -> None:
        """See :meth:`Connection.close`."""
        if self._socket is not None:
            self._socket.close()


class ThreadedAccess(UnitAccess):
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
        """See :meth:`UnitAccess.writing`."""
        with self._mine().writing(offset, num_bytes) as memory:
            yield memory

    def read(self, offsets: Any, ends: Any, into: Any) -> None:
        """See :meth:`UnitAccess.read`."""
        self._mine().read(offsets, ends, into)

    def close(self) -> None:
        """Connections end with the client's context."""
