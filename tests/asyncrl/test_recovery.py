"""Any rank of a run under `flash_ddp` is killed, and nothing of the run is lost."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_flashrl.asyncrl.history import read_history
from lightning_flashrl.asyncrl.processes import read_processes
from lightning_flashrl.asyncrl.recording import StepRecord
from lightning_flashrl.errors import ConfigurationError
from tests.jobs import rl

JOB = Path(__file__).parents[1] / "jobs" / "rl.py"
STEPS = 6


def run(output_dir: Path, *chaos: str, **options: Any) -> dict[str, Any]:
    """Train with faults, and return the summary."""
    options = {"strategy": "flash_ddp", "devices": 2, "max-steps": STEPS, **options}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(JOB), str(output_dir), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FLASHRL_CHAOS": json.dumps(chaos)},
        cwd=output_dir.parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(output_dir) in " ".join(p.info["cmdline"] or [])]
    assert left == []
    summary: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    return summary


def check(summary: dict[str, Any], recoveries: int, steps: int = STEPS) -> None:
    assert summary["recoveries"] == recoveries
    assert summary["steps"] == steps
    assert summary["rows_trained"] == summary["rows_generated"] == steps * 16
    assert summary["rows_lost"] == summary["rows_duplicated"] == summary["rows_left"] == 0
    assert summary["staleness_max"] <= 1


_QUICK = ("backward", 1)
_ALL = [(phase, rank) for phase in ("batch_start", "forward", "backward", "batch_end") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("phase", "rank"), [pytest.param(*case, marks=[] if case == _QUICK else pytest.mark.slow) for case in _ALL]
)
def test_a_killed_rank_takes_no_row_with_it(tmp_path: Path, rank: int, phase: str) -> None:
    check(run(tmp_path, f"kill rank={rank} step=3 phase={phase}"), recoveries=1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_a_rank_may_be_killed_when_all_is_trained(tmp_path: Path, hook: str, rank: int) -> None:
    # At the second hook the host has left already, and rank 0 may have written the summary before rank 1 is replaced.
    summary = run(tmp_path, **{"die-at": hook, "die-rank": rank})
    assert (tmp_path / "struck").exists()
    check(summary, recoveries=min(1, summary["recoveries"]) if (hook, rank) == ("on_fit_end", 1) else 1)


def test_the_queue_may_die_and_takes_no_row_with_it(tmp_path: Path) -> None:
    # The last strike comes before the end, however late the next host is listed.
    summary = run(tmp_path, schedule="queue at step 3,queue at step 7", **{"max-steps": 40})
    check(summary, recoveries=0, steps=40)
    assert summary["kills"] == 2
    assert summary["workers_replaced"] == 0


@pytest.mark.slow
def test_the_queue_may_die_together_with_any_rank(tmp_path: Path) -> None:
    strikes = [
        "trainer 0 at step 2",
        "queue at step 2",
        "queue at step 6",
        "supervisor at step 6",
        "trainer 1 at step 6",
    ]
    summary = run(tmp_path, schedule=",".join(strikes), **{"max-steps": 40})  # the last strike comes before the end
    check(summary, recoveries=2, steps=40)
    assert summary["kills"] == 5


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strikes",
    [
        ["trainer 1 hangs at step 2", "trainer 0 hangs at step 6"],
        ["queue hangs at step 2", "supervisor hangs at step 6"],
        ["standby hangs at step 2", "queue at step 2"],
        ["rollout 0 hangs at step 2", "queue at step 2"],
        ["supervisor hangs at step 2", "trainer 0 at step 2", "queue at step 2"],
    ],
)
def test_whoever_hangs_is_replaced_and_no_row_is_lost(tmp_path: Path, strikes: list[str]) -> None:
    summary = run(tmp_path, schedule=",".join(strikes), **{"max-steps": 40})
    check(summary, recoveries=sum(strike.startswith("trainer") for strike in strikes), steps=40)
    assert summary["kills"] == len(strikes)


@contextlib.contextmanager
def halted(output_dir: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A run that waits for the rows of its third step until this is over; then it goes on to its end."""
    gate = output_dir.with_name("gate")
    options = {"strategy": "flash_ddp", "devices": 2, "max-steps": STEPS, "gate": gate, **options}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, str(JOB), str(output_dir), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=output_dir.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _await(lambda: read_history(output_dir)[0][-1]["step"] == 2)
        time.sleep(1)  # both ranks wait
        yield process
        gate.touch()
        _, told = process.communicate(timeout=100)
        assert process.returncode == 0, told
    finally:
        process.kill()
        process.communicate()


def pids(output_dir: Path, role: str) -> dict[int, int]:
    """The processes of a role that are at work, by rank."""
    _, processes = read_processes(output_dir / "processes.json")
    return {one.rank: one.pid for one in processes if one.role == role and one.state in ("running", "serving")}


def test_a_rank_that_waits_for_rows_helps_a_lost_one_back(tmp_path: Path) -> None:
    """The rows may be what only the lost one can bring about."""
    output_dir = tmp_path / "run"
    with halted(output_dir) as process:
        os.kill(pids(output_dir, "trainer")[0], signal.SIGKILL)
        assert process.stderr is not None
        assert any("back after" in line for line in process.stderr)
    check(json.loads((output_dir / "summary.json").read_text()), recoveries=1)


