"""What the kernel says of processes."""

from __future__ import annotations

from pathlib import Path


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
