"""The same kills for TRL, which starts again from its newest checkpoint: how much of the time is still useful?

python benchmarks/chaos_trl.py [--mtbf 30 10] [--seconds 90] [--save-every 1]

The job of benchmarks/grpo.py ("short"), with a checkpoint every so many steps. Its process is killed every so many
seconds on average and started again at once. *useful* is the time that its steps take at the run's own median over the
time that it took: a machine's speed may drift between two runs. Beside it stands the run of benchmarks/chaos.py with as
many kills a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos import run as run_flash
from contention import Watch
from peers import TRL
from report import save
from rich.console import Console
from rich.table import Table

JOB = Path(__file__).resolve().parent / "jobs" / "grpo_trl.py"
_WARM_UP = 4


def run_trl(folder: Path, mtbf_s: float | None, steps: int, save_every: int) -> dict[str, Any]:
    """One run, however often it must be started."""
    folder.mkdir()
    command = [str(TRL.python), str(JOB), "short", str(steps), "1", str(folder), str(save_every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = random.Random(1)
    num_kills = 0
    next_s = None if mtbf_s is None else time.monotonic() + moments.expovariate(1 / mtbf_s)
    while True:
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while (status := process.poll()) is None:
            if next_s is not None and mtbf_s is not None and time.monotonic() > next_s:
                process.kill()
                num_kills += 1
                next_s += moments.expovariate(1 / mtbf_s)
            time.sleep(0.02)
        if status == 0:
            break
        if status > 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'log').read_text()[-3000:]}")
    told = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    ends_s = {one["step"]: one["at_s"] for one in reversed(told)}  # when it was first done
    taken_s = [ends_s[step] - ends_s[step - 1] for step in range(_WARM_UP + 1, steps + 1)]
    return {
        "step_s": statistics.fmean(taken_s),
        "median_step_s": statistics.median(taken_s),
        "kills": num_kills,
        "steps_lost": len(told) - steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", nargs="+", type=float, default=[30.0, 10.0])
    parser.add_argument("--seconds", type=float, default=90.0, help="that the steps of a run take without kills")
    parser.add_argument("--save-every", type=int, default=1, help="steps between TRL's checkpoints")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    problem = TRL.problem()
    if problem is not None:
        raise SystemExit(f"TRL {problem}")
    watch = Watch.begin()
    table = Table(
        "a kill every, s", "system", "kills", "useful", "median step beside that without kills", "steps done again"
    )
    found: dict[str, dict[str, Any]] = {"TRL": {}, "flash": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calm = {
            "TRL": run_trl(folder / "trl-calm", None, 60, 10**6),
            "flash": run_flash(folder / "flash-calm", None, 150, 0),
        }
        num_steps = {system: round(arguments.seconds / one["step_s"]) for system, one in calm.items()}
        for mtbf_s in arguments.mtbf:
            key = f"{mtbf_s:g}"
            found["TRL"][key] = run_trl(folder / f"trl-{key}", mtbf_s, num_steps["TRL"], arguments.save_every)
            found["flash"][key] = run_flash(folder / f"flash-{key}", mtbf_s, num_steps["flash"], 1)
            for system, runs in found.items():
                one = runs[key]
                kills = one["kills"] if isinstance(one["kills"], int) else sum(one["kills"].values())
                lost = one["steps_lost"] if "steps_lost" in one else one["books"]["steps_lost"]
                one["useful"] = one["median_step_s"] / one["step_s"]
                checkpoints = one["median_step_s"] / calm[system]["median_step_s"] - 1
                table.add_row(key, system, str(kills), f"{one['useful']:.0%}", f"{checkpoints:+.0%}", str(lost))
    Console(width=120).print(table)
    contention = watch.end()
    print(f"contention: {contention}")
    save("chaos_trl", arguments.out, {"calm": calm, "steps": num_steps, "runs": found, "contention": str(contention)})


if __name__ == "__main__":
    main()
