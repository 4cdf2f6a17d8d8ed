"""Reinforcement learning while processes are killed: how much of the time is still useful?

python benchmarks/chaos.py [--mtbf 60 30 10 5] [--steps N] [--repeats N]

The job of `make demo` with two trainer ranks under flash_ddp and one rollout worker. A random process (trainer ranks,
rollout worker, the process on standby) is killed every so many seconds on average. *goodput* is the time of the same
steps without kills over the time with them. Each run is audited row by row from its files alone (`flashrl audit`).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contention import Watch
from report import save
from rich.console import Console
from rich.table import Table

from lightning_flashrl.asyncrl.audit import audit
from lightning_flashrl.asyncrl.history import read_history, read_kills

_TIMEOUT_S = 3600
_BACK = re.compile(r"back after (\d+) ms")


def run(folder: Path, mtbf_s: float | None, steps: int, seed: int) -> dict[str, Any]:
    """One run."""
    command = [sys.executable, "-m", "lightning_flashrl.cli.flashrl", "experiment=grpo_sort", "strategy=flash_ddp"]
    command += ["trainer.devices=2", f"trainer.max_steps={steps}", f"seed={seed}", "validate_every=1000000"]
    command += ["record=true", f"paths.output_dir={folder}"]
    if mtbf_s is not None:
        command += ["chaos=mtbf_10s", f"chaos.mtbf_s={mtbf_s}", "chaos.roles=[trainer,rollout]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=folder.parent
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    steps_done, _ = read_history(folder)
    found = audit(folder, 1)
    kills = read_kills(folder)
    return {
        "wall_s": steps_done[-1]["at_s"] - steps_done[0]["at_s"],
        "steps": found.num_steps,
        "rows": found.num_rows,
        "faults": found.faults,
        "staleness_max": found.staleness_max,
        "kills": {role: sum(kill["role"] == role for kill in kills) for role in ("trainer", "rollout")},
        "recovery_ms": [int(text) for text in _BACK.findall(done.stdout + done.stderr)],
        "reward_last": statistics.fmean(step["reward"] for step in steps_done[-5:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", nargs="+", type=float, default=[60.0, 30.0, 10.0, 5.0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    watch, found = Watch.begin(), {}
    with tempfile.TemporaryDirectory() as folder:
        for mtbf_s in (None, *arguments.mtbf):
            name = "none" if mtbf_s is None else f"{mtbf_s:g}"
            found[name] = [
                run(Path(folder) / f"{name}-{seed}", mtbf_s, arguments.steps, seed) for seed in range(arguments.repeats)
            ]
    contention = watch.end()
    calm_s = statistics.median(one["wall_s"] for one in found["none"])
    table = Table(
        *(
            "a kill every, s",
            "kills: ranks",
            "workers",
            "s",
            "goodput",
            "recovery of a rank, ms",
            "faults found",
            "reward",
        ),
        title=f"{arguments.steps} steps, two ranks and a worker",
    )
    for name, runs in found.items():
        wall_s = statistics.median(one["wall_s"] for one in runs)
        recoveries = [ms for one in runs for ms in one["recovery_ms"]]
        table.add_row(
            name,
            *(str(sum(one["kills"][role] for one in runs)) for role in ("trainer", "rollout")),
            f"{wall_s:.0f}",
            f"{calm_s / wall_s:.0%}",
            f"{statistics.median(recoveries):.0f}, at most {max(recoveries)}" if recoveries else "–",
            str(sum(len(one["faults"]) for one in runs)),
            f"{statistics.fmean(one['reward_last'] for one in runs):.2f}",
        )
    Console(width=140).print(table)
    print(f"contention: {contention}")
    save("chaos", arguments.out, {"steps": arguments.steps, "runs": found, "contention": str(contention)})


if __name__ == "__main__":
    main()
