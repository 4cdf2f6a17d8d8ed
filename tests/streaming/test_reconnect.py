"""The process of a queue is killed, another goes on from its journal, and clients do not notice."""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_flashrl.errors import LeaseLostError, QueueUnavailableError, WouldBlock
from lightning_flashrl.streaming import Field, TransferQueue, TransferQueueClient, TransferQueueServer
from lightning_flashrl.supervisor.service import free_port

SECRET = "of this test"
FIELDS = {"number": Field(int), "tokens": Field(torch.int64, (None,)), "answer": Field(torch.float32, (None,))}
TASKS = {"square": ["number", "tokens"], "check": ["number", "answer"]}
SERVER = """
import sys
from tests.streaming.test_reconnect import FIELDS, SECRET, TASKS
from lightning_flashrl.streaming import TransferQueue, TransferQueueServer

port, journal = sys.argv[1:]
with TransferQueue(FIELDS, TASKS, secret=SECRET, journal=journal or None) as queue:
    with TransferQueueServer(queue, int(port)):
        print("ready", flush=True)
        sys.stdin.read()
"""


class Home:
    """A queue in a process that can be killed and followed by another."""

    def __init__(self, journal: Path | None) -> None:
        self.port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        self._journal = journal
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, str(self.port), str(self._journal or "")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def client(self, **options: Any) -> TransferQueueClient:
        return TransferQueueClient(self.endpoint, SECRET, **options)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "queue.journal")
    yield made
    made.kill()


def rows(*numbers: int) -> dict[str, Any]:
    return {"number": list(numbers), "tokens": [[number] * (number % 5) for number in numbers]}


