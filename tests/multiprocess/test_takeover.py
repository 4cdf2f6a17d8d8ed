"""A training whose supervisor is killed and stopped ends like one without faults, bit for bit."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest

from tests.multiprocess.harness import assert_exact, run_stock
from tests.multiprocess.soak import SUPERVISOR, Bout, Draw, Strike, run_under_fire

JOB = tuple(shlex.split("--epochs 3 --batches 60 --feature csv --clip 1.0 --val-every 20 --checkpoint-every 30"))
RANKS, STEPS = 3, 180


def bouts(seed: int) -> tuple[Bout, ...]:
    """The supervisor alone at any moment; then together with rank 1; then in the middle of a recovery of rank 2."""
    moments = random.Random(seed)
    alone = [Bout(-1, (Strike(SUPERVISOR, "kill", moments.uniform(0.0, 2.0)),))]
    alone += [
        Bout(step, (Strike(SUPERVISOR, moments.choice(["kill", "stop"]), moments.uniform(0.0, 0.1)),))
        for step in sorted(moments.randrange(STEPS // 3) for _ in range(2))
    ]
    together = (Strike(SUPERVISOR, "kill", 0.0), Strike(1, "kill", moments.choice((0.0, 0.002, 0.01))))
    within = (Strike(2, "kill", 0.0), Strike(SUPERVISOR, "kill", moments.uniform(0.0, 0.4)))
    return (*alone, Bout(STEPS // 3 + 2, together), Bout(2 * STEPS // 3, within))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_ends_like_ddp_without_faults(tmp_path: Path, seed: int) -> None:
    expected = run_stock(RANKS, *JOB)
    outcome = run_under_fire(Draw(seed, RANKS, JOB, (), bouts(seed)), tmp_path / "run")
    assert_exact(outcome.run, expected)
    assert outcome.losses == ["killed by SIGKILL"] * 2, outcome.run.output
    assert sum("the supervisor" in strike for strike in outcome.strikes) == 5
    # one may be struck again before it says that it is back
    assert 1 <= outcome.run.output.count("it is back after") <= 5, outcome.run.output
