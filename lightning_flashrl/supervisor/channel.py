"""Length-prefixed frames over an inherited socket pair: how a rank and its agent talk.

A socket pair has no address, so nobody else can connect, and the kernel keeps what a rank wrote for its agent even when
the rank dies right after. The agent's end never blocks; the rank's end blocks and may be used by several threads.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading

_LENGTH = struct.Struct("<I")
_CHUNK_BYTES = 1 << 16
MAX_FRAME_BYTES = 1 << 28


class FrameTooLargeError(ValueError):
    """A peer announced a frame that no message of ours has."""


class FrameBuffer:
    """Cuts a stream into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; return the frames that are complete now.

        Raises:
            FrameTooLargeError: the stream is not one of ours.

        >>> frames = FrameBuffer()
        >>> frames.feed(frame(b"ab")[:3])
        []
        >>> frames.feed(frame(b"ab")[3:] + frame(b""))
        [b'ab', b'']
        """
        self._data += data
        found: list[bytes] = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._data, start)
            if size > MAX_FRAME_BYTES:
                raise FrameTooLargeError(
                    f"a frame of {size} bytes was announced, at most {MAX_FRAME_BYTES} are allowed"
                )
            end = start + _LENGTH.size + size
            if len(self._data) < end:
                break
            found.append(bytes(self._data[start + _LENGTH.size : end]))
            start = end
        del self._data[:start]
        return found


def frame(payload: bytes) -> bytes:
    """Prefix ``payload`` with its length."""
    return _LENGTH.pack(len(payload)) + payload


class AgentChannel:
    """The agent's end: never blocks.

    Attributes:
        is_open: whether the other end may still send.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._frames = FrameBuffer()
        self._pending = bytearray()
        self.is_open = True

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    @property
    def has_pending(self) -> bool:
        """Whether bytes wait until the other end reads."""
        return bool(self._pending)

    def send(self, payload: bytes) -> None:
        """Queue one frame and send what the socket takes."""
        if self.is_open:
            self._pending += frame(payload)
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        while self._pending and self.is_open:
            try:
                sent = self._socket.send(self._pending)
            except BlockingIOError:
                return
            except OSError:  # the rank is gone; its exit is noticed elsewhere
                self._pending.clear()
                return
            del self._pending[:sent]

    def receive(self) -> list[bytes]:
        """Return the frames that have arrived; clears :attr:`is_open` at the end of the stream."""
        found: list[bytes] = []
        while self.is_open:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.is_open = False
                break
            try:
                found += self._frames.feed(data)
            except FrameTooLargeError:
                self.is_open = False
        return found

    def close(self) -> None:
        """Close the descriptor."""
        self.is_open = False
        self._socket.close()


class RankChannel:
    """The rank's end: blocks. Used by the process that owns it, never by its forked children."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        os.set_inheritable(fd, False)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._frames = FrameBuffer()

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    def send(self, payload: bytes) -> None:
        """Send one frame; it is with the kernel on return. Without an agent nobody listens, and nothing happens."""
        if os.getpid() != self._pid:
            return
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(frame(payload))

    def receive(self) -> list[bytes] | None:
        """Block for bytes and return the frames complete by then, or ``None`` at the end of the stream."""
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except ConnectionResetError:
            return None
        return self._frames.feed(data) if data else None


_of_process: RankChannel | None = None


def rank_channel() -> RankChannel | None:
    """Return this process's channel to its agent, or ``None`` when no agent started it."""
    global _of_process
    fd = os.environ.get("FLASHRL_CONTROL_FD")
    if fd is None:
        return None
    if _of_process is None:
        try:
            _of_process = RankChannel(int(fd))
        except (OSError, ValueError):  # the variable was inherited by a program that has no such descriptor
            return None
    return _of_process


def adopt_channel(channel: RankChannel) -> None:
    """Make an existing channel the one that :func:`rank_channel` returns."""
    global _of_process
    _of_process = channel
