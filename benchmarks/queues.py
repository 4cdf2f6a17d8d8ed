"""The TransferQueue beside the published transferqueue package: the same rows, from the same loops, in one run.

python benchmarks/queues.py [--repeats N] [--quick]

Each system runs in its own environment, one after the other, several times; see jobs/queue_job.py for what is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from contention import calibrate
from peers import TRANSFER_QUEUE
from report import save
from rich.console import Console
from rich.table import Table

JOB = Path(__file__).resolve().parent / "jobs" / "queue_job.py"
_TIMEOUT_S = 900


def run(system: str, python: str, quick: bool) -> dict[str, Any]:
    """Measure one system once."""
    command = [python, str(JOB), system, *(["--quick"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def middle(results: list[dict[str, Any]], *path: str) -> float | None:
    """Median over the runs of one figure."""
    values = []
    for result in results:
        value: Any = result
        for key in path:
            value = None if value is None else value.get(key)
        if value is not None:
            values.append(value)
    return statistics.median(values) if values else None


ROWS: list[tuple[str, tuple[str, ...], str]] = [
    ("put, 1 row a call, rows/s", ("bulk", "1", "put_rows_s"), "rate"),
    ("put, 64 rows a call, rows/s", ("bulk", "64", "put_rows_s"), "rate"),
    ("put, 512 rows a call, rows/s", ("bulk", "512", "put_rows_s"), "rate"),
    ("get, 1 row a call, rows/s", ("bulk", "1", "get_rows_s"), "rate"),
    ("get, 64 rows a call, rows/s", ("bulk", "64", "get_rows_s"), "rate"),
    ("get, 512 rows a call, rows/s", ("bulk", "512", "get_rows_s"), "rate"),
    *(
        (f"micro-batch of 32 of {count:,}, {name} ms", ("resident", str(count), f"{name}_ms"), "time")
        for count in (512, 4096, 65_536, 1_000_000)
        for name in ("p50", "p99")
    ),
    ("1 producer, 1 consumer, rows/s", ("stream_rows_s", "1"), "rate"),
    ("2 producers, 2 consumers, rows/s", ("stream_rows_s", "2"), "rate"),
    ("put of 8, nobody waiting, p99 ms", ("producer", "0", "p99_ms"), "time"),
    ("put of 8, 4 consumers waiting, p99 ms", ("producer", "4", "p99_ms"), "time"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    systems = {"flash": sys.executable, "flash-journal": sys.executable, "flash-socket": sys.executable}
    problem = TRANSFER_QUEUE.problem()
    if problem is None:
        systems["transferqueue"] = str(TRANSFER_QUEUE.python)
    else:
        print(f"transferqueue is left out: {problem}", file=sys.stderr)
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    calibrations = [calibrate()]
    for _ in range(options.repeats):
        for system, python in systems.items():
            results[system].append(run(system, python, options.quick))
            calibrations.append(calibrate())
    console = Console(width=120)
    table = Table(title="Rows: prompt 256 and response 1,024 int64, log-probs float32 (14 kB)")
    table.add_column("what")
    for system in systems:
        table.add_column(system, justify="right")
    table.add_column("ratio", justify="right")
    for title, path, kind in ROWS:
        figures = {system: middle(results[system], *path) for system in systems}
        shown = [
            "–" if figure is None else f"{figure:,.0f}" if kind == "rate" else f"{figure:.2f}"
            for figure in figures.values()
        ]
        mine, theirs = figures["flash"], figures.get("transferqueue")
        ratio = "–" if not mine or not theirs else f"{mine / theirs if kind == 'rate' else theirs / mine:.1f}x"
        table.add_row(title, *shown, ratio)
    console.print(table)
    limits = {name: middle(results["flash"], name) for name in ("memcpy_rows_s", "socket_rows_s")}
    console.print(
        f"limits: a bare copy in memory {limits['memcpy_rows_s']:,.0f} rows/s, a bare local socket "
        f"{limits['socket_rows_s']:,.0f} rows/s; wall over CPU time of a fixed job {max(calibrations):.2f} at worst"
    )
    save("queues", options.output, {"runs": results, "calibrations": calibrations})


if __name__ == "__main__":
    main()
