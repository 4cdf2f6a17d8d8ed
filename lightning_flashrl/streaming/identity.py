"""Who speaks to a queue's server: what messages, and connections to its Unix socket, begin with."""

from __future__ import annotations

import functools
import hashlib
import struct
from pathlib import Path

OWNER_BYTES = 16
BOOT_BYTES = 8
TOKEN_BYTES = 32
NUMBER_BYTES = 8
NO_BOOT = bytes(BOOT_BYTES)
OWNER = struct.Struct("<4sI8s")
"""Which host, process and client; by the first two the server of a queue that goes on knows who is gone."""
ANCHOR, THREAD = b"A", b"T"
"""After the token: the connection that lives as long as its client, or one of the client's threads."""


@functools.cache
def host_mark() -> bytes:
    """Return four bytes that this host has until it is started anew."""
    return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).digest()[:4]


def is_gone(owner: bytes) -> bool:
    """Whether a client's process was one of this host, and is no more."""
    host, pid, _ = OWNER.unpack(owner)
    return bool(host == host_mark()) and not Path(f"/proc/{pid}").exists()
