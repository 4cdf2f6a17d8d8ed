"""A rank strikes the process that looks after it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal


def kill_supervisor() -> None:
    """Kill the child of our parent that has the supervisor's name."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
            if parent == os.getppid() and stat.with_name("comm").read_text() == "flashrl-superv\n":
                os.kill(int(stat.parent.name), signal.SIGKILL)
