"""What flash_ddp costs while nothing fails: its steps beside those of stock ddp.

The same Lightning job, 2 ranks, at three sizes with steps of about 5, 50 and 500 ms. Runs alternate (A B B A A B …), so
that a drift of the machine meets both. A run's figure is the median time between two ends of ``on_train_batch_end`` on
rank 0; the result is the ratio within each pair. Neighbours of the same kind, which stand between the pairs, show what
cannot be resolved: their ratio should be 1.

flash_ddp lets the allocator keep the memory that a step frees, and stock ddp does not: that is part of the result. With
``--same-allocator`` both do, and what is left is the work of flash_ddp.

A further run of each size times the parts of flash_ddp's own work, in microseconds a step.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent / "jobs"))

import report
from contention import Contention, Watch
from launchers import Flash, JobSize, StockDDP
from report import Spread, show
from step_log import read_events

from lightning_flashrl.supervisor.allocator import KEPT_BYTES

NUM_RANKS = 2
NUM_STEPS = {"5ms": 800, "50ms": 120, "500ms": 18}
WARM_UP_STEPS = {"5ms": 50, "50ms": 10, "500ms": 3}
"""DDP rebuilds its buckets in the second step; caches and clocks settle in the first."""
BARS = {"5ms": None, "50ms": 0.01, "500ms": 0.0}
MAX_ATTEMPTS = 3
DEADLINE_S = 120.0


@dataclass(slots=True)
class Run:
    """One job.

    Attributes:
        system: ``flash_standby`` or ``ddp``.
        shape: of the model.
        step_ms: median step on rank 0.
        mean_ms: mean step on rank 0, which also holds what happens only now and then.
        contention: what else ran on the machine.
        pair: number of the pair.
        is_rejected: whether that was too much.
    """

    system: str
    shape: str
    step_ms: float
    mean_ms: float
    contention: Contention
    pair: int = 0
    is_rejected: bool = False


def run_job(kind: type[Flash | StockDDP], shape: str, *, is_profiled: bool = False) -> tuple[Run, dict[str, float]]:
    """Run one job; return its figures, and the parts' microseconds if it was profiled."""
    options = ("--shape", shape, *(["--profile"] if is_profiled else []))
    configured = type(kind.__name__, (kind,), {"job_options": options})
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    job = configured(JobSize(folder, NUM_RANKS, NUM_STEPS[shape]))
    watch = Watch.begin()
    job.start()
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while job.is_running() and time.monotonic() < deadline_s:
            time.sleep(0.05)
    finally:
        job.stop()
    others = watch.end()
    events = [event for event in read_events(folder) if event.kind == "step" and event.rank == 0]
    if len(events) < NUM_STEPS[shape]:
        raise SystemExit(f"the job of {kind.title} did not end:\n{job.output()}")
    times_ms = [(b.time_ns - a.time_ns) / 1e6 for a, b in itertools.pairwise(events[WARM_UP_STEPS[shape] :])]
    parts = json.loads((folder / "profile0.json").read_text()) if is_profiled else {}
    shutil.rmtree(folder)
    return Run(kind.name, shape, statistics.median(times_ms), statistics.fmean(times_ms), others), parts


def run_pairs(shape: str, num_pairs: int, *, keep_all: bool) -> list[Run]:
    """Alternate A B B A …; a rejected run is done again in its place."""
    runs: list[Run] = []
    for index in range(num_pairs):
        order: list[type[Flash | StockDDP]] = [Flash, StockDDP]
        for kind in order if index % 2 == 0 else reversed(order):
            for _ in range(MAX_ATTEMPTS):
                run, _ = run_job(kind, shape)
                run.pair = index
                run.is_rejected = run.contention.is_too_much and not keep_all
                print(_line(run), file=sys.stderr, flush=True)
                runs.append(run)
                if not run.is_rejected:
                    break
    return runs


def _line(run: Run) -> str:
    rejected = ", rejected" if run.is_rejected else ""
    return f"{run.system} {run.shape}: {run.step_ms:.2f} ms, {run.contention}{rejected}"


def summarize(shape: str, runs: list[Run]) -> dict[str, Any]:
    """Ratios of neighbours: different kinds are the result, the same kind is the resolution."""
    kept = [run for run in runs if not run.is_rejected]
    different, same = [], []
    for first, second in itertools.pairwise(kept):
        if first.pair == second.pair:
            flash, ddp = (first, second) if first.system == Flash.name else (second, first)
            different.append(flash.step_ms / ddp.step_ms)
        elif first.system == second.system:
            same.append(max(first.step_ms, second.step_ms) / min(first.step_ms, second.step_ms))
    of = {name: Spread.of(run.step_ms for run in kept if run.system == name) for name in (Flash.name, StockDDP.name)}
    return {
        "shape": shape,
        "runs": len(kept),
        "rejected": len(runs) - len(kept),
        "ddp_ms": _plain(of[StockDDP.name]),
        "flash_ms": _plain(of[Flash.name]),
        "ratio": _plain(Spread.of(different)),
        "same_kind_ratio": _plain(Spread.of(same)),
    }


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def _of(row: dict[str, Any], key: str) -> Spread | None:
    return None if row[key] is None else Spread(**row[key])


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="step time without faults, 2 ranks: median [least, most]")
    for column in ("size", "runs", "ddp ms", "flash_ddp ms", "flash_ddp / ddp", "same kind again", "bar"):
        table.add_column(column, justify="right")
    for row in rows:
        bar, ratio, same = BARS[row["shape"]], _of(row, "ratio"), _of(row, "same_kind_ratio")
        verdict = "–"
        if bar is not None and ratio is not None:
            allowed = 1 + bar if bar else (1.0 if same is None else same.high)
            verdict = f"≤ {allowed:.3f}: {'met' if ratio.median <= allowed else 'NOT met'}"
        ddp, flash = show(_of(row, "ddp_ms")), show(_of(row, "flash_ms"))
        table.add_row(row["shape"], str(row["runs"]), ddp, flash, show(ratio, 3), show(same, 3), verdict)
    Console(width=140).print(table)


def print_parts(parts: dict[str, dict[str, float]]) -> None:
    table = Table(title="flash_ddp's own work, microseconds a step on rank 0 (median); indented parts are contained")
    table.add_column("part")
    for shape in parts:
        table.add_column(shape, justify="right")
    for part in next(iter(parts.values())):
        name = "  " * part.count(":") + part.rpartition(": ")[2]
        table.add_row(name, *[f"{parts[shape][part]:.0f}" for shape in parts])
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of flash_ddp beside those of stock ddp.")
    parser.add_argument("--shapes", nargs="+", choices=list(NUM_STEPS), default=list(NUM_STEPS))
    parser.add_argument("--pairs", type=int, default=4, help="of one run each")
    parser.add_argument("--keep-all", action="store_true", help="reject no run, whatever else the machine did")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--same-allocator", action="store_true", help="freed memory stays with both")
    arguments = parser.parse_args()
    if arguments.same_allocator:
        os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    rows, runs, parts = [], [], {}
    for shape in arguments.shapes:
        if arguments.pairs:
            mine = run_pairs(shape, arguments.pairs, keep_all=arguments.keep_all)
            runs += mine
            rows.append(summarize(shape, mine))
        parts[shape] = run_job(Flash, shape, is_profiled=True)[1]
    if rows:
        print_table(rows)
    print_parts(parts)
    result = {"rows": rows, "parts_us": parts, "runs": [asdict(run) for run in runs]}
    report.save("overhead", arguments.json, result)


if __name__ == "__main__":
    main()
