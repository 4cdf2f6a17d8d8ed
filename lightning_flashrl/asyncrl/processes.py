"""Which processes a run has: found in the process tree, named by those who know them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_flashrl import clock
from lightning_flashrl.files import replacing
from lightning_flashrl.procfs import all_processes
from lightning_flashrl.supervisor.root import SUPERVISOR_NAME

STANDBY_NAME = "flashrl-standby"
"""What the kernel calls a process that waits to become the one of the queue."""
_ROLES = {SUPERVISOR_NAME: "supervisor", STANDBY_NAME: "standby"}
_SAME_S = 1.0
"""The wall clock may be set by less than this while a run goes on."""
_STATES = {"R": "running", "S": "running", "D": "running", "I": "running", "T": "stopped", "t": "stopped"}


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One process of a run.

    Attributes:
        role: ``"trainer"``, ``"rollout"``, … ; ``"root"`` and ``"supervisor"`` of the node; ``"standby"`` for the next
            ``"queue"``; ``"other"`` for the rest.
        rank: number within the role; −1 where there is none.
        pid: its number.
        since_s: start, in seconds since the Unix epoch.
        state: ``"running"``, ``"stopped"``, ``"ended"``, or what the process said of itself.
    """

    role: str
    rank: int
    pid: int
    since_s: float
    state: str


@dataclass(frozen=True, slots=True)
class _Seen:
    pid: int
    parent: int
    name: str
    state: str
    since_s: float


def _look_around() -> dict[int, _Seen]:
    """Return every process of the machine that can be seen."""
    return {pid: seen for pid in all_processes() if (seen := _look_at(pid)) is not None}


def _look_at(pid: int) -> _Seen | None:
    """Return what the kernel says of a process; ``None`` if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        names, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        fields = rest.split()
        began_s = clock.wall_s() - clock.now_s() + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return _Seen(pid, int(fields[1]), names.partition("(")[2], fields[0], began_s)
    return None


def list_processes(root_pid: int, known: Mapping[int, tuple[str, int, str]]) -> list[ProcessEntry]:
    """Return the processes of a tree.

    Args:
        root_pid: its root.
        known: role, rank and own word of processes, by pid; those that are gone are listed as ended. An empty word
            leaves the state to the operating system.
    """
    seen = _look_around()
    children: dict[int, list[int]] = {}
    for process in seen.values():
        children.setdefault(process.parent, []).append(process.pid)
    tree, line = set(known), [root_pid]
    while line:
        pid = line.pop()
        tree.add(pid)
        line += [child for child in children.get(pid, ()) if child not in tree]
    entries = []
    for pid in sorted(tree):
        role, rank, word = known.get(pid, ("root" if pid == root_pid else "other", -1, ""))
        if pid not in known and pid in seen:
            role = _ROLES.get(seen[pid].name, role)
        if pid not in seen or seen[pid].state in "ZX":
            if pid in known:
                entries.append(ProcessEntry(role, rank, pid, 0.0, "ended"))
            continue
        process = seen[pid]
        state = _STATES.get(process.state, process.state)
        entries.append(ProcessEntry(role, rank, pid, process.since_s, word if word and state == "running" else state))
    return sorted(entries, key=lambda entry: (entry.role != "trainer", entry.role, entry.rank, entry.pid))


def is_alive(entry: ProcessEntry) -> bool:
    """Whether a process is there, and the same: its number may have been given to another."""
    seen = _look_at(entry.pid)
    return seen is not None and seen.state not in "ZX" and abs(seen.since_s - entry.since_s) < _SAME_S


def write_processes(path: Path, entries: list[ProcessEntry]) -> None:
    """Write them, whole or not at all."""
    text = json.dumps({"written_s": clock.wall_s(), "processes": [asdict(entry) for entry in entries]}, indent=1)
    with replacing(path) as beside:
        beside.write_text(text)


def read_processes(path: Path) -> tuple[float, list[ProcessEntry]]:
    """Return when they were written, and them."""
    found = json.loads(path.read_text())
    return found["written_s"], [ProcessEntry(**entry) for entry in found["processes"]]
