"""Which process of a running job is which."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path


def _parent_and_state(pid: str | int) -> tuple[int, str]:
    state, parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:2]
    return int(parent), state.decode()


def children(parent: int) -> list[int]:
    """Living children of a process."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if _parent_and_state(name) == (parent, "Z"):
                    continue
                if _parent_and_state(name)[0] == parent:
                    found.append(int(name))
    return found


def supervisor_of(flashrun: int) -> int | None:
    """The supervisor of a job: a copy of ``flashrun`` itself, and its child."""
    command = Path(f"/proc/{flashrun}/cmdline")
    for pid in children(flashrun):
        with contextlib.suppress(OSError):
            if (content := Path(f"/proc/{pid}/cmdline").read_bytes()) and content == command.read_bytes():
                return pid
    return None


def await_supervisor(flashrun: int, *, other_than: int | None = None, timeout_s: float = 20.0) -> int:
    """Wait until there is a supervisor, another one than that."""
    deadline = time.monotonic() + timeout_s
    while (pid := supervisor_of(flashrun)) in (None, other_than):
        assert time.monotonic() < deadline, "there is no supervisor"
        time.sleep(0.0005)
    assert pid is not None
    return pid
