"""What overlapping rollouts and training gains, and what it costs: sync → streaming → async → sub-step → in flight.

python benchmarks/workflows.py [--parts real simulated sweep] [--repeats N]

real        a 0.6M-parameter Llama learns to sort digits, one trainer and one rollout worker, from the same warm start
simulated   engines that take set times: training as long as generation, half as long, twice as long
sweep       the real job with staleness 0 to 16 and three losses: what is learnt in the same number of samples

With g seconds of generation and t of training a step, measured in the sync run, overlap can gain (g + t) / max(g, t).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contention import Watch
from report import Spread, save, show
from rich.console import Console
from rich.table import Table

JOB = Path(__file__).resolve().parent / "jobs" / "workflow_job.py"
WORKFLOWS = ("sync", "streaming", "async", "sub_step", "in_flight")
BALANCES = {"as long": 1.0, "half as long": 2.0, "twice as long": 0.5}
"""Training beside generation, and how much faster the simulated trainer is than the balanced one."""
BALANCED_TOKENS_S = 22_000.0
STALENESS = (0, 1, 2, 4, 8, 16)
LOSSES = ("naive", "decoupled", "tis")
WARM_UP = 4
_TIMEOUT_S = 1200


def run(*arguments: str) -> dict[str, Any]:
    """One run of the job."""
    done = subprocess.run(
        [sys.executable, str(JOB), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{JOB.name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def mean(steps: list[dict[str, float]], name: str) -> float:
    return statistics.fmean(step[name] for step in steps)


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers of one run, from its fifth step on."""
    steps = result["steps"]
    later = steps[WARM_UP:]
    wall_s = later[-1]["at_s"] - steps[WARM_UP - 1]["at_s"]
    return {
        "step_s": wall_s / len(later),
        "samples_s": sum(step["rows"] for step in later) / wall_s,
        "waited_s": mean(later, "waited_s"),
        "idle_trainer": sum(step["waited_s"] for step in later) / wall_s,
        "idle_rollout": later[-1]["idle_share/rollout"],
        "exposed_sync_s": (later[-1]["exposed_sync_s"] - steps[0]["exposed_sync_s"]) / (len(steps) - 1),
        "reward_last": mean(steps[-10:], "reward"),
        "staleness": mean(later, "staleness/oldest"),
        "accuracy": result["accuracy"],
        "at_s": [step["at_s"] - steps[0]["at_s"] for step in steps],
        "rewards": [step["reward"] for step in steps],
    }


def reward_at(run_facts: dict[str, Any], at_s: float) -> float:
    """Mean reward of the ten steps before a moment."""
    known = [reward for when, reward in zip(run_facts["at_s"], run_facts["rewards"], strict=True) if when <= at_s]
    return statistics.fmean(known[-10:])


def overlap_table(title: str, runs: dict[str, list[dict[str, Any]]]) -> tuple[Table, dict[str, Any]]:
    """Compare workflows of the same job."""
    sync = runs["sync"]
    generation_s = statistics.median(found["waited_s"] for found in sync)
    training_s = statistics.median(found["step_s"] for found in sync) - generation_s
    ideal = (generation_s + training_s) / max(generation_s, training_s)
    at_s = min(found["at_s"][-1] for results in runs.values() for found in results)
    table = Table(
        *("workflow", "samples/s", "gain", "of ideal", "trainer idle", "rollout idle", "copy waited, ms"),
        *("reward, same samples", "reward, same time"),
        title=f"{title}: generation {generation_s:.2f} s, training {training_s:.2f} s a step, ideal {ideal:.2f}x",
    )
    gains: dict[str, float] = {}
    for name, results in runs.items():
        # Runs of one round follow each other: their ratio is less disturbed than that of two medians.
        gain = Spread.of(found["samples_s"] / base["samples_s"] for found, base in zip(results, sync, strict=True))
        assert gain is not None
        gains[name] = round(gain.median, 3)
        table.add_row(
            name,
            show(Spread.of(found["samples_s"] for found in results), 0),
            show(gain),
            f"{gain.median / ideal:.0%}",
            *(f"{statistics.median(found[key] for found in results):.0%}" for key in ("idle_trainer", "idle_rollout")),
            f"{1e3 * statistics.median(found['exposed_sync_s'] for found in results):.2f}",
            show(Spread.of(found["reward_last"] for found in results), 3),
            show(Spread.of(reward_at(found, at_s) for found in results), 3),
        )
    return table, {"generation_s": generation_s, "training_s": training_s, "ideal": ideal, "gains": gains, "runs": runs}


def measure_real(repeats: int, steps: int, warm: Path) -> tuple[Table, dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKFLOWS}
    for _ in range(repeats):
        for name, results in runs.items():
            # A step whose rows fit into one micro-batch has nothing to overlap.
            portion = ("--micro-batch-tokens", "1024") if name == "streaming" else ()
            results.append(facts(run(name, "--steps", str(steps), "--warm", str(warm), *portion)))
    return overlap_table("real engines", runs)


def measure_simulated(repeats: int) -> tuple[list[Table], dict[str, Any]]:
    tables, result = [], {}
    for title, speed in BALANCES.items():
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKFLOWS}
        for _ in range(repeats):
            for name, results in runs.items():
                speed_s = str(BALANCED_TOKENS_S * speed)
                found = run(name, "--engines", "simulated", "--steps", "16", "--train-tokens-s", speed_s)
                results.append(facts(found))
        table, result[title] = overlap_table(f"simulated engines, training {title} as generation", runs)
        tables.append(table)
    return tables, result


def measure_sweep(steps: int, warm: Path, seeds: int) -> tuple[Table, dict[str, Any]]:
    table = Table(
        "max. staleness", *LOSSES, title=f"accuracy of samples after {steps} steps, and mean staleness of rows"
    )
    found: dict[str, dict[str, list[dict[str, Any]]]] = {str(bound): {} for bound in STALENESS}
    for bound, of_bound in found.items():
        for loss in LOSSES:
            of_bound[loss] = []
            for seed in range(seeds):
                arguments = ("--max-staleness", bound, "--loss", loss, "--seed", str(seed))
                of_bound[loss].append(facts(run("async", "--steps", str(steps), "--warm", str(warm), *arguments)))
        table.add_row(
            bound,
            *(
                f"{show(Spread.of(one['accuracy']['sampled'] for one in results), 3)} "
                f"({statistics.fmean(one['staleness'] for one in results):.1f})"
                for results in of_bound.values()
            ),
        )
    return table, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["real", "simulated", "sweep"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of a real run")
    parser.add_argument("--seeds", type=int, default=2, help="of the sweep")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    console, result = Console(width=160), {}
    for part in arguments.parts:
        watch = Watch.begin()
        with tempfile.TemporaryDirectory() as folder:
            warm = Path(folder) / "warm.pt"
            tables: list[Table] = []
            if part == "real":
                table, found = measure_real(arguments.repeats, arguments.steps, warm)
                tables = [table]
            elif part == "simulated":
                tables, found = measure_simulated(arguments.repeats)
            elif part == "sweep":
                table, found = measure_sweep(arguments.steps, warm, arguments.seeds)
                tables = [table]
            else:
                parser.error(f"{part!r} is none of real, simulated, sweep")
        contention = watch.end()
        for table in tables:
            console.print(table)
        print(f"contention: {contention}", flush=True)
        result[part] = {"contention": str(contention), "found": found}
        save("workflows", arguments.out, result)


if __name__ == "__main__":
    main()
