"""Runs the job of `tests/jobs/train.py` as users would and compares what must be exact."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB = Path(__file__).parents[1] / "jobs" / "train.py"
TIMEOUT_S = 150


@dataclass(frozen=True)
class Run:
    """A finished job."""

    returncode: int
    output: str
    digests: dict[int, Any]
    out: Path

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """The records that the controller wrote."""
        path = self.out / "logs" / "recovery.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def num_faults(self) -> int:
        """Quorum changes there were."""
        return max((record["quorum_id"] for record in self.recoveries), default=0)


def environment() -> dict[str, str]:
    """Variables of a job: ours, without those of a job around."""
    kept = {
        key: value for key, value in os.environ.items() if not re.match("RANK|WORLD_SIZE|LOCAL_|FLASHRL_|MASTER_", key)
    }
    path = os.pathsep.join(filter(None, [str(JOB.parent / "early"), kept.get("PYTHONPATH")]))
    return {
        **kept,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "WANDB_MODE": "offline",
    }


def _execute(command: list[str], out: Path, timeout_s: float) -> tuple[int, str]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=out,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return -1, output + f"\nstill running after {timeout_s} s"
    return process.returncode, output


def read_digests(out: Path) -> dict[int, Any]:
    """What the ranks of a job wrote at their end."""
    return {int(re.findall(r"\d+", p.name)[0]): json.loads(p.read_text()) for p in sorted(out.glob("digest*.json"))}


def flash_command(
    out: Path, ranks: int, *arguments: str, chaos: tuple[str, ...] = (), options: tuple[str, ...] = ()
) -> list[str]:
    """The command that runs the job under ``flashrun``."""
    command = [sys.executable, "-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", str(out / "logs")]
    for line in chaos:
        command += ["--chaos", line]
    return [*command, *options, str(JOB), "--out", str(out), *arguments]


def run_flash(
    out: Path,
    ranks: int,
    *arguments: str,
    chaos: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    timeout_s: float = TIMEOUT_S,
) -> Run:
    """Run the job under ``flashrun``."""
    out.mkdir(parents=True, exist_ok=True)
    command = flash_command(out, ranks, *arguments, chaos=chaos, options=options)
    returncode, output = _execute(command, out, timeout_s)
    return Run(returncode, output, read_digests(out), out)


@functools.cache
def run_stock(ranks: int, *arguments: str) -> dict[int, Any]:
    """Digests of the job under ``torchrun`` with Lightning's own ``ddp``; run once per session for each job."""
    out = Path(tempfile.mkdtemp(prefix="flashrl-reference-"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(JOB), "--out", str(out), "--strategy", "ddp", *arguments]
    returncode, output = _execute(command, out, TIMEOUT_S)
    assert returncode == 0, output
    return read_digests(out)


def assert_exact(run: Run, expected: dict[int, Any]) -> None:
    """Every rank's digest equals the reference's."""
    assert run.returncode == 0, run.output
    assert sorted(run.digests) == sorted(expected), run.output
    for rank, digest in run.digests.items():
        for key, value in expected[rank].items():
            assert digest.get(key) == value, (
                f"rank {rank} {key}:\n{digest.get(key)}\nexpected\n{value}\n{run.output[-3000:]}"
            )
