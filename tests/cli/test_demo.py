"""The demo: both trainings end in the same bits, and nothing is left running however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_flashrl.cli import demo
from lightning_flashrl.cli.demo import Outcome, Strike, Struck
from lightning_flashrl.cli.demo_job import Job
from lightning_flashrl.cli.demo_view import View
from lightning_flashrl.report import Recovery, Step

TOO_LONG_S = 100


def outcome(weights: str = "a", losses: tuple[float, ...] = (3.0, 2.0, 1.0)) -> Outcome:
    end = {"rank": 0, "steps": 3, "weights": weights, "optimizer": "b", "loss": losses[-1], "val_loss": 2.0}
    ends: dict[int, dict[str, Any]] = {rank: end | {"rank": rank, "rng": f"rng{rank}"} for rank in range(2)}
    return Outcome(ends, [Step(i + 1, loss, 100.0 + i) for i, loss in enumerate(losses)], [])


def recovery(**changes: Any) -> Recovery:
    values: dict[str, Any] = {"timings_ms": {"detect": 1.0, "report": 200.0, "total": 700.0}, "is_complete": True}
    return Recovery(
        quorum_id=1,
        lost=(1,),
        reasons={1: "killed by SIGKILL"},
        donors={1: 0},
        plan="",
        wall_s=101.0,
        **values | changes,
    )


def shown(renderable: Any) -> str:
    console = Console(width=130, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - the console writes to it
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_equal_ends_have_no_differences() -> None:
    assert demo.find_differences(outcome(), outcome()) == []
    text = shown(demo.draw_ends(outcome(), outcome()))
    assert "DIFFERENT" not in text
    assert text.count("same") == len(["weights", "optimizer", "rng 0", "rng 1", "loss", "val_loss", "steps"])


def test_every_difference_is_named() -> None:
    found = demo.find_differences(outcome(), outcome("c", (3.0, 2.5, 1.0)))
    assert found == [
        "rank 0 weights: a with faults, c without",
        "rank 1 weights: a with faults, c without",
        "loss of step 2: 2.0 with faults, 2.5 without",
    ]
    assert "DIFFERENT" in shown(demo.draw_ends(outcome(), outcome("c")))


def test_weights_that_differ_between_ranks_are_shown_for_each_rank() -> None:
    torn = outcome()
    torn.ends[1]["weights"] = "z"
    text = shown(demo.draw_ends(torn, outcome()))
    assert "weights of rank 1" in text
    assert "DIFFERENT" in text


def test_a_pause_ends_with_the_next_step() -> None:
    struck = outcome()
    struck.struck = [Struck(Strike(1, signal.SIGKILL, 0.1), 7, 100.25)]
    assert demo.pauses(struck) == [0.75]
    assert "0.75 s" in shown(demo.draw_pauses(struck))


def test_away_from_a_terminal_there_is_a_line_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=100, force_terminal=False)
    with View(console, "heading", 2, 10) as view:
        view.add_event(1.0, "something [ms: 1]")
        view.update(2.0, [Step(1, 5.0, 1.0), Step(2, 4.5, 1.5)])
        view.update(2.1, [Step(3, 4.0, 2.0)])
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "heading",
        "   1.0 s  something [ms: 1]",
        "   2.0 s  step 2/10  loss 4.500  2.0 steps/s",
    ]


def test_on_a_terminal_ranks_and_recoveries_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=120, force_terminal=True, color_system=None)
    with View(console, "heading", 2, 10) as view:
        view.ranks[1].pid, view.ranks[1].incarnation = 77, 1
        view.ranks[1].set("trains", "green")
        view.recoveries = [recovery(), recovery(is_complete=False)]
        view.add_event(1.0, "rank 1 is back [ms: 1]")
        view.update(2.0, [Step(4, 5.0, 1.0)])
    said = capsys.readouterr().out
    assert "● trains" in said
    assert "process 2 of this rank, pid 77" in said
    assert said.count("state of rank 0") == said.count("rank 1 killed by SIGKILL")
    assert "701 ms" in said
    assert "rank 1 is back" in said
    assert "[ms" not in said


def test_a_rank_that_is_not_there_cannot_be_struck(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, 3)
    assert job.find_ranks() == {}
    assert job.strike(0, signal.SIGKILL) is None
    assert job.poll() == []
    job.stop()


# --------------------------------------------------------------------------- real trainings
def start(out: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_flashrl.cli.demo", "--out", str(out), "--seconds", str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def await_steps(out: Path, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + TOO_LONG_S
    while not (out / "with_faults" / "progress.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def processes_that_write_to(out: Path) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1").startswith(str(out)):
                yield int(entry.name)
        except OSError:  # it ended while we looked, or belongs to somebody else
            continue


def await_nobody(out: Path) -> None:
    deadline_s = time.monotonic() + 5.0
    while left := list(processes_that_write_to(out)):
        assert time.monotonic() < deadline_s, f"still running: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, 600)
    await_steps(tmp_path, process)
    assert len(list(processes_that_write_to(tmp_path))) == demo.NUM_RANKS
    process.send_signal(number)
    said, _ = process.communicate(timeout=TOO_LONG_S)
    assert process.returncode == 130, said
    assert said.endswith("stopped; nothing is left running\n")
    assert list(processes_that_write_to(tmp_path)) == []


@pytest.mark.slow
def test_a_killed_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, 600)
    await_steps(tmp_path, process)
    process.kill()
    process.communicate()
    await_nobody(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_both_trainings_end_in_the_same_bits(tmp_path: Path) -> None:
    process = start(tmp_path, 1)
    said, _ = process.communicate(timeout=380)
    assert process.returncode == 0, said
    assert "The two ends are the same, in every bit." in said
    for line in ("SIGKILL to rank 1", "SIGSTOP to rank 2", "SIGKILL to rank 0"):
        assert re.search(rf"sends {line}, process \d+", said)
    assert said.count("back after") == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["is_identical"]
    assert summary["steps"] == demo.MIN_STEPS
    assert len(summary["pauses_s"]) == 3
    assert len({end["rng"] for end in summary["with_faults"].values()}) == demo.NUM_RANKS
    assert (tmp_path / "timeline.png").stat().st_size > 20_000
    assert [path.name for path in sorted(tmp_path.glob("with_faults/logs/rank0/*"))] == [
        "incarnation0.log",
        "incarnation1.log",
    ]
    assert len(list(tmp_path.glob("without_faults/logs/rank0/*"))) == 1
