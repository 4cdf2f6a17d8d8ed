"""What the kernel says of processes."""

from __future__ import annotations


def read_stat(path: str) -> list[str]:
    """Return the fields of a ``stat`` file behind the name; empty when there is no such process or thread."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def process_state(pid: int) -> str | None:
    """Return the kernel's letter for a process's state, or ``None`` when there is no such process."""
    stat = read_stat(f"/proc/{pid}/stat")
    return stat[0] if stat else None


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process."""
    return process_state(pid) == "T"
