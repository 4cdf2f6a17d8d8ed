"""One SIGKILL, and how long until the job is where it was: flash_ddp beside its peers.

The same job (10.5 million parameters, gloo, 3 and 4 ranks) under each system. When the victim has committed step 15, it
is killed in the next one. Measured from the kill, on one clock:

===================== =============================================================================================
first commit          any rank commits a step again, be it one that had been committed before
full membership       all ranks, the replacement too, have committed the same step
caught up             the step in flight at the kill is committed by all who take part (the next one, if the victim had
                      already done its part of it)
redone                committed steps that a rank had to run again
===================== =============================================================================================

Rounds are interleaved: every system once, then every system again. A run beside other load is rejected and
done again (contention.py).

    python benchmarks/recovery.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent / "jobs"))

import report
from contention import Contention, Watch
from launchers import Flash, FlashCold, InProcess, JobSize, Launcher, StockDDP, Torchft, TorchftStock, Torchrun
from report import Spread, show
from step_log import Event, read_events

MAIN = (Flash, Torchrun, Torchft)
SIDE = (FlashCold, TorchftStock, InProcess)
KILL_AFTER_STEP = 15
NUM_STEPS = 20
NUM_TORCHFT_STEPS = 40
"""torchft's survivors go on while the replacement starts; the job must last until it is back."""
KILL_AT = (0.2, 0.35, 0.5)
"""Moment of the kill within the victim's step, one after the other: forward and backward."""
DEADLINE_S = 150.0
MAX_ATTEMPTS = 3
_POLL_S = 0.005
BAR_TORCHRUN, BAR_TORCHFT = 20.0, 8.0


@dataclass(slots=True)
class Run:
    """One job, killed or not.

    Attributes:
        system: key of the launcher.
        num_ranks: of the job.
        victim: rank that was killed; -1 in a run without a kill.
        step_ms: median of the victim's steps before the kill.
        first_commit_s: see the top of the file; ``None`` where it did not happen.
        full_s: see there.
        caught_up_s: see there.
        num_redone: see there.
        num_short: steps committed by fewer ranks than the job has.
        num_crashed: survivors that ended with an error.
        is_finished: whether the job came to its end, with how many ranks so ever.
        weights: digests of the final parameters.
        problem: last line that a job which did not get to the kill, or to its end, has printed.
        stages_ms: flash_ddp's own account of the recovery.
        contention: what else ran on the machine.
        is_rejected: whether that was too much.
    """

    system: str
    num_ranks: int
    victim: int = -1
    step_ms: float = 0.0
    first_commit_s: float | None = None
    full_s: float | None = None
    caught_up_s: float | None = None
    num_redone: int = 0
    num_short: int = 0
    num_crashed: int = 0
    is_finished: bool = False
    weights: list[str] = field(default_factory=list)
    stages_ms: dict[str, float] = field(default_factory=dict)
    contention: Contention | None = None
    is_rejected: bool = False
    problem: str = ""


