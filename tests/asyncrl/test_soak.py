"""Processes of reinforcement learning runs are killed at random, for minutes; each run is audited from its files alone.

``FLASHRL_SOAK_MINUTES`` says how long (10), ``FLASHRL_SOAK_SEED`` with which run to begin, ``FLASHRL_SOAK_REPORT``
where the figures go.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_flashrl.asyncrl.audit import audit
from lightning_flashrl.asyncrl.history import read_kills

STEPS = 200
MTBF_S = (5, 10, 5, 30, 5, 10, 5, 60)
STALENESS = (1, 0, 4, 1)
HANG_SHARE = (0, 0.2, 0.2)
WORKERS = ((), (), ("rollout.reward_workers=1", "algorithm.kl_coefficient=0.01"))
_SETTINGS = ("experiment=grpo_sort", "strategy=flash_ddp", "trainer.devices=2", "record=true", "warm_start.steps=40")


class _Figures:
    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.runs = 0
        self.steps = 0
        self.rows = 0
        self.kills: collections.Counter[str] = collections.Counter()
        self.failures: dict[int, str] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began_s

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "steps": self.steps,
            "rows": self.rows,
            "kills": sum(self.kills.values()),
            "kills_by_role_and_signal": dict(self.kills.most_common()),
            "failures": {str(seed): text for seed, text in self.failures.items()},
            "seconds": round(self.seconds, 1),
        }


def _run(seed: int, figures: _Figures) -> None:
    mtbf_s, staleness = MTBF_S[seed % len(MTBF_S)], STALENESS[seed % len(STALENESS)]
    hang_share, workers = HANG_SHARE[seed % len(HANG_SHARE)], WORKERS[seed % len(WORKERS)]
    folder = Path(tempfile.mkdtemp(prefix=f"flashrl-soak-rl-{seed}-"))
    arguments = [*_SETTINGS, f"seed={seed}", f"weights.max_staleness={staleness}", f"trainer.max_steps={STEPS}"]
    arguments += ["chaos=mtbf_10s", f"chaos.mtbf_s={mtbf_s}", f"paths.output_dir={folder}", "validate_every=1000000"]
    arguments += [f"chaos.hang_share={hang_share}", *workers]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_flashrl.cli.flashrl", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    kills = collections.Counter(f"{kill['role']} {kill['signal']}" for kill in read_kills(folder))
    faults = [f"it left with status {done.returncode}"] if done.returncode else _faults(folder, staleness, figures)
    figures.runs += 1
    figures.kills.update(kills)
    told = f"seed {seed}, a kill every {mtbf_s} s, staleness {staleness}: {dict(kills)}"
    if faults:
        figures.failures[seed] = "; ".join(faults)
        print(f"FAILED {told}: {figures.failures[seed]}; look at {folder}", flush=True)
    else:
        shutil.rmtree(folder)
        print(f"{told}: well, {figures.seconds:.0f} s so far", flush=True)


def _faults(folder: Path, staleness: int, figures: _Figures) -> list[str]:
    found = audit(folder, staleness)
    summary = json.loads((folder / "summary.json").read_text())
    figures.steps += found.num_steps
    figures.rows += found.num_rows
    unbalanced = {
        name: summary[name]
        for name in ("steps_lost", "rows_lost", "rows_duplicated", "rows_left", "rows_dropped")
        if summary[name]
    }
    return found.faults + ([f"the books say {unbalanced}"] if unbalanced else [])


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_kills_at_random_lose_and_double_nothing() -> None:
    figures, minutes = _Figures(), float(os.environ.get("FLASHRL_SOAK_MINUTES", "10"))
    for seed in itertools.count(int(os.environ.get("FLASHRL_SOAK_SEED", "0"))):
        _run(seed, figures)
        if figures.seconds > 60 * minutes or len(figures.failures) == 3:
            break
    text = json.dumps(figures.as_json(), indent=1)
    print(text)
    if report := os.environ.get("FLASHRL_SOAK_REPORT"):
        Path(report).write_text(text)
    assert not figures.failures
    assert figures.kills, "nobody was killed: nothing was tested"