@pytest.mark.slow
def test_a_host_that_is_stopped_before_it_is_on_standby_is_replaced(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    with halted(output_dir):
        (host,), (standby,) = pids(output_dir, "queue").values(), pids(output_dir, "standby").values()
        command = psutil.Process(host).cmdline()
        os.kill(standby, signal.SIGKILL)

        def stop_the_next() -> bool:
            for process in psutil.process_iter(["cmdline"]):
                if process.info["cmdline"] == command and process.pid not in (host, standby):
                    process.suspend()
                    return True
            return False

        _await(stop_the_next)
        os.kill(host, signal.SIGKILL)
        _await(lambda: host not in (now := pids(output_dir, "queue").values()) and len(now) == 1)
    check(json.loads((output_dir / "summary.json").read_text()), recoveries=0)


@pytest.mark.slow
def test_when_all_is_lost_the_next_life_ends_what_is_left_of_the_last(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    with halted(output_dir, **{"fallback": "last", "save-every": tmp_path / "saved"}):
        before = [*pids(output_dir, "queue").values(), *pids(output_dir, "standby").values()]
        before += pids(output_dir, "rollout").values()
        trainers = pids(output_dir, "trainer")
        assert len(before) == 3
        for pid in trainers.values():
            os.kill(pid, signal.SIGKILL)
        _await(lambda: not {*trainers.values()} & {*pids(output_dir, "trainer").values()})
        _await(lambda: not any(map(psutil.pid_exists, before)))
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["rows_lost"] == summary["rows_duplicated"] == summary["rows_left"] == 0
    assert summary["rows_trained"] == summary["rows_generated"] > 0


@pytest.mark.slow
def test_workers_come_and_go_while_the_queue_dies(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    scale = [sys.executable, "-m", "lightning_flashrl.cli.flashrl", "scale", str(output_dir)]
    with halted(output_dir):
        subprocess.run([*scale, "rollout=3"], check=True)
        _await(lambda: len(pids(output_dir, "rollout")) == 3)
        workers, (host,) = pids(output_dir, "rollout"), pids(output_dir, "queue").values()
        os.kill(host, signal.SIGKILL)
        _await(lambda: host not in pids(output_dir, "queue").values() and pids(output_dir, "rollout") == workers)
        subprocess.run([*scale, "rollout=0"], check=True)
        _await(lambda: not pids(output_dir, "rollout"))
        subprocess.run([*scale, "rollout=2"], check=True)
    summary = json.loads((output_dir / "summary.json").read_text())
    check(summary, recoveries=0)
    assert summary["workers_replaced"] == 0


def _await(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        with contextlib.suppress(FileNotFoundError, IndexError):
            if is_so():
                return
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_recovered_run_is_the_run_that_never_failed_given_the_same_rows(tmp_path: Path) -> None:
    """Bit for bit, with several micro-batches a step, two ranks and stale rows."""
    # A rank that comes late may get no micro-batch, but never no backward pass.
    faults = ["kill rank=1 step=2 phase=backward", "kill rank=0 step=4 phase=batch_end"]
    recovered = run(tmp_path / "recovered", *faults, record=tmp_path / "record", **{"max-staleness": 2})
    assert recovered["recoveries"] == 2
    assert recovered["staleness_max"] > 0
    assert not list((tmp_path / "record").glob("*/*.tmp"))
    never_failed = run(tmp_path / "never failed", replay=tmp_path / "record")
    assert never_failed["recoveries"] == 0
    assert never_failed["weights_sha256"] == recovered["weights_sha256"]
    again = run(tmp_path / "again", "kill rank=0 step=3 phase=backward", replay=tmp_path / "record")
    assert again["recoveries"] == 1
    assert again["weights_sha256"] == recovered["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "die_at"), [(1, 2, ""), (2, 1, ""), (2, 2, "on_train_end"), (2, 2, "on_fit_end")]
)
def test_a_run_goes_on_elsewhere_with_another_number_of_ranks(
    tmp_path: Path, before: int, after: int, die_at: str
) -> None:
    """A rank 0 that is killed at the end has a successor, which writes the checkpoint again."""
    path = tmp_path / "last.ckpt"
    settings = {"max-staleness": 2, "max-steps": 8, "ckpt-path": path}
    first = {"devices": before, "strategy": "flash_ddp" if before > 1 else "auto", "save-at": 3, "die-at": die_at}
    run(tmp_path / "before", record=tmp_path / "first", **settings, **first)
    second = {"devices": after, "strategy": "flash_ddp" if after > 1 else "auto"}
    summary = run(tmp_path / "after", record=tmp_path / "second", **settings, **second)
    assert (summary["steps"], summary["rows_trained"]) == (8, 5 * 16)
    assert summary["rows_lost"] == summary["rows_duplicated"] == 0
    assert summary["rows_generated"] >= summary["rows_trained"]  # some were under way
    groups: list[int] = []
    for folder, world_size, steps in (("first", before, range(3)), ("second", after, range(3, 8))):
        for rank in range(world_size):
            record = StepRecord(tmp_path / folder, rank, world_size)
            groups += [g for step in steps for lease in record.read(step) for g in lease["prompt.group_id"]]
    assert collections.Counter(groups) == collections.Counter(dict.fromkeys(range(32), 4))


def test_a_record_of_other_ranks_is_refused(tmp_path: Path) -> None:
    StepRecord(tmp_path / "record", rank=0, world_size=2).begin()
    trainer = rl.make_trainer(max_steps=1)
    with pytest.raises(ConfigurationError, match=r"is of 2 rank\(s\) and this run has 1; give Trainer\(devices=2\)"):
        trainer.fit(rl.make_module(rl.make_engine()), rl.make_data(replay=tmp_path / "record"))
    with pytest.raises(ConfigurationError, match="holds no record"):
        trainer.fit(rl.make_module(rl.make_engine()), rl.make_data(replay=tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="give one of the two"):
        rl.make_data(replay=tmp_path, record=tmp_path)
