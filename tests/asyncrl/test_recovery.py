"""Any rank of a run under `flash_ddp` is killed, and nothing of the run is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

JOB = Path(__file__).parents[1] / "jobs" / "rl.py"
STEPS = 6


def run(output_dir: Path, *chaos: str, devices: int = 2, steps: int = STEPS, workflow: str = "async") -> dict[str, Any]:
    """Train with faults, and return the summary."""
    arguments = ["--strategy", "flash_ddp", "--devices", str(devices), "--max-steps", str(steps)]
    done = subprocess.run(
        [sys.executable, str(JOB), str(output_dir), *arguments, "--workflow", workflow],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FLASHRL_CHAOS": json.dumps(chaos)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(output_dir) in " ".join(p.info["cmdline"] or [])]
    assert left == []
    summary: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    return summary


def check(summary: dict[str, Any], recoveries: int, steps: int = STEPS) -> None:
    assert summary["recoveries"] == recoveries
    assert summary["steps"] == steps
    assert summary["rows_trained"] == summary["rows_generated"] == steps * 16
    assert summary["rows_lost"] == summary["rows_duplicated"] == summary["rows_left"] == 0
    assert summary["staleness_max"] <= 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["batch_start", "forward", "backward", "batch_end"])
def test_a_killed_rank_takes_no_row_with_it(tmp_path: Path, rank: int, phase: str) -> None:
    check(run(tmp_path, f"kill rank={rank} step=3 phase={phase}"), recoveries=1)
