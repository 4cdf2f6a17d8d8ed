"""``make demo``: a training that is killed and hung on the way ends in the same bits as one that is left alone.

Trains a small GPT on the standard library's sources with three ranks (``demo_train.py``, an ordinary Lightning
program). On the way it kills a rank with SIGKILL, freezes another with SIGSTOP and kills rank 0, by process number,
from outside. Then it trains the same again, undisturbed, and compares weights, optimizer state and random states.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_flashrl import clock
from lightning_flashrl.cli.demo_job import Job, describe_failure
from lightning_flashrl.cli.demo_view import View, draw_stages
from lightning_flashrl.report import Recovery, Step, draw_timeline

NUM_RANKS = 3
DEFAULT_SECONDS = 120.0
STEPS_PER_SECOND = 3.4
"""Of the whole demo (two trainings, their starts and three recoveries), on two cores."""
MIN_STEPS = 24
_LOOK_S = 0.1
_FIND_RANKS_S = 0.5
_STALLED_S = 120.0
"""Without a step for so long, something is wrong, and the logs are shown."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A signal to send on the way.

    Attributes:
        rank: whom.
        number: which signal.
        after: fraction of the steps that are done before.
    """

    rank: int
    number: signal.Signals
    after: float


STRIKES = (
    Strike(1, signal.SIGKILL, 0.22),
    Strike(2, signal.SIGSTOP, 0.48),
    Strike(0, signal.SIGKILL, 0.74),
)


@dataclass(frozen=True, slots=True)
class Struck:
    """A signal that was sent.

    Attributes:
        strike: what was planned.
        pid: to which process.
        wall_s: when, seconds since the Unix epoch.
    """

    strike: Strike
    pid: int
    wall_s: float


@dataclass(slots=True)
class Outcome:
    """A finished training.

    Attributes:
        ends: what each rank ended with, by rank.
        steps: all steps.
        recoveries: all recoveries.
        struck: signals that were sent.
        duration_s: from the start of ``flashrun`` to its end.
    """

    ends: dict[int, dict[str, Any]]
    steps: list[Step]
    recoveries: list[Recovery]
    struck: list[Struck] = field(default_factory=list)
    duration_s: float = 0.0


class DemoError(Exception):
    """A training ended in another way than the demo expects; the text says how."""


# --------------------------------------------------------------------------- one training
class Watch:
    """Follows one job: strikes it as planned, keeps the view up to date.

    Args:
        job: started by :meth:`run`.
        view: shows it.
        strikes: signals to send, in the order of their steps.
        expected: steps of an earlier run of the same training; losses are compared as they come.
    """

    def __init__(self, job: Job, view: View, strikes: Sequence[Strike] = (), expected: Sequence[Step] = ()) -> None:
        self._job = job
        self._view = view
        self._strikes = list(strikes)
        self._struck: list[Struck] = []
        self._expected = {step.step: step.loss for step in expected}
        self._next_look_s = 0.0
        self._num_steps = 0
        self._advanced_s = 0.0

    @property
    def _at_s(self) -> float:
        return clock.now_s() - self._job.began_s

    def run(self) -> Outcome:
        """Run the job to its end.

        Raises:
            DemoError: it failed.
        """
        job = self._job
        job.start()
        self._advanced_s = clock.now_s()
        try:
            while job.returncode is None:
                clock.sleep(_LOOK_S)
                self._look()
            self._look()
        finally:
            job.stop()
        if job.returncode != 0:
            raise DemoError(f"flashrun ended with status {job.returncode}\n{describe_failure(job)}")
        ends = {rank: json.loads((job.folder / f"end_rank{rank}.json").read_text()) for rank in range(job.num_ranks)}
        return Outcome(ends, job.read_steps(), job.read_recoveries(), self._struck, self._at_s)

    def _look(self) -> None:
        events = self._job.poll()
        steps = self._job.read_steps()
        self._view.recoveries = self._job.read_recoveries()
        for event in events:
            self._view.add_event(self._at_s, event, "green" if " back after " in event else "yellow")
        if clock.now_s() >= self._next_look_s or events:
            self._next_look_s = clock.now_s() + _FIND_RANKS_S
            self._look_at_ranks(has_steps=bool(steps))
        if len(steps) > self._num_steps:
            self._num_steps, self._advanced_s = len(steps), clock.now_s()
        elif clock.now_s() - self._advanced_s > _STALLED_S:
            raise DemoError(f"no step was done for {_STALLED_S:g} s\n{describe_failure(self._job)}")
        self._compare(steps)
        self._strike(steps)
        self._view.update(self._at_s, steps)

    def _look_at_ranks(self, *, has_steps: bool) -> None:
        is_back = [rank for recovery in self._view.recoveries if recovery.is_complete for rank in recovery.lost]
        for rank, process in self._job.find_ranks().items():
            line = self._view.ranks[rank]
            if line.pid and process.pid != line.pid:
                line.set("a new process takes the rank over", "yellow")
            line.pid, line.incarnation = process.pid, process.incarnation
            if has_steps and is_back.count(rank) == process.incarnation and not self._is_struck(process.pid):
                line.set("trains", "green")

    def _is_struck(self, pid: int) -> bool:
        return any(struck.pid == pid for struck in self._struck)

    def _compare(self, steps: Sequence[Step]) -> None:
        if self._expected:
            num_equal = sum(self._expected.get(step.step) == step.loss for step in steps)
            self._view.note = f"{num_equal} losses equal to the bit, {len(steps) - num_equal} not"

    def _strike(self, steps: Sequence[Step]) -> None:
        if not self._strikes or not steps:
            return
        strike = self._strikes[0]
        num_back = sum(recovery.is_complete for recovery in self._view.recoveries)
        if steps[-1].step < strike.after * self._job.steps or num_back < len(self._struck):
            return
        target = self._job.strike(strike.rank, strike.number)
        if target is None:
            return
        del self._strikes[0]
        self._struck.append(Struck(strike, target.pid, clock.wall_s()))
        name = strike.number.name
        self._view.ranks[strike.rank].set("frozen" if strike.number is signal.SIGSTOP else "dead", "bold red")
        self._view.add_event(
            self._at_s, f"this demo sends {name} to rank {strike.rank}, process {target.pid}", "bold red"
        )


# --------------------------------------------------------------------------- the two ends
_COMPARED = (
    ("weights", "weights"),
    ("optimizer", "optimizer state"),
    ("rng", "random states"),
)


def find_differences(first: Outcome, second: Outcome) -> list[str]:
    """What is not the same at the end of both trainings; empty when nothing differs."""
    found = [
        f"rank {rank} {key}: {value} with faults, {second.ends[rank][key]} without"
        for rank, end in sorted(first.ends.items())
        for key, value in end.items()
        if value != second.ends[rank][key]
    ]
    losses = {step.step: step.loss for step in second.steps}
    found += [
        f"loss of step {step.step}: {step.loss} with faults, {losses.get(step.step)} without"
        for step in first.steps
        if losses.get(step.step) != step.loss
    ]
    return found


def draw_ends(first: Outcome, second: Outcome) -> Table:
    """The hashes of both ends side by side."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("", f"with {len(first.struck)} faults", "left alone", ""):
        table.add_column(heading)

    def add(name: str, left: object, right: object) -> None:
        verdict = Text("same", style="green") if left == right else Text("DIFFERENT", style="bold red")
        table.add_row(name, str(left), str(right), verdict)

    for key, name in _COMPARED:
        is_shared = all(len({end[key] for end in outcome.ends.values()}) == 1 for outcome in (first, second))
        for rank in [0] if is_shared else sorted(first.ends):
            label = f"{name} (all ranks)" if is_shared else f"{name} of rank {rank}"
            add(label, first.ends[rank][key][:16], second.ends[rank][key][:16])
    add("last loss", first.ends[0]["loss"], second.ends[0]["loss"])
    add("validation loss", first.ends[0]["val_loss"], second.ends[0]["val_loss"])
    add("steps trained", first.ends[0]["steps"], second.ends[0]["steps"])
    table.add_row("seconds", f"{first.duration_s:.1f}", f"{second.duration_s:.1f}", "")
    return table


