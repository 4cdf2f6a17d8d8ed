"""Sockets between processes of one host and one user, known by a name that leaves no file: it goes with its process."""

from __future__ import annotations

import os
import socket
import struct

_PEER = struct.Struct("3i")
"""Process, user and group at the other end."""


def listen_locally(name: str, backlog: int = 128) -> socket.socket:
    """Be found under a name.

    Args:
        name: of this process, for all of the host.
        backlog: how many may connect before they are let in.

    Raises:
        OSError: another process has that name.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{name}")
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def connect_locally(name: str) -> socket.socket | None:
    """Return a socket to the process of that name; ``None`` if there is none, or it is another user's."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(f"\0{name}")
    except OSError:
        sock.close()
        return None
    if not peer_pid(sock):
        sock.close()
        return None
    return sock


def peer_pid(sock: socket.socket) -> int:
    """Return the process at the other end; 0 if it is another user's."""
    pid, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid if user == os.geteuid() else 0
