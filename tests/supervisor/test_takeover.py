"""The supervisor dies or hangs, and its successor takes the running ranks over; they do not notice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import await_supervisor, supervisor_of

PROGRAMS = Path(__file__).parent / "programs"
FLASH, PLAIN = PROGRAMS / "flash_rank.py", PROGRAMS / "plain.py"
BACK = r"it is back after \d+ ms, ranks went on"


def kill(job, other_than: int | None = None) -> int:
    """Kill the supervisor of a job, and return which process it was."""
    pid = await_supervisor(job.process.pid, other_than=other_than)
    os.kill(pid, signal.SIGKILL)
    return pid


def num_incarnations(job) -> int:
    return len(re.findall(r"start \d+ incarnation", job.out))


# --------------------------------------------------------------------------- while the job runs
@pytest.mark.parametrize("seed", range(3))
def test_the_supervisor_is_killed_at_any_moment(start, expected_total, seed: int) -> None:
    moments = random.Random(seed)
    job = start("--nproc-per-node", 3, FLASH, "--steps", 100)
    pid = None
    for _ in range(5):
        time.sleep(moments.uniform(0.0, 0.2))
        pid = kill(job, pid)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 100))
    assert num_incarnations(job) == 3
    assert "lost" not in job.err
    assert re.search(rf"the supervisor was killed by SIGKILL; {BACK}", job.err)


@pytest.mark.parametrize("standby", [0, 1])
def test_the_supervisor_dies_before_there_are_ranks(start, expected_total, standby: int) -> None:
    job = start("--nproc-per-node", 2, "--standby", standby, FLASH)
    pid = None
    for _ in range(4):
        pid = kill(job, pid)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))
    assert num_incarnations(job) == 2


def test_what_the_log_tells(start, tmp_path: Path) -> None:
    job = start("--nproc-per-node", 2, "--log-dir", tmp_path / "logs", FLASH, "--fault", "0:6:supervisor")
    assert job.wait() == 0
    (record,) = map(json.loads, (tmp_path / "logs" / "recovery.jsonl").read_text().splitlines())
    assert (record["lost"], record["plan_reason"]) == ([], "the supervisor was killed by SIGKILL")
    assert 0 < record["timings_ms"]["total"] < 5000


def test_output_of_ranks_is_shown_once(start, tmp_path: Path) -> None:
    job = start("--nproc-per-node", 2, "--log-dir", tmp_path / "logs", PLAIN, "chat")
    job.until(r"line 100 of rank", count=2)
    pid = kill(job)
    job.until(r"line 600 of rank", count=2)
    kill(job, pid)
    assert job.wait() == 0
    lines = re.findall(r"line \d+ of rank \d", job.out)
    assert set(lines) == {f"line {n} of rank {rank}" for n in range(1000) for rank in (0, 1)}
    assert len(lines) - len(set(lines)) <= 200  # what was shown in the moment of the death may be shown again


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("standby", [0, 1])
def test_a_rank_dies_with_the_supervisor(start, expected_total, standby: int, how: str) -> None:
    faults = ("--fault", "1:6:supervisor", "--fault", f"1:6:{how}")
    job = start("--nproc-per-node", 3, "--standby", standby, FLASH, *faults)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 20))
    assert len(re.findall(BACK, job.err)) == 1
    assert len(re.findall(r"rank 1 lost: ", job.err)) == 1
    assert num_incarnations(job) == 4


@pytest.mark.parametrize("standby", [0, 1])
@pytest.mark.parametrize("where", ["0:report1", "1:report1", "0:plan1", "1:plan1", "2:restored1"])
def test_the_supervisor_dies_during_a_recovery(start, expected_total, where: str, standby: int) -> None:
    incarnation = 1 if where.startswith("1") else 0
    faults = ("--fault", "1:9:SIGKILL", "--fault", f"{where}:supervisor:{incarnation}")
    job = start("--nproc-per-node", 3, "--standby", standby, FLASH, *faults)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 20))
    assert len(re.findall(BACK, job.err)) == 1
    assert "rank(s) 1 back after" in job.err
    assert num_incarnations(job) == 4


@pytest.mark.parametrize("delay_s", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08])
def test_the_supervisor_dies_soon_after_a_rank(start, expected_total, delay_s: float) -> None:
    job = start("--nproc-per-node", 3, FLASH, "--steps", 60, "--fault", "2:30:SIGKILL")
    victim = int(job.until(r"start 2 incarnation 0 pid (\d+)")[0])
    while Path(f"/proc/{victim}").exists():
        time.sleep(0.0005)
    time.sleep(delay_s)
    kill(job)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 60))
    assert num_incarnations(job) == 4
    assert len(re.findall(r"start 2 incarnation 1", job.out)) == 1


def test_the_supervisor_dies_when_ranks_finish(start, expected_total) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--fault", "0:finished:supervisor", "--fault", "1:finished:supervisor")
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))


def test_the_supervisor_and_the_standby_die(start, expected_total) -> None:
    faults = ("--fault", "1:150:SIGKILL")
    job = start("--nproc-per-node", 2, FLASH, "--steps", 200, "--step-s", 0.03, *faults)
    job.until("start 0 incarnation 0")
    ranks = {int(pid) for pid in re.findall(r"pid (\d+)", job.out)}
    victims = [pid for pid, command in job.pids().items() if "standby" in command and pid not in ranks]
    for pid in (await_supervisor(job.process.pid), *victims):
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == 0
    assert victims
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 200))


def test_a_stopped_supervisor_is_replaced(start, expected_total) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 200, "--fault", "1:20:SIGKILL")
    job.until("start", count=2)
    os.kill(await_supervisor(job.process.pid), signal.SIGSTOP)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 200))
    assert re.search(rf"was killed, for it hung: the process has been stopped for 0.\d s; {BACK}", job.err)
    assert "rank 1 lost: killed by SIGKILL" in job.err


def test_a_supervisor_that_waits_for_who_reads_its_output_is_not_replaced(start, tmp_path: Path) -> None:
    reads_late = """