# --------------------------------------------------------------------------- running
def run_job(
    kind: type[Launcher], num_ranks: int, victim: int, kill_at: float, *, to_end: bool, keep: Path | None
) -> Run:
    """Run one job; ``victim`` -1 kills nobody. Unless ``to_end``, stop when all has been measured."""
    run = Run(kind.name, num_ranks, victim)
    folder = Path(tempfile.mkdtemp(prefix=f"recovery-{kind.name}-"))
    num_steps = NUM_TORCHFT_STEPS if issubclass(kind, Torchft) else NUM_STEPS
    job = kind(JobSize(folder, num_ranks, num_steps))
    watch = Watch.begin()
    job.start()
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        killed = None if victim < 0 else _kill_in_step(job, victim, kill_at, deadline_s)
        if killed is not None:
            run.step_ms = _step_ms(read_events(folder), victim)
            if not job.is_replaced_by_system:
                job.replace(victim)
        while job.is_running() and time.monotonic() < deadline_s:
            time.sleep(0.1)
            if killed is not None and not to_end:
                measure(run, read_events(folder), killed)
                if run.full_s is not None and run.caught_up_s is not None:
                    break
        run.is_finished = not job.is_running() and any(event.kind == "end" for event in read_events(folder))
    finally:
        job.stop()
    run.contention = watch.end()
    events = read_events(folder)
    run.weights = sorted({event.weights for event in events if event.kind == "end"})
    run.num_crashed = sum(p.returncode not in (0, -signal.SIGKILL, -signal.SIGTERM) for p in job.processes)
    if killed is not None:
        measure(run, events, killed)
    if killed is None and not run.weights:
        run.problem = (job.output().strip().splitlines() or ["no output"])[-1]
    records = folder / "logs" / "recovery.jsonl"
    if records.exists():
        run.stages_ms = json.loads(records.read_text().splitlines()[0])["timings_ms"]
    if keep is not None:
        shutil.copytree(folder, keep / folder.name)
    shutil.rmtree(folder)
    return run


def _kill_in_step(job: Launcher, victim: int, kill_at: float, deadline_s: float) -> Event | None:
    """Kill when the victim has committed its step; return the victim's last event, with the time of the kill."""
    folder = job.size.folder
    while time.monotonic() < deadline_s and job.is_running():
        steps = _steps_of(read_events(folder), victim)
        if steps and steps[-1].step >= KILL_AFTER_STEP:
            due_s = steps[-1].time_ns / 1e9 + kill_at * _step_ms(steps, victim) / 1e3
            time.sleep(max(0.0, due_s - time.monotonic()))
            os.kill(steps[-1].pid, signal.SIGKILL)
            killed_ns = time.monotonic_ns()
            last = _steps_of(read_events(folder), victim)[-1]
            return Event("kill", killed_ns, victim, last.pid, last.step, last.num_members, "")
        time.sleep(_POLL_S)
    return None


def _steps_of(events: list[Event], rank: int) -> list[Event]:
    return [event for event in events if event.rank == rank and event.kind == "step"]


def _step_ms(events: list[Event], rank: int) -> float:
    times_ns = [event.time_ns for event in _steps_of(events, rank)][-10:]
    return statistics.median(b - a for a, b in itertools.pairwise(times_ns)) / 1e6


# --------------------------------------------------------------------------- measuring
def measure(run: Run, events: list[Event], killed: Event) -> None:
    """Fill in what the events tell. ``killed`` holds the victim's last committed step and the time of the kill."""
    steps = [event for event in events if event.kind == "step"]
    before = [event for event in steps if event.time_ns <= killed.time_ns]
    committed, old_pids = {(event.rank, event.step) for event in before}, {event.pid for event in before}
    after = [
        event
        for event in steps[len(before) :]
        if event.step > killed.step  # or else a survivor ends, a little late, the victim's last step
        or not (event.pid in old_pids and (event.rank, event.step) not in committed)
    ]
    in_flight = killed.step + 1
    ending = [event for event in after if event.step == in_flight and event.num_members == run.num_ranks]
    if ending and killed.rank not in {event.rank for event in ending}:
        # The victim had done its part of that step: the survivors end it, and wait in the next one.
        after = [event for event in after if event not in ending]
        in_flight += 1

    def seconds(event: Event) -> float:
        return round((event.time_ns - killed.time_ns) / 1e9, 4)

    run.first_commit_s = seconds(after[0]) if after else None
    caught_up = [event for event in after if event.step == in_flight]
    run.caught_up_s = max(map(seconds, caught_up), default=None)
    run.full_s = None
    for step in sorted({event.step for event in after}):
        together = [event for event in after if event.step == step and event.num_members == run.num_ranks]
        if {event.rank for event in together} == set(range(run.num_ranks)):
            run.full_s = max(map(seconds, together))
            break
    run.num_redone = len({event.step for event in after if (event.rank, event.step) in committed})
    run.num_short = len({event.step for event in after if event.num_members < run.num_ranks})