def pauses(outcome: Outcome) -> list[float]:
    """For each signal that was sent, seconds until the next step was done."""
    return [
        next(step.wall_s for step in outcome.steps if step.wall_s > struck.wall_s) - struck.wall_s
        for struck in outcome.struck
    ]


def draw_pauses(outcome: Outcome) -> Table:
    """What each fault cost."""
    gaps = sorted(b.wall_s - a.wall_s for a, b in zip(outcome.steps, outcome.steps[1:], strict=False))
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("fault", "next step done after", "an ordinary step takes"):
        table.add_column(heading)
    for struck, pause_s in zip(outcome.struck, pauses(outcome), strict=True):
        table.add_row(
            f"{struck.strike.number.name} to rank {struck.strike.rank}",
            f"{pause_s:.2f} s",
            f"{gaps[len(gaps) // 2]:.2f} s",
        )
    return table


# --------------------------------------------------------------------------- the whole
@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _train(
    console: Console, folder: Path, heading: str, steps: int, strikes: Sequence[Strike], expected: Sequence[Step]
) -> Outcome:
    shutil.rmtree(folder, ignore_errors=True)
    with View(console, heading, NUM_RANKS, steps) as view:
        return Watch(Job(folder, NUM_RANKS, steps), view, strikes, expected).run()


