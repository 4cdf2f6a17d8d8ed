"""A rank strikes the process that looks after it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal


def kill_supervisor() -> None:
    """The supervisor is the one child of our parent that was forked without a program of its own."""
    flashrun = os.getppid()
    command = pathlib.Path(f"/proc/{flashrun}/cmdline").read_bytes()
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            is_child = int(stat.read_bytes().rpartition(b")")[2].split()[1]) == flashrun
            if is_child and stat.with_name("cmdline").read_bytes() == command:
                os.kill(int(stat.parent.name), signal.SIGKILL)