# --------------------------------------------------------------------------- all runs
def run_all(arguments: argparse.Namespace) -> tuple[list[Run], dict[str, str]]:
    """Return all runs, and why systems were left out."""
    problems = {kind.name: problem for kind in (*MAIN, *SIDE) if (problem := kind.problem()) is not None}
    wanted = {name for name in arguments.systems if name not in problems}
    runs: list[Run] = []

    def attempt(kind: type[Launcher], num_ranks: int, round_index: int, *, is_killed: bool = True) -> None:
        for _ in range(MAX_ATTEMPTS):
            victim = (1 + round_index) % num_ranks if is_killed else -1
            kill_at = KILL_AT[round_index % len(KILL_AT)]
            to_end = not issubclass(kind, Torchft) or round_index == 0
            run = run_job(kind, num_ranks, victim, kill_at, to_end=to_end, keep=arguments.folders)
            run.is_rejected = run.contention is not None and run.contention.is_too_much and not arguments.keep_all
            runs.append(run)
            print(_line(run), file=sys.stderr, flush=True)
            if not run.is_rejected:
                return

    for num_ranks in arguments.ranks:
        attempt(StockDDP, num_ranks, 0, is_killed=False)
        if Torchft.name in wanted:
            attempt(Torchft, num_ranks, 0, is_killed=False)
        for round_index in range(max(arguments.repeats, arguments.side_repeats)):
            for kinds, repeats in ((MAIN, arguments.repeats), (SIDE, arguments.side_repeats)):
                for kind in kinds:
                    if kind.name in wanted and round_index < repeats:
                        attempt(kind, num_ranks, round_index)
    return runs, problems


def _line(run: Run) -> str:
    if run.victim < 0:
        return f"{run.system} × {run.num_ranks}, no kill: {run.weights} {run.problem}"
    return (
        f"{run.system} × {run.num_ranks}: first commit {run.first_commit_s} s, full {run.full_s} s, "
        f"caught up {run.caught_up_s} s, {run.num_redone} redone, step {run.step_ms:.0f} ms, "
        f"{run.contention}{', rejected' if run.is_rejected else ''} {run.problem}"
    )


# --------------------------------------------------------------------------- results
def summarize(runs: list[Run]) -> list[dict[str, Any]]:
    """One row per number of ranks and system, of the runs that were not rejected."""
    rows: list[dict[str, Any]] = []
    for num_ranks in sorted({run.num_ranks for run in runs}):
        of_size = [run for run in runs if run.num_ranks == num_ranks and not run.is_rejected]
        unfailed = {run.system: run.weights for run in of_size if run.victim < 0}
        for kind in (*MAIN, *SIDE):
            mine = [run for run in of_size if run.system == kind.name and run.victim >= 0]
            if not mine:
                continue
            reference = unfailed.get(Torchft.name if issubclass(kind, Torchft) else StockDDP.name, [])
            ended = [run for run in mine if run.weights]
            rows.append(
                {
                    "ranks": num_ranks,
                    "system": kind.name,
                    "runs": len(mine),
                    "step_ms": _spread(run.step_ms for run in mine),
                    "first_commit_s": _spread(run.first_commit_s for run in mine),
                    "full_s": _spread(run.full_s for run in mine),
                    "caught_up_s": _spread(run.caught_up_s for run in mine),
                    "redone": _spread(run.num_redone for run in mine),
                    "short": _spread(run.num_short for run in mine),
                    "recovered": sum(run.caught_up_s is not None for run in mine),
                    "crashed_survivors": _spread(run.num_crashed for run in mine),
                    "ended": len(ended),
                    "exact": sum(run.weights == reference and len(reference) == 1 for run in ended),
                }
            )
    return rows


