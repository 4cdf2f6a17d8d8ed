"""Jobs with real processes and real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
FLASH, PLAIN = PROGRAMS / "flash_rank.py", PROGRAMS / "plain.py"


@pytest.mark.parametrize("standby", [0, 1])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGSEGV", "exit"])
def test_only_the_dead_rank_is_replaced_and_the_result_is_the_same(
    start, expected_total, how: str, standby: int
) -> None:
    job = start("--nproc-per-node", 3, "--standby", standby, FLASH, "--fault", f"1:6:{how}")
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 20))
    starts = re.findall(r"start (\d) incarnation (\d)", job.out)
    assert sorted(starts) == [("0", "0"), ("1", "0"), ("1", "1"), ("2", "0")]
    assert "rank 1 lost" in job.err
    assert "rank(s) 1 back after" in job.err


def test_a_loaded_rank_is_replaced_from_standby_within_a_moment(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 60, "--fault", "1:40:SIGKILL", "--log-dir")
    assert job.wait() == 2  # --log-dir belongs before the program: argparse of the program refuses it
    job = start(
        "--nproc-per-node", 2, "--log-dir", job.folder / "logs", FLASH, "--steps", 60, "--fault", "1:40:SIGKILL"
    )
    assert job.wait() == 0
    record = json.loads((job.folder.parent / "job0" / "logs" / "recovery.jsonl").read_text())
    assert record["lost"] == [1]
    assert record["reasons"] == {"1": "killed by SIGKILL"}
    assert record["donors"] == {"1": 0}
    assert record["is_complete"]
    assert {"detect", "spawn", "report", "plan", "total", "redo", "transfer"} <= record["timings_ms"].keys()
    assert record["timings_ms"]["detect"] < 100


@pytest.mark.parametrize(("standby", "refused"), [(0, "2,4,5"), (1, "1")])
def test_a_process_that_cannot_be_started_is_started_later(start, expected_total, standby: int, refused: str) -> None:
    launcher = (PROGRAMS / "flashrun_short_of_processes.py", f"spawn,{refused}")
    options = ("--nproc-per-node", 2, "--standby", standby)
    job = start(*options, FLASH, "--fault", "1:5:SIGKILL", launcher=launcher)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))
    assert ("cannot be started yet (Resource temporarily unavailable)" in job.err) == (standby == 0)
    assert "the supervisor" not in job.err


def test_a_standby_that_cannot_be_started_is_started_later(start) -> None:
    launcher = (PROGRAMS / "flashrun_short_of_processes.py", "spawn,2,3")
    job = start("--nproc-per-node", 2, FLASH, "--steps", 100000, launcher=launcher)
    job.until("start", count=2)
    known = {int(pid) for pid in re.findall(r"pid (\d+)", job.out)}
    waiting: set[int] = set()
    for _ in range(2):  # the standby, and the process that it forked
        for pid in waiting:
            os.kill(pid, signal.SIGKILL)
        deadline, known = time.monotonic() + 10, known | waiting
        while len(waiting := {p for p, command in job.pids().items() if "standby" in command and p not in known}) < 2:
            assert time.monotonic() < deadline, job.err
            time.sleep(0.05)
    assert "the supervisor" not in job.err
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143


def test_a_job_that_waits_for_a_process_can_be_stopped(start) -> None:
    launcher = (PROGRAMS / "flashrun_short_of_processes.py", "spawn,2,3,4,5,6,7,8,9")
    job = start("--nproc-per-node", 2, "--standby", 0, PLAIN, "sleep", launcher=launcher)
    job.until("cannot be started yet")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143


@pytest.mark.parametrize("how", ["hang", "gil"])
def test_a_hung_rank_is_killed_and_replaced(start, expected_total, how: str) -> None:
    job = start("--nproc-per-node", 2, "--hang-timeout", 1.5, FLASH, "--fault", f"0:6:{how}")
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))
    assert "rank 0 lost: hung: " in job.err
    assert ("GIL" in job.err) == (how == "gil")


def test_a_rank_may_set_the_hang_timeout(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--fault", "0:6:hang", "--hang", 1.0)
    assert job.wait() == 0
    assert "limit 1.0 s" in job.err


def test_a_rank_on_a_broken_device_is_replaced(start, expected_total) -> None:
    launcher = (PROGRAMS / "flashrun_with_sick_device.py",)
    job = start("--nproc-per-node", 2, FLASH, "--steps", 200, launcher=launcher)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 200))
    assert "rank 1 lost: device fault: fell off the bus" in job.err


def test_all_but_one_die_at_once(start, expected_total) -> None:
    job = start("--nproc-per-node", 4, FLASH, *(f"--fault={rank}:9:SIGKILL" for rank in (0, 1, 3)))
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(4), expected_total(4, 20))


def test_the_newcomer_dies_while_it_joins(start, expected_total) -> None:
    job = start("--nproc-per-node", 3, FLASH, "--fault", "1:9:SIGKILL", "--fault", "1:report1:SIGKILL:1")
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 20))
    assert "quorum 1 was overtaken" in job.err


def test_a_survivor_dies_while_it_reports(start, expected_total) -> None:
    job = start("--nproc-per-node", 3, FLASH, "--fault", "1:9:SIGKILL", "--fault", "2:report1:SIGKILL")
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(3), expected_total(3, 20))


def test_the_same_rank_dies_five_times(start, expected_total) -> None:
    faults = [f"--fault=0:{3 * (i + 1)}:SIGKILL:{i}" for i in range(5)]
    job = start("--nproc-per-node", 2, FLASH, *faults)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))


def test_a_rank_that_dies_before_it_trains_is_replaced(start, expected_total) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--fault", "1:0:SIGKILL")
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))


# --------------------------------------------------------------------------- the standby
def test_the_standby_may_die(start, expected_total) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 100, "--step-s", 0.03, "--fault", "1:70:SIGKILL")
    job.until("start 0 incarnation 0")
    ranks = {int(pid) for pid in re.findall(r"pid (\d+)", job.out)}
    victims = [pid for pid, command in job.pids().items() if "standby" in command and pid not in ranks]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == 0
    assert victims
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 100))
    assert "the standby process ended" in job.err


def test_the_standby_may_hang(start, expected_total) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 200, "--step-s", 0.03, "--fault", "1:150:SIGKILL")
    job.until("start 0 incarnation 0")
    ranks = {int(pid) for pid in re.findall(r"pid (\d+)", job.out)}
    victims: list[int] = []
    deadline = time.monotonic() + 20
    while len(victims) != 2:  # the standby and the process that waits; the one that forks it leaves at once
        assert time.monotonic() < deadline
        time.sleep(0.05)
        victims = [pid for pid, command in job.pids().items() if "standby" in command and pid not in ranks]
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 200))
    assert "the standby process ended" in job.err


# --------------------------------------------------------------------------- the user's errors
def test_an_exception_stops_the_job_once_and_shows_its_traceback(start) -> None:
    job = start("--nproc-per-node", 3, FLASH, "--fault", "2:5:raise")
    assert job.wait() == 1
    assert "[flashrun] rank 2 raised:" in job.err
    assert "[flashrun] ValueError: this is the user's error" in job.err
    assert "standby.py" not in job.err
    assert "runner.py" not in job.err
    assert "lost" not in job.err


def test_sys_exit_with_a_status_is_the_users_decision(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--fault", "1:5:sysexit")
    assert job.wait() == 7
    assert "SystemExit: 7" in job.err


def test_an_error_of_a_newcomer_stops_the_job(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--fault", "1:5:SIGKILL", "--fault", "1:5:raise:1")
    assert job.wait() == 1
    assert "this is the user's error" in job.err


# --------------------------------------------------------------------------- budgets and fallbacks
def test_a_crash_loop_ends_with_its_budget(start) -> None:
    arguments = ("--fault", "1:5:SIGKILL:any", "--checkpoint", "last.ckpt")
    job = start("--nproc-per-node", 2, "--max-restarts", 3, FLASH, *arguments)
    assert job.wait() == 1
    assert "RecoveryBudgetExhaustedError: 4 faults within 3600 s, the budget is 3" in job.err
    assert "newest checkpoint: last.ckpt" in job.err


def test_without_a_donor_the_job_stops_and_names_the_checkpoint(start) -> None:
    job = start(
        "--nproc-per-node", 2, FLASH, "--checkpoint", "a.ckpt", "--fault", "0:5:SIGKILL", "--fault", "1:5:SIGKILL"
    )
    assert job.wait() == 1
    assert "NoDonorError: no donor is left" in job.err
    assert "a.ckpt" in job.err


def test_without_a_donor_the_job_falls_back_to_the_newest_checkpoint(start, expected_total) -> None:
    faults = ("--fault", "0:5:SIGKILL", "--fault", "1:5:SIGKILL")
    job = start("--nproc-per-node", 2, FLASH, "--checkpoint", "a.ckpt", "--fallback", "last", *faults)
    assert job.wait() == 0
    assert job.out.count("resume a.ckpt") == 2
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 20))


def test_a_death_when_others_have_left_is_told_plainly(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--fault", "1:after:SIGKILL")
    assert job.wait() == 1
    assert "other ranks had already left the program" in job.err


# --------------------------------------------------------------------------- plain programs
def test_a_plain_program_fails_as_under_torchrun(start) -> None:
    job = start("--nproc-per-node", 2, PLAIN, "exit")
    assert job.wait() == 5
    assert "rank 1 exited with status 5 without a report" in job.err


def test_a_plain_program_starts_again_as_under_torchrun(start) -> None:
    job = start("--nproc-per-node", 2, "--max-restarts", 1, PLAIN, "exit")
    assert job.wait() == 0
    assert {"done 0 1", "done 1 1"} <= set(job.out.splitlines())


def test_a_plain_program_that_raises_again_and_again_uses_up_its_restarts(start) -> None:
    job = start("--nproc-per-node", 1, "--max-restarts", 2, PLAIN, "raise")
    assert job.wait() == 1
    assert [f"restart {i}" in job.err for i in range(4)] == [True, True, True, False]


# --------------------------------------------------------------------------- the end
@pytest.mark.parametrize("program", ["sleep", "deaf", "children"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_job_and_everything_below_it(start, program: str, number: signal.Signals, status: int) -> None:
    job = start("--nproc-per-node", 2, PLAIN, program)
    job.until("asleep", count=2)
    began = time.monotonic()
    job.process.send_signal(number)
    if program == "deaf":
        time.sleep(0.5)
        job.process.send_signal(number)  # the second one does not wait
    assert job.wait() == status
    assert time.monotonic() - began < 8
    assert job.leftovers() == []


@pytest.mark.parametrize(
    "program", [(PLAIN, "sleep"), (PLAIN, "deaf"), (PLAIN, "workers"), (FLASH, "--steps", "100000")]
)
def test_nothing_survives_flashrun_itself(start, program: tuple[str, ...]) -> None:
    job = start("--nproc-per-node", 2, *program)
    job.until("asleep|start", count=2)
    time.sleep(0.3)  # also a process on standby is there by then
    assert len(job.pids()) >= 4
    job.process.kill()
    job.process.wait()
    assert job.leftovers() == []


@pytest.mark.parametrize("standby", [0, 1])
def test_names_need_not_be_utf8(start, tmp_path: Path, standby: int) -> None:
    name = os.fsdecode(b"a\xffb")
    options = ("--standby", standby, "--log-dir", tmp_path / name)
    job = start(*options, PLAIN, "bytes", name, FLASHRL_TEST_BYTES=name)
    assert job.wait() == 0
    assert "found [b'a\\xffb', b'a\\xffb']" in job.out
    job = start("--standby", standby, "--max-restarts", 3, FLASH, "--fault", f"0:3:raise-{name}")
    assert job.wait() == 1
    assert "[flashrun] ValueError: a\\udcffb" in job.err


def test_under_nohup_a_job_outlives_its_terminal(start, expected_total) -> None:
    nohup = ("-c", "import os, sys; os.execvp('nohup', ['nohup', sys.executable, *sys.argv[1:]])")
    launcher = (*nohup, "-m", "lightning_flashrl.cli.flashrun")
    job = start("--nproc-per-node", 2, FLASH, "--steps", 50, launcher=launcher)
    job.until("start", count=2)
    job.process.send_signal(signal.SIGHUP)
    assert job.wait() == 0
    assert job.finals() == dict.fromkeys(range(2), expected_total(2, 50))


def test_no_replacement_is_born_while_the_job_stops(start) -> None:
    job = start("--nproc-per-node", 2, FLASH, "--steps", 100000)
    job.until("start", count=2)
    time.sleep(0.2)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert "incarnation 1" not in job.out


# --------------------------------------------------------------------------- logs
def test_logs_of_all_incarnations_are_kept_and_shown(start, tmp_path: Path) -> None:
    job = start("--nproc-per-node", 2, "--log-dir", tmp_path / "logs", FLASH, "--fault", "1:6:SIGKILL")
    assert job.wait() == 0
    files = sorted(str(path.relative_to(tmp_path / "logs")) for path in (tmp_path / "logs").rglob("*.log"))
    assert files == ["rank0/incarnation0.log", "rank1/incarnation0.log", "rank1/incarnation1.log"]
    assert "start 1 incarnation 1" in (tmp_path / "logs" / "rank1" / "incarnation1.log").read_text()
    assert "[rank1]: start 1 incarnation 1" in job.out


def test_redirected_output_stays_off_the_terminal(start, tmp_path: Path) -> None:
    job = start("--nproc-per-node", 2, "--log-dir", tmp_path / "logs", "-r", "1:3", FLASH)
    assert job.wait() == 0
    assert "final 0" in job.out
    assert "final 1" not in job.out
    assert "final 1" in (tmp_path / "logs" / "rank1" / "incarnation0.log").read_text()


# --------------------------------------------------------------------------- several nodes
@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_nodes(start: Callable[..., object], port: int, *arguments: object, **environ: str) -> list[object]:
    common = ("--nproc-per-node", 2, "--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port)
    return [start(*common, "--node-rank", node, *arguments, **environ) for node in (0, 1)]


@pytest.mark.parametrize("victim", [0, 3])
def test_two_nodes_recover_a_rank_of_either(start, expected_total, port: int, victim: int) -> None:
    jobs = two_nodes(start, port, FLASH, "--fault", f"{victim}:6:SIGKILL")
    assert [job.wait() for job in jobs] == [0, 0]
    assert jobs[0].finals() | jobs[1].finals() == dict.fromkeys(range(4), expected_total(4, 20))
    assert sorted(jobs[0].finals()) == [0, 1]
    assert f"rank(s) {victim} back after" in jobs[0].err


def test_an_error_on_one_node_stops_both(start, port: int) -> None:
    jobs = two_nodes(start, port, FLASH, "--fault", "3:6:raise")
    assert [job.wait() for job in jobs] == [1, 1]
    assert all("this is the user's error" in job.err for job in jobs)


def test_ctrl_c_on_the_second_node_stops_both(start, port: int) -> None:
    jobs = two_nodes(start, port, PLAIN, "sleep")
    for job in jobs:
        job.until("asleep", count=2)
    jobs[1].process.send_signal(signal.SIGINT)
    assert [job.wait() for job in jobs] == [130, 130]


def test_nodes_without_a_number_are_numbered_as_they_come(start, expected_total, port: int) -> None:
    common = ("--nproc-per-node", 1, "--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    jobs = [start(*common, FLASH)]
    deadline = time.monotonic() + 10
    while not is_listening(port) and time.monotonic() < deadline:
        time.sleep(0.02)
    jobs.append(start(*common, FLASH))
    assert [job.wait() for job in jobs] == [0, 0]
    assert jobs[1].finals() == {1: expected_total(2, 20)}


def test_strangers_do_not_disturb_a_job(start, expected_total, port: int) -> None:
    jobs = two_nodes(start, port, FLASH, "--steps", 60, "--fault", "3:30:SIGKILL")
    strangers = []
    while jobs[0].process.poll() is None:
        with contextlib.suppress(OSError):
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            strangers[-1].sendall(os.urandom(500))
        time.sleep(0.005)
    assert [job.wait() for job in jobs] == [0, 0]
    assert len(strangers) > 50
    assert jobs[1].finals() == dict.fromkeys((2, 3), expected_total(4, 60))
    for stranger in strangers:
        stranger.close()


def test_a_second_job_on_the_same_port_is_told_to_choose_another(start, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        job = start("--nnodes", 2, "--node-rank", 0, "--master-port", port, PLAIN, "sleep")
        assert job.wait() == 2
        assert "--master-port" in job.err


def test_a_job_that_was_stopped_and_continued_goes_on(start) -> None:
    job = start("--nproc-per-node", 1, FLASH, "--steps", 150)
    job.until("start")
    job.process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    job.process.send_signal(signal.SIGCONT)
    assert job.wait() == 0


def is_listening(port: int) -> bool:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def test_a_job_on_one_node_opens_no_port(start) -> None:
    job = start("--nproc-per-node", 1, PLAIN, "sleep")
    job.until("asleep")
    inodes = set()
    for pid in job.pids():
        for name in os.listdir(f"/proc/{pid}/fd"):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    rows = [
        line.split()
        for table in ("tcp", "tcp6", "unix")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = [
        row
        for row in rows
        if (row[3] in ("0A", "00010000")) and f"socket:[{row[9] if ':' in row[1] else row[6]}]" in inodes
    ]
    assert listening == []
    job.process.kill()
