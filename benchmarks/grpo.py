"""Samples a second of GRPO beside TRL's GRPOTrainer: the same model, task and batch on this machine's CPU.

python benchmarks/grpo.py [--repeats N] [--steps N]

Each system runs in its own environment, one after the other, several times; TRL with one thread and with one for each
core, of which the better counts. See jobs/sorting.py for the sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from contention import Watch
from peers import TRL
from report import Spread, save, show
from rich.console import Console
from rich.table import Table

JOBS = Path(__file__).resolve().parent / "jobs"
sys.path.insert(0, str(JOBS))
from sorting import SIZES  # noqa: E402

_TIMEOUT_S = 900


def run(python: str, script: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """One run; what it prints last."""
    done = subprocess.run(
        [python, str(JOBS / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    problem = TRL.problem()
    if problem is not None:
        raise SystemExit(f"TRL {problem}")
    steps, trl = str(arguments.steps), str(TRL.python)
    cores = os.cpu_count() or 1
    systems: dict[str, Any] = {
        "async, staleness 4": lambda size: run(sys.executable, "grpo_flash.py", size, steps, "async", "4"),
        "async, staleness 1": lambda size: run(sys.executable, "grpo_flash.py", size, steps, "async", "1"),
        "sync": lambda size: run(sys.executable, "grpo_flash.py", size, steps, "sync", "0"),
        "TRL, 1 thread": lambda size: run(trl, "grpo_trl.py", size, steps, "1"),
        f"TRL, {cores} threads": lambda size: run(trl, "grpo_trl.py", size, steps, str(cores), threads=cores),
    }
    watch = Watch.begin()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        size: {name: [] for name in systems} for size in arguments.sizes
    }
    for _ in range(arguments.repeats):
        for size, of_size in found.items():
            for name, results in of_size.items():
                results.append(systems[name](size))
    contention = watch.end()
    table = Table("size", "system", "samples/s", "tokens/s", "tokens a completion", "against TRL")
    ratios: dict[str, float] = {}
    for size, of_size in found.items():
        rates = {name: Spread.of(result["samples_s"] for result in results) for name, results in of_size.items()}
        tokens = {name: Spread.of(result["tokens_s"] for result in results) for name, results in of_size.items()}
        best = max(rate.median for name, rate in tokens.items() if name.startswith("TRL") and rate is not None)
        for name, results in of_size.items():
            rate, length = tokens[name], Spread.of(result["length"] for result in results)
            assert rate is not None
            ratio = rate.median / best
            if not name.startswith("TRL"):
                ratios[f"{size}: {name}"] = round(ratio, 2)
            table.add_row(size, name, show(rates[name], 0), show(rate, 0), show(length, 1), f"{ratio:.1f}x")
    Console().print(table)
    print(f"contention: {contention}")
    facts = {"ratios_of_tokens_s": ratios, "runs": found, "contention": str(contention)}
    save("grpo", arguments.out, {"steps": arguments.steps, **facts})


if __name__ == "__main__":
    main()
