"""Which phases a step passes, and how many updates each counts: the numbers that fault lines are written with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiprocess.harness import JOB, environment

PHASES = JOB.with_name("phases.py")
BEFORE = "0 setup, 0 sanity_check"

AUTOMATIC = f"""
{BEFORE},
0 batch_start, 0 forward, 0 backward, 0 all_reduce, 0 commit, 0 optimizer_step, 1 checkpoint, 1 batch_end,
1 batch_start, 1 forward, 1 backward, 1 all_reduce, 1 commit, 1 optimizer_step, 2 checkpoint, 2 batch_end,
2 validation, 2 epoch_end, 2 fit_end
"""
ACCUMULATED = f"""
{BEFORE},
0 batch_start, 0 forward, 0 backward, 0 batch_end,
0 batch_start, 0 forward, 0 backward, 0 all_reduce, 0 commit, 0 optimizer_step, 1 checkpoint, 1 batch_end,
1 validation, 1 epoch_end, 1 fit_end
"""
MANUAL = f"""
{BEFORE},
0 batch_start, 0 commit, 0 forward, 0 backward, 0 all_reduce, 0 all_reduce, 1 backward, 1 all_reduce, 1 all_reduce,
2 checkpoint, 2 batch_end,
2 batch_start, 2 commit, 2 forward, 2 backward, 2 all_reduce, 2 all_reduce, 3 backward, 3 all_reduce, 3 all_reduce,
4 checkpoint, 4 batch_end, 4 commit, 4 validation, 4 epoch_end, 4 fit_end
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param([], AUTOMATIC, id="phases after the update count it"),
        pytest.param(["--accumulate", "2"], ACCUMULATED, id="a batch without an update counts none"),
        pytest.param(["--manual"], MANUAL, id="each optimizer of a manual step is an update"),
    ],
)
def test_the_phases_of_two_batches(tmp_path: Path, options: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", "1", str(PHASES)]
    done = subprocess.run(
        [*command, str(tmp_path), *options],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "passed").read_text().split("\n") == [word.strip() for word in expected.split(",")]