def run(console: Console, out: Path, seconds: float) -> int:
    """Run the demo.

    Args:
        console: where to show it.
        out: folder for everything that is written.
        seconds: how long it may take on two cores.

    Returns:
        0 when both trainings ended in the same bits.
    """
    steps = max(MIN_STEPS, round(seconds * STEPS_PER_SECOND))
    console.print(
        f"\nThree ranks train a small GPT on the sources of Python's standard library, {steps} steps, twice.\n"
        "The first time they are struck from outside. Both times must end in the same bits.\n"
    )
    first = _train(console, out / "with_faults", "1 of 2: with faults", steps, STRIKES, ())
    console.print()
    second = _train(console, out / "without_faults", "2 of 2: the same, left alone", steps, (), first.steps)
    differences = find_differences(first, second)
    picture = out / "timeline.png"
    draw_timeline(
        picture,
        first.steps,
        first.recoveries,
        num_ranks=NUM_RANKS,
        title=f"A small GPT on {NUM_RANKS} ranks, struck {len(first.struck)} times on the way",
        subtitle="it ends in other bits than the run that was left alone"
        if differences
        else "every loss, weight, optimizer and random state equals that of the run that was left alone, bit for bit",
        reference=second.steps,
    )
    summary = {
        "steps": steps,
        "is_identical": not differences,
        "differences": differences,
        "pauses_s": [round(pause_s, 3) for pause_s in pauses(first)],
        "with_faults": first.ends,
        "without_faults": second.ends,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print()
    console.print(draw_pauses(first))
    console.print()
    console.print(draw_stages(first.recoveries))
    console.print()
    console.print(draw_ends(first, second))
    console.print()
    if len(first.struck) < len(STRIKES) or len(first.recoveries) < len(STRIKES):
        console.print(f"only {len(first.struck)} of {len(STRIKES)} faults could be inflicted", style="bold red")
        return 1
    if differences:
        console.print("The two ends differ:\n" + "\n".join(differences[:20]), style="bold red")
        return 1
    console.print(Text("The two ends are the same, in every bit.", style="bold green"))
    console.print(f"picture: {picture}   logs and records: {out / 'with_faults' / 'logs'}", soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m lightning_flashrl.cli.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for logs and the picture")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, help="about how long it takes on two cores; sets the steps"
    )
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with _sigterm_as_interrupt():
        try:
            return run(console, arguments.out, arguments.seconds)
        except DemoError as error:
            console.print(str(error), style="red", markup=False)
            return 1
        except KeyboardInterrupt:
            console.print("stopped; nothing is left running")
            return 130


if __name__ == "__main__":
    sys.exit(main())
