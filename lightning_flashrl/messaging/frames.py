"""Length-prefixed frames over a stream socket."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<I")
CHUNK_BYTES = 1 << 16
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


class FrameChannel:
    """One end of a stream socket that never blocks: it keeps what the socket does not take yet.

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
            except OSError:  # the other end is gone; reading will tell
                self._pending.clear()
                return
            del self._pending[:sent]

    def receive(self) -> list[bytes]:
        """Return the frames that have arrived; clears :attr:`is_open` at the end of the stream."""
        found: list[bytes] = []
        while self.is_open:
            try:
                data = self._socket.recv(CHUNK_BYTES)
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
