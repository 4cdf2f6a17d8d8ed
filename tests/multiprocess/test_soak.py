"""Random faults for many minutes: every run must end like stock `ddp` without any.

``FLASHRL_SOAK_MINUTES`` (10) says for how long, ``FLASHRL_SOAK_REPORT`` names a file for the figures as JSON.
``FLASHRL_SOAK_SEED`` repeats one run: once, or until ``FLASHRL_SOAK_MINUTES`` are over if these are given too.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_flashrl.recovery.faults import Fault
from tests.multiprocess.harness import assert_exact, run_stock
from tests.multiprocess.soak import SUPERVISOR, Draw, Outcome, draw, run_under_fire

_REFERENCE_SHARE = 0.25
_MAX_FAILURES = 5


class _Figures:
    def __init__(self) -> None:
        self.began = time.monotonic()
        self.runs = 0
        self.reference_s = 0.0
        self.how: collections.Counter[str] = collections.Counter()
        self.where: collections.Counter[str] = collections.Counter()
        self.failures: dict[int, str] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        self.how.update(outcome.losses)
        self.where.update(outcome.wheres)
        at_phases = len(outcome.losses) - len(outcome.strikes)
        if at_phases > 0:
            self.where["a phase of a chaos line"] += at_phases

    def as_json(self) -> dict[str, object]:
        return {
            "runs": self.runs,
            "failures": {str(seed): text for seed, text in self.failures.items()},
            "losses": sum(self.how.values()),
            "losses_by_how": dict(self.how.most_common()),
            "strikes_by_where": dict(self.where.most_common()),
            "seconds": round(self.seconds, 1),
            "reference_seconds": round(self.reference_s, 1),
        }


def _draws(figures: _Figures) -> Iterator[Draw]:
    """Draws until the time is over. A job that has no reference yet is taken while references have not cost much."""
    minutes, seed = os.environ.get("FLASHRL_SOAK_MINUTES"), os.environ.get("FLASHRL_SOAK_SEED")
    limit_s = 60 * float(minutes or 10)
    if seed is not None:
        yield draw(int(seed))
        while minutes is not None and figures.seconds < limit_s:
            yield draw(int(seed))
        return
    seeds, known = random.Random(), set()
    while figures.seconds < limit_s:
        drawn = draw(seeds.randrange(10**8))
        job = (drawn.ranks, drawn.arguments)
        if job in known or figures.reference_s <= _REFERENCE_SHARE * figures.seconds:
            known.add(job)
            yield drawn


def _run(drawn: Draw, figures: _Figures) -> None:
    began = time.monotonic()
    expected = run_stock(drawn.ranks, *drawn.arguments)
    figures.reference_s += time.monotonic() - began
    folder = Path(tempfile.mkdtemp(prefix=f"flashrl-soak-{drawn.seed}-"))
    outcome = run_under_fire(drawn, folder / "run")
    try:
        assert_exact(outcome.run, expected)
    except AssertionError as error:
        strikes = "\n  ".join(outcome.strikes)
        figures.failures[drawn.seed] = str(error)
        print(
            f"FAILED {drawn}\nstruck from outside:\n  {strikes}\n{str(error)[-4000:]}\n"
            f"logs: {folder}\nagain: FLASHRL_SOAK_SEED={drawn.seed} make soak",
            flush=True,
        )
    else:
        shutil.rmtree(folder)
    figures.add(outcome)
    print(f"run {figures.runs}: {drawn}\n  → {len(outcome.losses)} lost, {outcome.seconds:.1f} s", flush=True)


def test_a_seed_gives_the_same_run_each_time_and_never_strikes_everybody() -> None:
    for seed in range(300):
        drawn = draw(seed)
        assert draw(seed) == drawn
        at_phases = {Fault.parse(line).rank for line in drawn.chaos}
        assert drawn.chaos or drawn.bouts
        for bout in drawn.bouts:
            struck = {strike.rank for strike in bout.strikes} - {SUPERVISOR}
            assert len(at_phases | struck) < drawn.ranks, drawn
        assert len(at_phases) < drawn.ranks, drawn


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_random_faults_change_nothing() -> None:
    figures = _Figures()
    for drawn in _draws(figures):
        _run(drawn, figures)
        if len(figures.failures) == _MAX_FAILURES:
            break
    text = json.dumps(figures.as_json(), indent=1)
    print(text)
    if report := os.environ.get("FLASHRL_SOAK_REPORT"):
        Path(report).write_text(text)
    assert not figures.failures, (
        f"seeds {sorted(figures.failures)} failed; each is run again by FLASHRL_SOAK_SEED=<seed>"
    )
    assert figures.how, "no rank was ever lost: nothing was tested"
