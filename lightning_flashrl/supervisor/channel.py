"""Messages over an inherited pair of sockets: how a rank and its agent talk.

The pair has no address, so nobody else can connect, and the kernel keeps what a rank wrote for its agent even when the
rank dies right after. The agent's end never blocks, and passes to the agent's successor when the agent dies; the rank's
end blocks and may be used by several threads.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from lightning_flashrl.messaging.packets import PACKET_BYTES, Assembler, split


class RankChannel:
    """The rank's end: blocks. Used by the process that owns it, never by its forked children."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        os.set_inheritable(fd, False)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._messages = Assembler()

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    @property
    def is_own(self) -> bool:
        """Whether this process owns it, and is no forked child of the one that does."""
        return os.getpid() == self._pid

    def send(self, payload: bytes) -> None:
        """Send one message; it is with the kernel on return. Without a job nobody listens, and nothing happens."""
        if not self.is_own:
            return
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for packet in split(payload):
                self._socket.send(packet)

    def receive(self) -> list[bytes] | None:
        """Block for a packet and return the message that ends with it, if one does; ``None`` when no more will come."""
        try:
            packet = self._socket.recv(PACKET_BYTES)
        except ConnectionResetError:
            return None
        if not packet:
            return None
        message = self._messages.feed(packet)
        return [] if message is None else [message]


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
