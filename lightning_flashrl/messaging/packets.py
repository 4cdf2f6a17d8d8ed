"""Messages over a pair of sockets whose ends change hands: what a dead process sent or read in part harms nobody.

The sockets keep packets apart (``SOCK_SEQPACKET``): a packet arrives whole or not at all. A message is one packet or
several; the first and the last say so. Who begins to read in the middle of a message, because its predecessor read the
first part and died, passes over the rest; what was sent in part is dropped when the next message begins.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator

CHUNK_BYTES = 1 << 16
PACKET_BYTES = CHUNK_BYTES + 1
_FIRST, _LAST = 1, 2


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep packets apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def split(payload: bytes) -> Iterator[bytes]:
    """Cut a message into packets."""
    for start in range(0, max(len(payload), 1), CHUNK_BYTES):
        flags = _FIRST * (start == 0) | _LAST * (start + CHUNK_BYTES >= len(payload))
        yield bytes([flags]) + payload[start : start + CHUNK_BYTES]


class Assembler:
    """Puts messages together.

    >>> first, last = split(b"x" * (CHUNK_BYTES + 1))
    >>> messages = Assembler()
    >>> [messages.feed(packet) for packet in (last, first, *split(b"whole"), last)]
    [None, None, b'whole', None]
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, packet: bytes) -> bytes | None:
        """Take one packet; return the message that ends with it."""
        flags = packet[0]
        if flags & _FIRST:
            self._parts = [packet[1:]]
        elif self._parts:
            self._parts.append(packet[1:])
        if not flags & _LAST or not self._parts:
            return None
        message, self._parts = b"".join(self._parts), []
        return message


class PacketChannel:
    """One end that never blocks: it keeps what the socket does not take yet.

    Attributes:
        is_open: whether the other end may still send.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._messages = Assembler()
        self._pending: deque[bytes] = deque()
        self.is_open = True

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    @property
    def has_pending(self) -> bool:
        """Whether packets wait until the other end reads."""
        return bool(self._pending)

    def send(self, payload: bytes) -> None:
        """Queue one message and send what the socket takes."""
        if self.is_open:
            self._pending.extend(split(payload))
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        while self._pending and self.is_open:
            try:
                self._socket.send(self._pending[0])
            except BlockingIOError:
                return
            except OSError:  # the other end is gone; reading will tell
                self._pending.clear()
                return
            self._pending.popleft()

    def receive(self) -> list[bytes]:
        """Return the messages that have arrived; clears :attr:`is_open` when there will be no more."""
        found: list[bytes] = []
        while self.is_open:
            try:
                packet = self._socket.recv(PACKET_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:  # said once, before what is still here: the other end left something unread
                continue
            except OSError:
                packet = b""
            if not packet:
                self.is_open = False
                break
            message = self._messages.feed(packet)
            if message is not None:
                found.append(message)
        return found

    def close(self) -> None:
        """Close the descriptor."""
        self.is_open = False
        self._socket.close()