import fcntl, os, subprocess, sys
reader = subprocess.Popen(["sh", "-c", "sleep 4; exec cat"], stdin=subprocess.PIPE)
fcntl.fcntl(reader.stdin, fcntl.F_SETPIPE_SZ, 4096)
os.dup2(reader.stdin.fileno(), 1)
os.execv(sys.executable, [sys.executable, "-m", "lightning_flashrl.cli.flashrun", *sys.argv[1:]])
"""
    options = ("--nproc-per-node", 1, "--hang-timeout", 1, "--log-dir", tmp_path / "logs")
    job = start(*options, PLAIN, "chat", launcher=("-c", reads_late))
    assert job.wait() == 0
    assert job.leftovers() == []
    assert re.findall(r"line (\d+) of rank 0", job.out) == [str(n) for n in range(1000)]
    assert job.err == ""


def test_a_job_that_sleeps_as_a_whole_wakes_as_it_was(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 150)
    job.until("start", count=2)
    everybody = [job.process.pid, *(pid for pid in job.pids() if pid != job.process.pid)]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)
    for pid in reversed(everybody):
        os.kill(pid, signal.SIGCONT)
    assert job.wait() == 0
    assert "back" not in job.err


# --------------------------------------------------------------------------- other programs, the user's errors
def test_a_plain_program_does_not_notice(start) -> None:
    job = start("--nproc-per-node", 2, PLAIN, "chat")
    job.until(r"line 100 of rank", count=2)
    kill(job)
    assert job.wait() == 0
    assert set(re.findall(r"line (\d+) of rank 1", job.out)) == {str(n) for n in range(1000)}


@pytest.mark.parametrize("standby", [0, 1])
def test_an_exception_is_told_by_the_successor(start, standby: int) -> None:
    faults = ("--fault", "1:6:supervisor", "--fault", "1:6:raise")
    job = start("--nproc-per-node", 2, "--standby", standby, FLASH, *faults)
    assert job.wait() == 1
    assert "[flashrun] rank 1 raised:" in job.err
    assert "[flashrun] ValueError: this is the user's error" in job.err


def test_a_restart_of_everything_goes_on(start) -> None:
    job = start("--nproc-per-node", 2, "--max-restarts", 3, PLAIN, "supervisor-and-exit")
    assert job.wait() == 0
    assert {"done 0 1", "done 1 1"} <= set(job.out.splitlines())


def test_the_budget_of_faults_outlives_the_supervisor(start) -> None:
    faults = ("--fault", "1:5:supervisor:any", "--fault", "1:5:SIGKILL:any")
    job = start("--nproc-per-node", 2, "--max-restarts", 3, FLASH, *faults)
    assert job.wait() == 1
    assert "RecoveryBudgetExhaustedError: 4 faults within 3600 s, the budget is 3" in job.err


# --------------------------------------------------------------------------- the end
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("program", ["sleep", "children"])
def test_a_signal_ends_the_job_though_the_supervisor_dies_of_it(
    start, program: str, number: signal.Signals, status: int
) -> None:
    job = start("--nproc-per-node", 2, PLAIN, program)
    job.until("asleep", count=2)
    pid = await_supervisor(job.process.pid)
    os.kill(pid, signal.SIGKILL)
    job.process.send_signal(number)
    assert job.wait() == status
    assert job.leftovers() == []


def test_signals_do_not_disturb_the_end(start) -> None:
    job = start("--nproc-per-node", 2, PLAIN, "daemons")
    job.until("asleep", count=2)
    while job.process.poll() is None:
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    assert job.leftovers() == []


@pytest.mark.parametrize("order", ["supervisor first", "root first"])
def test_nothing_survives_the_root(start, order: str) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 100000)
    job.until("start", count=2)
    kill(job)
    await_supervisor(job.process.pid)
    job.until(BACK)
    if order == "supervisor first":
        kill(job)
    job.process.kill()
    job.process.wait()
    assert job.leftovers() == []


def test_a_supervisor_that_dies_again_and_again_ends_the_job(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 100000, launcher=(PROGRAMS / "flashrun_that_breaks.py",))
    assert job.wait() == 1
    assert re.search(r"the supervisor exited with status 1 .*, for the 20th time within 60 s; the job stops", job.err)
    assert "RuntimeError: this supervisor breaks" in job.err
    assert job.leftovers() == []


def test_a_supervisor_that_cannot_be_forked_is_forked_later(start, expected_total) -> None:
    launcher = (PROGRAMS / "flashrun_short_of_processes.py", "fork,2,3")
    job = start("--nproc-per-node", 2, FLASH, "--fault", "1:5:supervisor", launcher=launcher)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))
    assert len(re.findall(BACK, job.err)) == 1


# --------------------------------------------------------------------------- several nodes
@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_nodes(start: Callable[..., object], port: int, *arguments: object) -> list[object]:
    common = ("--nproc-per-node", 2, "--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port)
    return [start(*common, "--node-rank", node, *arguments) for node in (0, 1)]


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1), (1, 0, 0, 1)])
def test_supervisors_of_two_nodes_die(start, expected_total, port: int, victims: tuple[int, ...]) -> None:
    jobs = two_nodes(start, port, FLASH, "--steps", 200, "--fault", "3:150:SIGKILL", "--fault", "0:180:SIGKILL")
    for job in jobs:
        job.until("start", count=2)
    for victim in victims:
        time.sleep(0.2)
        kill(jobs[victim])
    assert [job.wait() for job in jobs] == [0, 0]
    assert jobs[0].finals() | jobs[1].finals() == dict.fromkeys(range(4), expected_total(4, 200))
    assert all("rank(s) 3 back after" in jobs[0].err for _ in victims)
    for node, job in enumerate(jobs):
        assert bool(re.search(BACK, job.err)) == (node in victims)


@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("where", ["6", "report1", "plan1"])
def test_a_supervisor_of_two_nodes_dies_during_a_recovery(
    start, expected_total, port: int, victim: int, where: str
) -> None:
    other = 2 if victim == 0 else 1  # on the other node
    faults = ("--fault", f"{victim}:6:SIGKILL", "--fault", f"{other}:{where}:supervisor")
    jobs = two_nodes(start, port, FLASH, *faults)
    assert [job.wait() for job in jobs] == [0, 0]
    assert jobs[0].finals() | jobs[1].finals() == dict.fromkeys(range(4), expected_total(4, 20))


@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_stops_two_nodes_though_a_supervisor_died(start, port: int, node: int) -> None:
    jobs = two_nodes(start, port, PLAIN, "sleep")
    for job in jobs:
        job.until("asleep", count=2)
    kill(jobs[node])
    jobs[node].process.send_signal(signal.SIGINT)
    assert [job.wait() for job in jobs] == [130, 130]


def test_a_controller_that_dies_while_nodes_stop_hears_when_they_have(start, port: int) -> None:
    jobs = two_nodes(start, port, "--standby", 0, PLAIN, "deaf")
    for job in jobs:
        job.until("asleep", count=2)
    os.kill(next(pid for pid, command in jobs[0].pids().items() if "runner" in command), signal.SIGKILL)
    jobs[0].until("killed by SIGKILL")
    kill(jobs[0])
    began = time.monotonic()
    assert [job.wait() for job in jobs] == [137, 137]
    assert time.monotonic() - began < 8.0  # ranks are killed after 3 s; a node that says nothing is waited for for 15 s


def test_nodes_join_a_controller_that_died(start, expected_total, port: int) -> None:
    common = ("--nproc-per-node", 1, "--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port)
    jobs = [start(*common, "--node-rank", 0, FLASH)]
    kill(jobs[0])
    await_supervisor(jobs[0].process.pid)
    jobs.append(start(*common, "--node-rank", 1, FLASH))
    kill(jobs[1])
    assert [job.wait() for job in jobs] == [0, 0]
    assert jobs[1].finals() == {1: expected_total(2, 20)}


def test_there_is_one_supervisor(start) -> None:
    job = start("--nproc-per-node", 1, PLAIN, "sleep")
    job.until("asleep")
    assert supervisor_of(job.process.pid) is not None
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
