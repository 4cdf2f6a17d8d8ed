"""Length-prefixed frames over an inherited socket pair: how a rank and its agent talk.

A socket pair has no address, so nobody else can connect, and the kernel keeps what a rank wrote for its agent even when
the rank dies right after. The agent's end never blocks; the rank's end blocks and may be used by several threads.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from lightning_flashrl.messaging.frames import CHUNK_BYTES, FrameBuffer, frame


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
            data = self._socket.recv(CHUNK_BYTES)
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
