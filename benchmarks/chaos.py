"""Reinforcement learning while processes are killed: how much of the time is still useful?

python benchmarks/chaos.py [--mtbf 60 30 10 5] [--seconds 240]

The job of `make demo` with two trainer ranks under flash_ddp and one rollout worker. A random process (trainer ranks,
rollout worker, the process of queue and plan, the one on standby for it, the supervisor) is killed every so many
seconds on average. *goodput* is the time that the same number of steps takes without kills over the time with them: the
mean of a run without kills before and one after each, for a machine's speed drifts. *useful* is the time that its steps
take at the run's own median over the time that it took. Each run is audited row by row from its files alone (`flashrl
audit`).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
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
_BACK = re.compile(r"it is back after (\d+) ms")
_WARM_UP = 4
_CALM_STEPS = 150
_ROLES = ("trainer", "rollout", "queue", "standby", "supervisor")


def run(folder: Path, mtbf_s: float | None, steps: int, seed: int) -> dict[str, Any]:
    """One run."""
    command = [sys.executable, "-m", "lightning_flashrl.cli.flashrl", "experiment=grpo_sort", "strategy=flash_ddp"]
    command += ["trainer.devices=2", f"trainer.max_steps={steps}", f"seed={seed}", "validate_every=1000000"]
    command += ["record=true", f"paths.output_dir={folder}"]
    if mtbf_s is not None:
        command += ["chaos=mtbf_10s", f"chaos.mtbf_s={mtbf_s}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=folder.parent
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    steps_done, _ = read_history(folder)
    found = audit(folder, 1)
    kills = read_kills(folder)
    summary = json.loads((folder / "summary.json").read_text())
    ends_s = [step["at_s"] for step in steps_done[_WARM_UP:]]
    return {
        "step_s": (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1),
        "median_step_s": statistics.median(after - before for before, after in itertools.pairwise(ends_s)),
        "wall_s": steps_done[-1]["at_s"] - steps_done[0]["at_s"],
        "steps": found.num_steps,
        "rows": found.num_rows,
        "faults": found.faults,
        "staleness_max": found.staleness_max,
        "kills": dict(collections.Counter(kill["role"] for kill in kills)),
        "recovery_ms": {**summary["recovery_ms"], "supervisor": [int(ms) for ms in _BACK.findall(done.stderr)]},
        "books": {name: summary[name] for name in ("steps_lost", "rows_lost", "rows_duplicated", "rows_dropped")},
        "reward_last": statistics.fmean(step["reward"] for step in steps_done[-5:]),
    }


def _told(num_kills: int, recovery_ms: list[float]) -> str:
    if not recovery_ms:
        return f"{num_kills}"
    return f"{num_kills}: {statistics.median(recovery_ms):,.0f}, {max(recovery_ms):,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", nargs="+", type=float, default=[60.0, 30.0, 10.0, 5.0])
    parser.add_argument("--seconds", type=float, default=240.0, help="that the steps of a run take without kills")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    watch, found = Watch.begin(), {}
    with tempfile.TemporaryDirectory() as folder:
        calm = [run(Path(folder) / "calm", None, _CALM_STEPS, 0)]
        num_steps = round(arguments.seconds / calm[0]["step_s"])
        for mtbf_s in arguments.mtbf:
            one = run(Path(folder) / f"{mtbf_s:g}", mtbf_s, num_steps, 1)
            calm.append(run(Path(folder) / f"calm-{mtbf_s:g}", None, _CALM_STEPS, 1))
            one["goodput"] = statistics.fmean(beside["step_s"] for beside in calm[-2:]) / one["step_s"]
            found[f"{mtbf_s:g}"] = one
            one["useful"] = one["median_step_s"] / one["step_s"]
            print(f"{mtbf_s:g} s: {one}", flush=True)
    contention = watch.end()
    calm_s = [one["step_s"] for one in calm]
    table = Table(
        *(
            "a kill every, s",
            "kills",
            "goodput",
            "useful",
            "faults",
            "reward",
            *(f"{role}: kills, ms" for role in _ROLES),
        ),
        title=f"{num_steps} steps of {min(calm_s):.3f} to {max(calm_s):.3f} s without kills, two ranks, a worker; "
        "ms until a successor works: median, longest",
    )
    for name, one in found.items():
        table.add_row(
            name,
            str(sum(one["kills"].values())),
            f"{one['goodput']:.1%}",
            f"{one['useful']:.1%}",
            str(len(one["faults"]) + sum(one["books"].values())),
            f"{one['reward_last']:.2f}",
            *(_told(one["kills"].get(role, 0), one["recovery_ms"].get(role, [])) for role in _ROLES),
        )
    Console(width=150).print(table)
    print(f"contention: {contention}")
    results = {"steps": num_steps, "calm": calm, "runs": found, "contention": str(contention)}
    save("chaos", arguments.out, results)


if __name__ == "__main__":
    main()
