"""What a run leaves behind, as values: one line per step from the training, one per recovery from ``flashrun``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("notice", "start", "connect", "set-up and state", "redo")
"""Parts of a recovery, one after the other: the fault is noticed, the new process reports and the plan is made, groups
are formed, the program runs up to where it enters while the donor waits to send, the interrupted work is done again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        loss: of the step.
        wall_s: when it ended, seconds since the Unix epoch.
    """

    step: int
    loss: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery, as ``recovery.jsonl`` tells it.

    Attributes:
        quorum_id: number of the quorum that it formed.
        lost: global ranks that were replaced.
        reasons: how each was lost.
        donors: who gave state to whom, ``{newcomer: donor}``.
        plan: the planner's sentence.
        timings_ms: duration of each stage: ``detect``, ``report``, ``total``, …
        is_complete: ``False`` when a further fault overtook it.
        wall_s: when it ended, seconds since the Unix epoch.
    """

    quorum_id: int
    lost: tuple[int, ...]
    reasons: dict[int, str]
    donors: dict[int, int]
    plan: str
    timings_ms: dict[str, float]
    is_complete: bool
    wall_s: float

    @property
    def duration_ms(self) -> float:
        """From the first sign of the fault to the last rank's being through."""
        return self.timings_ms.get("detect", 0.0) + self.timings_ms.get("total", 0.0)

    @property
    def began_s(self) -> float:
        """First sign of the fault, seconds since the Unix epoch."""
        return self.wall_s - self.duration_ms / 1e3

    @property
    def cause(self) -> str:
        """How the first of the lost ranks was lost, in a few words.

        >>> Recovery(1, (2,), {2: "hung: the process has been stopped for 0.6 s"}, {}, "", {}, True, 0.0).cause
        'hung'
        """
        return next(iter(self.reasons.values()), "lost").partition(":")[0]

    def stages_ms(self) -> dict[str, float]:
        """The duration cut into :data:`STAGES`.

        Stages are maxima over ranks, and ranks overlap: what the named stages leave of the duration is the redo of the
        interrupted work, which ends when the slowest rank is through.

        >>> timings = {"detect": 0.1, "report": 220.0, "rendezvous": 130.0, "transfer": 190.0, "total": 760.0}
        >>> stages = Recovery(1, (1,), {}, {}, "", timings, True, 0.0).stages_ms()
        >>> {name: round(duration_ms) for name, duration_ms in stages.items()}
        {'notice': 0, 'start': 220, 'connect': 130, 'set-up and state': 190, 'redo': 220}
        """
        left = self.duration_ms
        cut: dict[str, float] = {}
        keys = (("detect",), ("report", "plan"), ("rendezvous",), ("transfer",))
        for stage, parts in zip(STAGES, keys, strict=False):
            cut[stage] = min(left, sum(self.timings_ms.get(part, 0.0) for part in parts))
            left -= cut[stage]
        cut[STAGES[-1]] = left
        return cut


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file; lines that a killed process left unfinished are passed over."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def read_steps(path: Path) -> list[Step]:
    """Read ``{"step", "loss", "wall_s"}`` lines, in the order of steps.

    A step whose line was written again (rank 0 was lost right after the first) counts once, when it was first there.
    """
    found: dict[int, Step] = {}
    for line in _lines(path):
        if {"step", "loss", "wall_s"} <= line.keys():
            found.setdefault(int(line["step"]), Step(int(line["step"]), float(line["loss"]), float(line["wall_s"])))
    return [found[step] for step in sorted(found)]


def read_recoveries(path: Path) -> list[Recovery]:
    """Read a ``recovery.jsonl``, in the order in which recoveries ended. Its lines about supervisors are left out."""
    return sorted((_recovery(line) for line in _lines(path) if line.get("lost")), key=lambda found: found.wall_s)


def _recovery(line: dict[str, Any]) -> Recovery:
    return Recovery(
        quorum_id=int(line["quorum_id"]),
        lost=tuple(int(rank) for rank in line["lost"]),
        reasons={int(rank): str(reason) for rank, reason in line["reasons"].items()},
        donors={int(rank): int(donor) for rank, donor in line["donors"].items()},
        plan=str(line["plan_reason"]),
        timings_ms={str(stage): float(duration_ms) for stage, duration_ms in line["timings_ms"].items()},
        is_complete=bool(line["is_complete"]),
        wall_s=float(line["wall_s"]),
    )


def absences(recoveries: Iterable[Recovery], rank: int) -> list[tuple[float, float]]:
    """When ``rank`` was lost and when its replacement was through, seconds since the Unix epoch.

    A recovery that was overtaken and the one that overtook it are one absence.
    """
    found: list[tuple[float, float]] = []
    is_open = False
    for recovery in recoveries:
        if rank not in recovery.lost:
            continue
        if is_open:
            found[-1] = (found[-1][0], recovery.wall_s)
        else:
            found.append((recovery.began_s, recovery.wall_s))
        is_open = not recovery.is_complete
    return found
