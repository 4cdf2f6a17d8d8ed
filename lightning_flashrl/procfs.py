"""What the kernel says of processes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

_KILL_TIMEOUT_S = 10.0


def all_processes() -> list[int]:
    """Return the numbers of all processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def end_process(pid: int, is_it: Callable[[int], bool]) -> None:
    """Kill a process and wait until it is gone, if it is still the one that is meant when its number is held."""
    with contextlib.suppress(OSError):  # it is gone, or another user's
        pidfd = os.pidfd_open(pid)
        try:
            if is_it(pid):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _KILL_TIMEOUT_S)
        finally:
            os.close(pidfd)


def read_stat(path: str) -> list[str]:
    """Return the fields of a ``stat`` file behind the name; empty when there is no such process or thread."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_command_line(pid: int) -> list[str]:
    """Return what a process was started with; empty for a zombie.

    Raises:
        OSError: there is no such process, or it is another user's.
    """
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")


def process_state(pid: int) -> str | None:
    """Return the kernel's letter for a process's state, or ``None`` when there is no such process."""
    stat = read_stat(f"/proc/{pid}/stat")
    return stat[0] if stat else None


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process."""
    return process_state(pid) == "T"
