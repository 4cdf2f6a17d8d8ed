"""One line per event of a benchmark job, written at once, one file a process: a killed process loses none."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Event:
    """What a process did.

    Attributes:
        kind: ``start`` (the program began), ``step`` (an update is in the parameters) or ``end``.
        time_ns: on the clock that all processes of a host share.
        rank: whose place the process had when it began.
        pid: of the process.
        step: updates committed; of ``start``, 0.
        num_members: ranks that took part in the update.
        weights: digest of the final parameters, in ``end``.
    """

    kind: str
    time_ns: int
    rank: int
    pid: int
    step: int
    num_members: int
    weights: str


class StepLog:
    """Writes events of this process.

    Args:
        folder: of the job.
        rank: of this process.
    """

    def __init__(self, folder: str, rank: int) -> None:
        self._rank = rank
        self._fd = os.open(f"{folder}/{rank}-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.write("start", 0, 0)

    def write(self, kind: str, step: int, num_members: int, weights: str = "") -> None:
        now_ns = time.monotonic_ns()
        values = [kind, now_ns, self._rank, os.getpid(), step, num_members, weights]
        os.write(self._fd, json.dumps(values).encode() + b"\n")


def read_events(folder: Path) -> list[Event]:
    """All events of a job so far, oldest first."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return sorted((Event(*json.loads(line)) for line in lines if line.endswith("\n")), key=lambda event: event.time_ns)
