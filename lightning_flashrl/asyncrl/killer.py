"""Kills or stops processes of a run on purpose, at random or on schedule, and writes down which.

``python -m lightning_flashrl.asyncrl.killer`` is a process of its own, so that it outlives whom it kills. It knows a
run from its folder: ``processes.json`` says who is there, ``history.jsonl`` how far training is.

======================  =====================================  ==================================
who                     waits for                              unblocked by
======================  =====================================  ==================================
the killer              its next moment; a step since the      time; the run; the end of the run
                        last kill of a trainer rank
======================  =====================================  ==================================
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.history import HISTORY, KILLS
from lightning_flashrl.asyncrl.processes import ProcessEntry, is_alive, read_processes
from lightning_flashrl.supervisor.process import die_with_parent

_LOOK_S = 0.1
_TAIL_BYTES = 1 << 16
_ONLY = -1
"""Rank of a process that is the only one of its role."""
ROLES = ("trainer", "queue", "standby", "supervisor", "rollout", "reward", "reference")
"""Whose processes may die in a run under ``flash_ddp``."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A kill that is planned.

    Attributes:
        step: optimizer steps of the run before it.
        role: of the process.
        rank: its number among those of its role; −1 if there is only one.
        hangs: it is stopped instead, and hangs.

    >>> Strike.parse("rollout 0 at step 12")
    Strike(step=12, role='rollout', rank=0, hangs=False)
    >>> Strike.parse("queue hangs at step 3")
    Strike(step=3, role='queue', rank=-1, hangs=True)
    """

    step: int
    role: str
    rank: int
    hangs: bool = False

    @classmethod
    def parse(cls, text: str) -> Strike:
        """Read ``ROLE RANK at step STEP`` or ``ROLE RANK hangs at step STEP``.

        Raises:
            ValueError: it is not of that form.
        """
        words = text.split()
        if hangs := words[-4:-3] == ["hangs"]:
            del words[-4]
        match words:
            case [role, rank, "at", "step", step] if rank.isdecimal() and step.isdecimal() and role in ROLES:
                return cls(int(step), role, int(rank), hangs)
            case ["queue" | "standby" | "supervisor" as role, "at", "step", step] if step.isdecimal():
                return cls(int(step), role, _ONLY, hangs)
        raise ValueError(
            f"{text!r} is no strike; write 'ROLE RANK at step STEP' or 'ROLE RANK hangs at step STEP', with a role of "
            f"{', '.join(ROLES)}"
        )


@dataclass(slots=True)
class _Run:
    """A run, seen through its folder."""

    folder: Path

    def processes(self, role: str) -> list[ProcessEntry]:
        try:
            _, found = read_processes(self.folder / "processes.json")
        except FileNotFoundError:
            return []
        return [entry for entry in found if entry.role == role and is_alive(entry)]

    def step(self) -> int:
        with contextlib.suppress(FileNotFoundError), (self.folder / HISTORY).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            for line in reversed(file.read().splitlines()):
                with contextlib.suppress(ValueError):  # cut at either end
                    told = json.loads(line)
                    if told["kind"] == "step":
                        return int(told["step"])
        return 0

    @property
    def is_over(self) -> bool:
        return (self.folder / "summary.json").exists()


class Killer:
    """Kills processes of a run until it ends.

    Args:
        folder: of the run.
        mtbf_s: mean time between kills, exponentially distributed; ``None`` for none at random.
        strikes: kills at set steps.
        roles: whose processes are killed at random.
        seed: of the random numbers.
        max_kills: in all; ``None`` for no limit.
        hang_share: of those at random, how many are stopped instead of killed.
    """

    def __init__(
        self,
        folder: Path,
        mtbf_s: float | None,
        strikes: Sequence[Strike],
        roles: Sequence[str],
        seed: int,
        max_kills: int | None,
        hang_share: float = 0.0,
    ) -> None:
        self._run = _Run(folder)
        self._mtbf_s = mtbf_s
        self._strikes = sorted(strikes, key=lambda strike: strike.step)
        self._roles = tuple(roles)
        self._random = random.Random(seed)
        self._left = max_kills
        self._hang_share = hang_share
        self._struck_at = -2
        """Step of the run when a trainer rank was killed last: the next must not die before all have gone on."""

    def run(self) -> None:
        """Kill until the run ends."""
        next_s = self._next_s()
        while not self._run.is_over and self._left != 0:
            clock.sleep(_LOOK_S)
            if (
                self._strikes
                and self._run.step() >= self._strikes[0].step
                and self._strike(self._victim(self._strikes[0]), self._strikes[0].hangs)
            ):
                del self._strikes[0]
            if next_s is not None and clock.now_s() >= next_s:
                self._strike(self._any_victim(), self._random.random() < self._hang_share)
                next_s = self._next_s()
            if next_s is None and not self._strikes:
                return

    def _next_s(self) -> float | None:
        return None if self._mtbf_s is None else clock.now_s() + self._random.expovariate(1 / self._mtbf_s)

    def _victim(self, strike: Strike) -> ProcessEntry | None:
        if strike.role == "trainer" and not self._may_lose_a_rank():
            return None
        return next((one for one in self._run.processes(strike.role) if strike.rank in (_ONLY, one.rank)), None)

    def _any_victim(self) -> ProcessEntry | None:
        roles = [role for role in self._roles if role != "trainer" or self._may_lose_a_rank()]
        found = [one for role in roles for one in self._run.processes(role)]
        return self._random.choice(found) if found else None

    def _may_lose_a_rank(self) -> bool:
        return self._run.step() > self._struck_at + 1  # the one after it may have been committed before

    def _strike(self, victim: ProcessEntry | None, hangs: bool) -> bool:
        if victim is None:
            return False
        step, number = self._run.step(), signal.SIGSTOP if hangs else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, number)
            if victim.role == "trainer":
                self._struck_at = step
            if self._left is not None:
                self._left -= 1
            told = {
                "at_s": clock.now_s(),
                "step": step,
                "role": victim.role,
                "rank": victim.rank,
                "pid": victim.pid,
                "signal": number.name,
            }
            with (self._run.folder / KILLS).open("a") as file:
                file.write(json.dumps(told) + "\n")
            return True
        return False


def main() -> None:
    """Be a killer until the run ends."""
    parent_pid, text = sys.argv[1:]
    die_with_parent(int(parent_pid))
    settings = json.loads(text)
    strikes = [Strike.parse(text) for text in settings.pop("schedule")]
    Killer(Path(settings.pop("folder")), strikes=strikes, **settings).run()


if __name__ == "__main__":
    main()
