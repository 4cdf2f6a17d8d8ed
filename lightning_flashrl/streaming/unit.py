"""A storage unit as a process of its own, and its memory behind a socket for those who cannot map it.

``python -m lightning_flashrl.streaming.unit`` reads its settings from standard input, writes where it is to standard
output, and ends when standard input does: with whoever started it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import zmq

from lightning_flashrl.errors import QueueUnavailableError
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.memory import MARK_BYTES, Bytes, Memory, make_memory
from lightning_flashrl.messaging.security import DoorKeeper, JobKeys
from lightning_flashrl.streaming.memory import BLOCK_BYTES, UnitAccess, default_capacity_bytes

_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 5.0
_RESTART_PAUSE_S = 0.1
_LOOK_S = 0.1
_FRAME_BYTES = 1 << 24
"""Payload of a message to or from a unit, at most: an answer is not long in coming then, on slow lines, too."""


class UnitSpec(msgspec.Struct, frozen=True, array_like=True):
    """How to reach a storage unit.

    Attributes:
        pid: process that holds its memory.
        fd: descriptor of the memory there.
        capacity_bytes: its size.
        mark: bytes at its beginning, by which a mapping is known to be the right one.
        endpoint: where it answers.
    """

    pid: int
    fd: int
    capacity_bytes: int
    mark: bytes
    endpoint: str


class Read(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Send these ranges, one after the other: int64 arrays as bytes. The answer is the ranges' bytes."""

    offsets: bytes
    ends: bytes


class Write(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Store the bytes that follow in the next frame."""

    offset: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Read | Write).decode


class UnitServer:
    """A unit's memory behind a socket.

    Args:
        context: ZeroMQ context of its own.
        loop: calls this object back.
        memory: the unit's.
        keys: who may connect.
        host: address to listen on.

    Attributes:
        endpoint: where.
        num_undecodable: messages that were none.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], loop: EventLoop, memory: Memory, keys: JobKeys, host: str
    ) -> None:
        self.num_undecodable = 0
        self._memory = memory
        self._loop = loop
        self._door = DoorKeeper(context, loop, keys)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        keys.guard_server(self._socket)
        self.endpoint = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        loop.add_reader(self._socket, self._on_readable)

    def _on_readable(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                peer, request_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=True)
                try:
                    answer = self._answer(frames)
                except (msgspec.MsgspecError, ValueError, IndexError, MemoryError):
                    self.num_undecodable += 1
                    continue
                self._socket.send_multipart([peer, request_id, answer], copy=False)

    def _answer(self, frames: Sequence[bytes]) -> bytes | memoryview:
        request = _decode(frames[0])
        array = self._memory.array
        if isinstance(request, Write):
            data = np.frombuffer(frames[1], np.uint8)
            if not MARK_BYTES <= request.offset <= len(array) - len(data):
                raise ValueError("outside of the unit")
            array[request.offset : request.offset + len(data)] = data
            return b""
        offsets, ends = np.frombuffer(request.offsets, np.int64), np.frombuffer(request.ends, np.int64)
        if len(offsets) != len(ends) or (offsets < 0).any() or (ends < offsets).any() or (ends > len(array)).any():
            raise ValueError("outside of the unit")
        out = np.empty(int((ends - offsets).sum()), np.uint8)
        UnitAccess(self._memory).read(offsets.tolist(), ends.tolist(), out)
        return out.data

    def close(self) -> None:
        """Stop answering."""
        self._loop.remove(self._socket)
        self._socket.close()
        self._door.close()


class RemoteAccess(UnitAccess):
    """How a process reaches a unit whose memory it cannot map: over a socket. One thread at a time.

    Args:
        context: ZeroMQ context of the client.
        spec: which unit.
        keys: of the queue.
        timeout_s: how long it may be silent.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], spec: UnitSpec, keys: JobKeys, timeout_s: float
    ) -> None:
        self._spec = spec
        self._timeout_s = timeout_s
        self._num_requests = 0
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndtimeo = int(timeout_s * 1000)
        keys.guard_client(self._socket)
        self._socket.connect(spec.endpoint)

    @contextlib.contextmanager
    def writing(self, offset: int, num_bytes: int) -> Iterator[Bytes]:
        """Give memory of our own, and send it when the block ends without an error."""
        staged = np.empty(num_bytes, np.uint8)
        yield staged
        for begin in range(0, num_bytes, _FRAME_BYTES):
            part = staged[begin : begin + _FRAME_BYTES]
            self._ask([_encode(Write(offset + begin)), part.data], "write")

    def read(self, offsets: Sequence[int], ends: Sequence[int], into: Bytes) -> None:
        """Copy ranges out, one after the other."""
        at = 0
        for starts, stops in _frames(offsets, ends):
            request = Read(np.array(starts, np.int64).tobytes(), np.array(stops, np.int64).tobytes())
            part = np.frombuffer(self._ask([_encode(request)], "read"), np.uint8)
            into[at : at + len(part)] = part
            at += len(part)

    def _ask(self, frames: list[bytes | memoryview], doing: str) -> memoryview:
        self._num_requests += 1
        request_id = self._num_requests.to_bytes(8, "little")
        with contextlib.suppress(zmq.Again):  # nobody takes it
            self._socket.send_multipart([request_id, *frames], copy=False)
            while self._socket.poll(int(self._timeout_s * 1000)):
                answered, data = self._socket.recv_multipart(copy=False)
                if answered.bytes == request_id:  # else of a request that was given up
                    return data.buffer
        raise QueueUnavailableError(self._spec.endpoint, self._timeout_s, f"{doing} at a storage unit")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()


def _frames(offsets: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Cut ranges into requests whose answers are no larger than a frame.

    >>> _FRAME_BYTES
    16777216
    >>> list(_frames([0, 50], [10, 50 + (1 << 24)]))
    [([0, 50], [10, 16777256]), ([16777256], [16777266])]
    """
    starts: list[int] = []
    stops: list[int] = []
    left = _FRAME_BYTES
    for offset, end in zip(offsets, ends, strict=True):
        while offset < end:
            stop = min(end, offset + left)
            starts.append(offset)
            stops.append(stop)
            left -= stop - offset
            offset = stop
            if not left:
                yield starts, stops
                starts, stops, left = [], [], _FRAME_BYTES
    if starts:
        yield starts, stops