@pytest.mark.parametrize("transport", ["auto", "socket"])
def test_whenever_the_queue_is_killed_each_row_is_there_once(home: Home, transport: str) -> None:
    num_rows, num_kills, rng = 600, 6, random.Random(transport)
    done: collections.Counter[int] = collections.Counter()
    failures: list[BaseException] = []
    lock = threading.Lock()

    def produce(begin: int) -> None:
        with home.client(transport=transport) as queue:
            number = begin
            while number < begin + num_rows // 2:
                count = min(rng.randint(1, 4), begin + num_rows // 2 - number)
                queue.put(rows(*range(number, number + count)))
                number += count
                time.sleep(0.01)

    def square() -> None:
        with home.client(transport=transport) as queue:
            while sum(done.values()) < num_rows:
                try:
                    lease = queue.lease("square", count=3, allow_partial=True, timeout_s=0.2)
                except WouldBlock:
                    continue
                assert [tokens.tolist() for tokens in lease["tokens"]] == [[n] * (n % 5) for n in lease["number"]]
                queue.commit(lease, {"answer": [torch.full((n % 3,), float(n)) for n in lease["number"]]})

    def check() -> None:
        with home.client(transport=transport) as queue:
            while sum(done.values()) < num_rows:
                try:
                    lease = queue.lease("check", count=5, allow_partial=True, timeout_s=0.2)
                except WouldBlock:
                    continue
                assert [answer.tolist() for answer in lease["answer"]] == [[n] * (n % 3) for n in lease["number"]]
                queue.commit(lease)
                with lock:
                    done.update(lease["number"])

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)
                raise

        return run

    work = [lambda: produce(0), lambda: produce(num_rows // 2), square, square, check, check]
    threads = [threading.Thread(target=guarded(one), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for _ in range(num_kills):
        time.sleep(rng.uniform(0.1, 0.6))
        home.kill()
        home.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
    assert done == collections.Counter(range(num_rows))
    with home.client() as queue:
        found = queue.statistics()
    assert (found.num_put, found.num_rows) == (num_rows, 0)
    assert {task.num_committed for task in found.tasks.values()} == {num_rows}


@pytest.mark.parametrize("transport", ["auto", "socket"])
def test_leases_go_on(home: Home, transport: str) -> None:
    with home.client(transport=transport) as queue, home.client(transport=transport) as other:
        first, second = queue.put(rows(1, 2))
        lease = queue.lease("square", count=2)
        queue.commit(lease, {"answer": [[1.0]]}, rows=[first])
        home.kill()
        home.start()
        with pytest.raises(WouldBlock):
            other.lease_nowait("square", count=1)
        queue.renew(lease)
        with pytest.raises(LeaseLostError, match="belongs to another consumer"):
            other.commit(lease)
        queue.commit(lease, {"answer": [[2.0]]}, rows=[second])
        assert other.lease("check", count=2)["number"] == [1, 2]


def test_the_leases_of_a_process_that_has_died_meanwhile_go_back(home: Home) -> None:
    consumer = f"""
import os, signal
from lightning_flashrl.streaming import TransferQueueClient
queue = TransferQueueClient({home.endpoint!r}, {SECRET!r})
assert len(queue.lease("square", count=1)) == 1
print("leased", flush=True)
signal.pause()
"""
    with home.client() as queue:
        queue.put(rows(1))
        process = subprocess.Popen([sys.executable, "-c", consumer], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"leased\n"
        home.kill()
        process.kill()
        process.communicate()
        home.start()
        assert queue.lease("square", count=1, timeout_s=30)["number"] == [1]


def test_a_queue_that_hangs_is_followed_by_another_when_somebody_sees_to_that(home: Home) -> None:
    def follow() -> None:
        lost.append(home.process.pid)
        home.kill()
        home.start()

    lost: list[int] = []
    with home.client(answer_timeout_s=1.0, on_lost=follow) as queue:
        queue.put(rows(1))
        os.kill(home.process.pid, signal.SIGSTOP)
        queue.put(rows(2))
        assert len(lost) == 1
        assert queue.lease("square", count=2)["number"] == [1, 2]


def test_one_that_dies_as_soon_as_it_is_there_is_followed_by_another(home: Home) -> None:
    def follow() -> None:
        lost.append(home.process.pid)
        home.kill()
        home.start()
        if len(lost) < 3:
            home.process.kill()

    lost: list[int] = []
    with home.client(answer_timeout_s=1.0, on_lost=follow) as queue:
        queue.put(rows(1))
        home.kill()
        queue.put(rows(2))
        assert len(lost) == 3
        assert queue.lease("square", count=2)["number"] == [1, 2]


def test_a_client_may_come_before_the_next_server(home: Home) -> None:
    os.kill(home.process.pid, signal.SIGSTOP)  # it takes what is said, and never answers
    with pytest.raises(QueueUnavailableError):
        home.client(answer_timeout_s=0.5)

    def follow() -> None:
        home.kill()
        home.start()

    with home.client(answer_timeout_s=0.5, connect_timeout_s=30.0, on_lost=follow) as queue:
        queue.put(rows(1))
    os.kill(home.process.pid, signal.SIGSTOP)
    thread = threading.Timer(1.5, follow)
    thread.start()
    with home.client(answer_timeout_s=0.5, connect_timeout_s=30.0) as queue:
        queue.put(rows(2))
        assert queue.lease("square", count=2)["number"] == [1, 2]
    thread.join()


def test_without_a_journal_clients_are_told_at_once() -> None:
    home = Home(None)
    with home.client() as queue:
        queue.put(rows(1))
        home.kill()
        began_s = time.monotonic()
        with pytest.raises(QueueUnavailableError):
            queue.put(rows(2))
        assert time.monotonic() - began_s < 30


def test_another_queue_at_the_same_place_is_not_taken_for_it(home: Home, tmp_path: Path) -> None:
    with home.client() as queue:
        queue.put(rows(1))
        home.kill()
        (tmp_path / "queue.journal").unlink()
        home.start()
        with pytest.raises(QueueUnavailableError, match="another one answers there"):
            queue.put(rows(2))
        with home.client() as fresh:
            assert fresh.statistics().num_put == 0


def test_nobody_comes_and_that_is_said_in_the_end(tmp_path: Path) -> None:
    home = Home(tmp_path / "queue.journal")
    with home.client(answer_timeout_s=0.3, reconnect_timeout_s=1.0) as queue:
        home.kill()
        with pytest.raises(QueueUnavailableError):
            queue.put(rows(1))


def test_a_request_that_is_asked_twice_is_done_once(tmp_path: Path) -> None:
    """The answer was lost, not the request."""
    with (
        TransferQueue(FIELDS, TASKS, journal=tmp_path / "journal") as queue,
        TransferQueueServer(queue) as server,
        TransferQueueClient(server.endpoint, server.secret) as client,
    ):
        link = client._link
        ask, lose = link.ask, {"Put", "TakeLease", "EndLease", "Clear"}

        def ask_in_vain(request: Any, number: int, expected: Any) -> Any:
            answer = ask(request, number, expected)
            if type(request).__name__ in lose:
                lose.remove(type(request).__name__)
                raise QueueUnavailableError(client.endpoint, 0.0, "hear the answer")
            return answer

        def losing(call: Callable[[], Any]) -> Any:
            client._link.ask = ask_in_vain  # type: ignore[method-assign]
            return call()

        assert losing(lambda: client.put(rows(1, 2))) == (0, 1)
        lease = losing(lambda: client.lease("square", count=1))
        assert lease["number"] == [1]
        losing(lambda: client.commit(lease))
        losing(lambda: client.clear([1]))
        assert not lose
        found = queue.statistics()
        assert (found.num_put, found.num_rows) == (2, 1)
        assert (found.tasks["square"].num_committed, found.tasks["square"].num_leased) == (1, 0)


@pytest.mark.parametrize("transport", ["auto", "socket"])
def test_a_storage_unit_may_be_killed(transport: Any) -> None:
    with (
        TransferQueue(FIELDS, TASKS, num_storage_units=2) as queue,
        TransferQueueServer(queue) as server,
        TransferQueueClient(server.endpoint, server.secret, transport=transport, answer_timeout_s=1.0) as client,
    ):
        client.put(rows(*range(50)))
        for round_ in range(3):
            pids = [process.pid for process in queue.unit_processes]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            client.put(rows(50 + round_))
            lease = client.lease("square", count=10)
            assert [tokens.tolist() for tokens in lease["tokens"]] == [[n] * (n % 5) for n in lease["number"]]
            client.commit(lease, {"answer": [[1.0]] * 10})
            while any(process.pid in pids for process in queue.unit_processes):
                time.sleep(0.01)
        pids = [process.pid for process in queue.unit_processes]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
