"""The server's Unix socket, for clients on its host.

It answers in a third of the time of TCP and tells at once that a client is gone; it is open only to processes of the
same user that name a token.
"""

from __future__ import annotations

import functools
import hmac
import itertools
import secrets
from collections.abc import Callable

from lightning_flashrl.messaging.frames import FrameChannel
from lightning_flashrl.messaging.local import listen_locally, peer_pid
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.streaming.identity import ANCHOR, TOKEN_BYTES

BACKLOG = 4096


class LocalDoor:
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
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.num_refused = 0
        self._loop = loop
        self._on_frame = on_frame
        self._on_end = on_end
        self._numbers = itertools.count()
        self._channels: dict[bytes, FrameChannel] = {}
        self._let_in: dict[bytes, bytes | None] = {}  # connection → client, if it is the client's first
        self._socket = listen_locally(self.address, BACKLOG)
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
            elif hmac.compare_digest(received[:TOKEN_BYTES], self.token):
                kind, owner = received[TOKEN_BYTES : TOKEN_BYTES + 1], received[TOKEN_BYTES + 1 :]
                self._let_in[peer] = owner if kind == ANCHOR else None
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
        """End all connections."""
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        for channel in self._channels.values():
            self._loop.remove(channel.fileno())
            channel.close()
        self._channels.clear()