# --------------------------------------------------------------------------- a process of its own
class UnitSettings(msgspec.Struct, frozen=True):
    """What a unit's process must know.

    Attributes:
        secret: of the queue.
        capacity_bytes: size of the unit.
        host: address to listen on.
        fd: descriptor of the memory of a unit that was lost; −1 to make some.
        mark: of that.
    """

    secret: str
    capacity_bytes: int
    host: str
    fd: int = -1
    mark: bytes = b""


class UnitProcess:
    """A storage unit in another process, seen from who started it.

    It may die: its memory is kept here, and another process serves it.

    Args:
        secret: of the queue.
        host: address to listen on.

    Attributes:
        spec: how to reach it.
        memory: its memory.

    Raises:
        QueueUnavailableError: it did not come up.
    """

    def __init__(self, secret: str, host: str) -> None:
        self._settings = UnitSettings(secret, default_capacity_bytes(), host)
        self._is_over = threading.Event()
        self._process, self.spec = _start(self._settings, ())
        try:
            fd = os.open(f"/proc/{self.spec.pid}/fd/{self.spec.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            _end(self._process)
            raise QueueUnavailableError("a storage unit", 0.0, "map its memory") from error
        self.memory = Memory(fd, self.spec.capacity_bytes, is_owner=True)
        self._thread = threading.Thread(target=self._watch, name="flashrl-unit-watch", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _watch(self) -> None:
        """Let another process serve the memory when this one has died."""
        settings = msgspec.structs.replace(self._settings, fd=self.memory.fd, mark=self.spec.mark)
        while True:
            self._process.wait()
            if self._is_over.wait(_RESTART_PAUSE_S):
                return
            try:
                process, spec = _start(settings, (settings.fd,))
            except QueueUnavailableError:  # again, until somebody ends this
                continue
            _end(self._process)
            self._process, self.spec = process, spec

    def close(self) -> None:
        """End the process; its memory goes when nobody maps it any more."""
        self._is_over.set()
        while self._thread.is_alive():  # perhaps it has just begun to start another
            _end(self._process)
            self._thread.join(_LOOK_S)
        _end(self._process)


def _start(settings: UnitSettings, fds: Sequence[int]) -> tuple[subprocess.Popen[bytes], UnitSpec]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        start_new_session=True,  # Ctrl-C is for who started it
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
        return process, msgspec.json.decode(process.stdout.readline(), type=UnitSpec)
    except (OSError, msgspec.MsgspecError) as error:
        _end(process)
        raise QueueUnavailableError("a storage unit", _START_TIMEOUT_S, "its process ended early") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """Be a storage unit until standard input ends."""
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=UnitSettings)
    if settings.fd >= 0:
        memory, mark = Memory(settings.fd, settings.capacity_bytes, is_owner=True), settings.mark
    else:
        memory, mark = make_memory(settings.capacity_bytes)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    loop = EventLoop()
    server = UnitServer(context, loop, memory, JobKeys.derive(settings.secret), settings.host)
    spec = UnitSpec(os.getpid(), memory.fd, settings.capacity_bytes, mark, server.endpoint)
    sys.stdout.buffer.write(msgspec.json.encode(spec) + b"\n")
    sys.stdout.buffer.flush()
    is_over: list[bool] = []

    def on_input() -> None:
        if not os.read(0, BLOCK_BYTES):
            is_over.append(True)

    loop.add_reader(0, on_input)
    loop.run_until(lambda: bool(is_over))
    server.close()
    context.destroy(linger=0)
    memory.close()


if __name__ == "__main__":
    main()