def _spread(values: Any) -> dict[str, float] | None:
    spread = Spread.of(values)
    return None if spread is None else asdict(spread)


def _of(row: dict[str, Any], key: str) -> Spread | None:
    return None if row[key] is None else Spread(**row[key])


def print_table(rows: list[dict[str, Any]], problems: dict[str, str]) -> None:
    titles = {kind.name: kind.title for kind in (*MAIN, *SIDE)}
    table = Table(title="from the kill to …, seconds: median [least, most]")
    for column in (
        "ranks",
        "system",
        "runs",
        "step ms",
        "first commit",
        "full membership",
        "caught up",
        "redone",
        "exact",
    ):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            titles[row["system"]],
            str(row["runs"]),
            show(_of(row, "step_ms"), 0),
            show(_of(row, "first_commit_s"), missing="never"),
            show(_of(row, "full_s"), missing="never"),
            show(_of(row, "caught_up_s"), missing="never"),
            show(_of(row, "redone"), 0),
            f"{row['exact']} of {row['ended']}",
        )
    console = Console(width=140)
    console.print(table)
    for name, problem in problems.items():
        console.print(f"{titles[name]}: not measured, {problem}")


def print_bar(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare with the bar; return the ratios of medians."""
    ratios: dict[str, Any] = {}
    for num_ranks in sorted({row["ranks"] for row in rows}):
        mine = {row["system"]: row for row in rows if row["ranks"] == num_ranks}
        flash = mine.get(Flash.name)
        if flash is None or flash["caught_up_s"] is None:
            continue
        caught_up = flash["caught_up_s"]["median"]
        found: dict[str, Any] = {"lost_steps": flash["redone"]["high"]}
        for system, key, bar in ((Torchrun.name, "caught_up_s", BAR_TORCHRUN), (Torchft.name, "full_s", BAR_TORCHFT)):
            if system in mine and mine[system][key] is not None:
                ratio = mine[system][key]["median"] / caught_up
                found[system] = round(ratio, 2)
                verdict = "met" if ratio >= bar else "NOT met"
                print(f"{num_ranks} ranks: {ratio:.1f}× sooner than {system} (bar {bar:g}×: {verdict})")
        print(f"{num_ranks} ranks: committed steps lost: {found['lost_steps']:.0f} (bar 0)")
        ratios[str(num_ranks)] = found
    return ratios


def print_stages(runs: list[Run]) -> None:
    """Where flash_ddp's milliseconds go, as its controller and ranks tell."""
    stages: dict[str, list[float]] = {}
    for run in runs:
        if run.system == Flash.name and run.stages_ms and not run.is_rejected:
            for stage, duration_ms in run.stages_ms.items():
                stages.setdefault(stage, []).append(duration_ms)
    if stages:
        told = " · ".join(f"{stage} {show(Spread.of(values), 0)}" for stage, values in stages.items())
        print(f"flash_ddp, standby, slowest rank of each stage, ms: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description="From a SIGKILL to the step that was in flight, beside the peers.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of flash_ddp, torchrun and torchft")
    parser.add_argument("--side-repeats", type=int, default=1, help="rounds of the other systems")
    names = [kind.name for kind in (*MAIN, *SIDE)]
    parser.add_argument("--systems", nargs="+", choices=names, default=names)
    parser.add_argument("--keep-all", action="store_true", help="reject no run, whatever else the machine did")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--folders", type=Path, default=None, help="copy the folders of all jobs here")
    arguments = parser.parse_args()
    runs, problems = run_all(arguments)
    rows = summarize(runs)
    print_table(rows, problems)
    ratios = print_bar(rows)
    print_stages(runs)
    result = {"rows": rows, "ratios": ratios, "not_measured": problems, "runs": [asdict(run) for run in runs]}
    report.save("recovery", arguments.json, result)


if __name__ == "__main__":
    main()
