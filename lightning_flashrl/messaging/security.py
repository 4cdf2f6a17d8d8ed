"""Who may talk to the controller: keys derived from a per-job secret, and the check of each connection (ZAP).

Agents of one job share a secret. Both CURVE key pairs (the controller's and the agents') are derived from it, so who
has the secret is let in, and nobody else gets past the handshake: no message of a stranger is ever decoded. CURVE uses
fresh session keys for each connection, so recorded bytes are worth nothing later.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from lightning_flashrl.messaging.loop import EventLoop

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_HANDSHAKE_TIMEOUT_MS = 5000
_MAX_MESSAGE_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class JobKeys:
    """The CURVE keys of a job, in Z85."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    @classmethod
    def derive(cls, secret: str) -> JobKeys:
        """Make both key pairs from the job's secret; the same everywhere.

        >>> JobKeys.derive("a") == JobKeys.derive("a"), JobKeys.derive("a") == JobKeys.derive("b")
        (True, False)
        """
        server, client = (
            z85.encode(hashlib.scrypt(secret.encode(), salt=f"flashrl {role}".encode(), n=2**12, r=8, p=1, dklen=32))
            for role in ("controller", "agent")
        )
        return cls(zmq.curve_public(server), server, zmq.curve_public(client), client)

    def guard_server(self, sock: zmq.Socket[bytes]) -> None:
        """Let a socket accept only those who have the agents' key. Before ``bind``."""
        sock.curve_server = True
        sock.curve_publickey = self.server_public
        sock.curve_secretkey = self.server_secret
        sock.zap_domain = b"flashrl"
        sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_TIMEOUT_MS)
        sock.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)

    def guard_client(self, sock: zmq.Socket[bytes]) -> None:
        """Let a socket connect to the job's controller, and to nobody who only claims to be it. Before ``connect``."""
        sock.curve_serverkey = self.server_public
        sock.curve_publickey = self.client_public
        sock.curve_secretkey = self.client_secret
        sock.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)


class DoorKeeper:
    """Answers ZeroMQ's question whether a client key is known.

    Attributes:
        num_refused: connections with another key.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], loop: EventLoop, keys: JobKeys) -> None:
        self.num_refused = 0
        self._loop = loop
        self._allowed = z85.decode(keys.client_public)
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        loop.add_reader(self._socket, self._on_request)

    def _on_request(self) -> None:
        version, request_id, _domain, _address, _identity, mechanism, *credentials = self._socket.recv_multipart()
        is_known = mechanism == b"CURVE" and credentials == [self._allowed]
        self.num_refused += not is_known
        status = (b"200", b"OK", b"agent") if is_known else (b"400", b"unknown key", b"")
        self._socket.send_multipart([version, request_id, *status, b""])

    def close(self) -> None:
        """Stop answering."""
        self._loop.remove(self._socket)
        self._socket.close()
