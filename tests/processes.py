"""Which process of a running job is which."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from lightning_flashrl.supervisor.root import SUPERVISOR_NAME


def supervisor_of(root: int) -> int | None:
    """The supervisor below a root, such as ``flashrun``; ``None`` when there is none."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()[:2]
                if int(parent) == root and state != b"Z" and _name_of(name) == SUPERVISOR_NAME:
                    return int(name)
    return None


def _name_of(pid: str) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def await_supervisor(root: int, *, other_than: int | None = None, timeout_s: float = 20.0) -> int:
    """Wait until there is a supervisor, another one than that."""
    deadline = time.monotonic() + timeout_s
    while (pid := supervisor_of(root)) in (None, other_than):
        assert time.monotonic() < deadline, "there is no supervisor"
        time.sleep(0.0005)
    assert pid is not None
    return pid
