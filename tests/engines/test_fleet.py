"""Workers whose fleet's process is killed go on, and the next fleet takes them over."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from lightning_flashrl.streaming import Field, TransferQueue, TransferQueueServer
from lightning_flashrl.weights import WeightPublisher, WeightsAddress

PROGRAM = Path(__file__).parents[1] / "jobs" / "fleet.py"
Record = dict[str, Any]


class Fleet:
    """A fleet in a process of its own, which can be killed."""

    def __init__(self, arguments: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def view(self) -> dict[str, Any]:
        """The next thing that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fleet is gone"
        found: dict[str, Any] = json.loads(line)
        return found

    def until(self, is_so: Callable[[list[Record]], bool]) -> list[Record]:
        """Records of which that is so."""
        deadline_s = time.monotonic() + 60
        while not is_so(records := self.view()["records"]):
            assert time.monotonic() < deadline_s, records
        return records

    def until_serving(self, num_workers: int) -> list[Record]:
        return self.until(lambda records: sum(one["state"] == "serving" for one in records) == num_workers)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> dict[str, Any]:
        """End it, and return what it said last."""
        told, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        found: dict[str, Any] = json.loads(told.splitlines()[-1])
        return found


Start = Callable[..., Fleet]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts fleets that follow each other."""
    fleets: list[Fleet] = []
    name = secrets.token_hex(8)
    with TransferQueue({"x": Field(int)}, ["task"]) as queue, TransferQueueServer(queue) as server:

        def begin(
            before: list[Record] = [],  # noqa: B006
            num_workers: int = 2,
            keeper_pid: int = os.getpid(),
            gate: str = "",
            weights: WeightsAddress | None = None,
        ) -> Fleet:
            arguments = {"endpoint": server.endpoint, "secret": server.secret, "name": name, "before": before}
            arguments |= {"num_workers": num_workers, "keeper_pid": keeper_pid, "log_dir": str(tmp_path), "gate": gate}
            arguments["weights"] = msgspec.to_builtins(weights)
            (told := tmp_path / f"fleet{len(fleets)}.json").write_text(json.dumps(arguments))
            fleets.append(Fleet(told))
            return fleets[-1]

        yield begin
        for fleet in fleets:
            fleet.kill()
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(name in word for word in process.info["cmdline"] or []):
                    process.kill()


def pids(records: list[Record]) -> list[int]:
    return [one["pid"] for one in records]


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def await_end(pid: int) -> None:
    deadline_s = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_workers_go_on_under_the_next_fleet(start: Start) -> None:
    fleet = start()
    before = fleet.until_serving(2)
    for _ in range(2):
        fleet.kill()
        fleet = start(before)
        done = before[0]["statistics"]["num_completions"]
        after = fleet.until(
            lambda records, done=done: all(one["statistics"]["num_completions"] > done + 20 for one in records)
        )
        assert pids(after) == pids(before)
        before = after
    last = fleet.end()
    assert last["num_replaced"] == 0
    assert [one["state"] for one in last["records"]] == ["ended", "ended"]
    assert not any(map(is_running, pids(before)))


def test_a_worker_that_had_not_begun_finds_the_weights_with_the_next_fleet(start: Start, tmp_path: Path) -> None:
    """The first one held them, and was killed when it had said so."""
    with WeightPublisher({"w": torch.zeros(2)}) as publisher:
        gate = tmp_path / "gate"
        fleet = start(num_workers=1, gate=str(gate), weights=publisher.address)
        before = fleet.view()["records"]
        fleet.kill()
        gate.touch()
        time.sleep(0.5)
        fleet = start(before, num_workers=1, weights=publisher.address)
        assert pids(fleet.until_serving(1)) == pids(before)
        assert fleet.end()["num_replaced"] == 0


def test_a_worker_that_does_not_listen_yet_is_told_more_than_a_socket_holds(start: Start, tmp_path: Path) -> None:
    weights = {f"layers.{number}.a_weight_with_a_long_name": torch.zeros(1) for number in range(4000)}
    with WeightPublisher(weights) as publisher:
        assert len(msgspec.json.encode(publisher.address)) > 400_000
        gate = tmp_path / "gate"
        fleet = start(num_workers=1, gate=str(gate), weights=publisher.address)
        fleet.view()
        gate.touch()
        fleet.until_serving(1)
        assert fleet.end()["num_replaced"] == 0


@pytest.mark.parametrize("is_stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_worker_that_dies_with_its_fleet_is_replaced(start: Start, is_stopped: bool) -> None:
    fleet = start()
    before = fleet.until_serving(2)
    fleet.kill()
    victim = before[1]["pid"]
    if is_stopped:  # it dies when the next fleet believes it to be there
        os.kill(victim, signal.SIGSTOP)
        fleet = start(before)
        fleet.view()
        os.kill(victim, signal.SIGKILL)
    else:
        os.kill(victim, signal.SIGKILL)
        fleet = start(before)
    after = fleet.until(lambda records: len({one["pid"] for one in records} - {victim}) == 2)
    assert before[0]["pid"] in pids(after)
    fleet.until_serving(2)
    assert fleet.end()["num_replaced"] == 1


@pytest.mark.slow
def test_a_worker_of_which_the_next_fleet_does_not_know_ends(start: Start) -> None:
    fleet = start(num_workers=1)
    (before,) = fleet.until_serving(1)
    fleet.kill()
    fleet = start([], num_workers=1)
    fleet.view()
    await_end(before["pid"])
    assert before["pid"] not in pids(fleet.until_serving(1))


@pytest.mark.slow
def test_workers_that_are_too_many_end(start: Start) -> None:
    fleet = start()
    before = fleet.until_serving(2)
    fleet.kill()
    fleet = start([*before, {**before[0], "pid": os.getpid(), "rank": 7}], num_workers=1)  # no worker has that number
    fleet.view()
    await_end(before[1]["pid"])
    assert is_running(before[0]["pid"])
    last = fleet.end()
    assert sorted(one["state"] for one in last["records"]) == ["ended", "ended"]


def test_workers_end_with_their_keeper(start: Start) -> None:
    keeper = subprocess.Popen(["sleep", "1000"])
    fleet = start(keeper_pid=keeper.pid)
    before = fleet.until_serving(2)
    fleet.kill()
    time.sleep(0.5)
    assert all(map(is_running, pids(before)))
    keeper.kill()
    keeper.wait()
    for pid in pids(before):
        await_end(pid)
