"""What a controller writes down, and its successor reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.chronicle import Chronicle
from lightning_flashrl.supervisor.controller import JobSettings
from lightning_flashrl.supervisor.protocol import Failure, LostRank
from lightning_flashrl.supervisor.service import LOCAL_ENDPOINT, ControllerService
from lightning_flashrl.types import RankReport, ResumeKind, ResumePoint

POINT = ResumePoint(ResumeKind.BATCH_START, batch=1, version=1, seqs={"0": 1}, buffer=0)


class Bench:
    """An agent of two ranks, and controllers one after the other."""

    def __init__(self, log_dir: Path) -> None:
        self.chronicle = Chronicle()
        self.log_dir = log_dir
        self.told: list[str] = []
        self.begin()

    def begin(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(0)
        self.loop = EventLoop()
        self.service = ControllerService(
            self.context,
            self.loop,
            JobSettings(uses_flash=True),
            self.told.append,
            log_dir=str(self.log_dir),
            chronicle=self.chronicle,
        )
        self.agent = self.context.socket(zmq.DEALER)
        self.agent.linger = 0
        self.agent.connect(LOCAL_ENDPOINT)
        self.say(protocol.AgentHello(0, 2, "host", "token"))

    def end(self) -> None:
        self.agent.close()
        self.service.close()
        self.context.term()

    def say(self, *messages: protocol.AgentMessage) -> None:
        for message in messages:
            self.agent.send(protocol.encode(message))
        self.loop.run_once()

    def put(self, number: int, num_bytes: int) -> None:
        self.say(protocol.FromRank(0, protocol.StoreSet(number, f"key{number}", bytes(num_bytes))))

    def lose(self, global_rank: int) -> None:
        self.say(protocol.RanksFailed((Failure(LostRank(global_rank, "killed by SIGKILL", 0), 137),)))

    def report(self) -> None:
        donor = RankReport(0, 1, False, first_incomplete={"0": 1}, version=1)
        self.say(protocol.NodeReports(1, (donor, RankReport(1, 1, True, resume_points=(POINT,)))))

    @property
    def num_logged(self) -> int:
        path = self.log_dir / "recovery.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


@contextlib.contextmanager
def dying(service: ControllerService, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the service decides here, it does not carry out any more."""

    def die(actions: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(service, "_perform", die)
    with pytest.raises(InterruptedError):
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.end()
    bench.chronicle.close()


def test_a_long_chronicle_is_begun_anew_and_a_large_controller_rarely(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = Chronicle.begin

    def count(chronicle: Chronicle, record: bytes) -> None:
        begun.append(len(record))
        begin(chronicle, record)

    monkeypatch.setattr(Chronicle, "begin", count)
    for number in range(160):
        bench.put(number, 1 << 16)
    whole = 160 << 16
    assert 2 <= len(begun) <= 5
    assert bench.chronicle.size_bytes < 3 * whole
    bench.end()
    bench.begin()
    assert bench.told == []
    bench.say(protocol.FromRank(1, protocol.StoreGet(200, "key159")))
    answers = [bench.agent.recv(zmq.NOBLOCK) for _ in range(3)]  # the launch, the wish to hear all again, the value
    assert protocol.decode_to_agent(answers[-1]) == protocol.ToOneRank(1, protocol.StoreValue(200, bytes(1 << 16)))


def test_the_end_of_a_recovery_is_logged_by_the_successor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.lose(1)
    bench.report()
    bench.put(0, 1 << 21)  # from now on the chronicle is long
    with dying(bench.service, monkeypatch):
        bench.say(protocol.NodeRestored(1, (0, 1), {}))
    assert bench.num_logged == 0
    for _ in range(2):
        bench.end()
        bench.begin()
        assert bench.num_logged == 1


def test_the_end_of_a_recovery_is_told_by_the_successor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.lose(1)
    bench.report()
    bench.told.clear()
    with dying(bench.service, monkeypatch):
        bench.say(protocol.NodeRestored(1, (0, 1), {}))
    assert bench.told == []
    for _ in range(2):  # the second one finds that the user has been told
        bench.end()
        bench.begin()
        bench.service.note_takeover("the supervisor was killed by SIGKILL", 1.0)
        (line,) = bench.told
        assert line.startswith("rank(s) 1 back after")


def test_the_log_of_an_earlier_job_goes_before_there_can_be_a_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "recovery.jsonl"
    log.write_text("{}\n")
    monkeypatch.setattr(ControllerService, "_keep_whole", lambda service: has_log.append(log.exists()))
    has_log: list[bool] = []
    bench = Bench(tmp_path)
    bench.end()
    bench.chronicle.close()
    assert has_log[0] is False


def test_the_successor_says_why_the_job_stops(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with dying(bench.service, monkeypatch):
        bench.say(protocol.FromRank(0, protocol.Raised("Traceback\nValueError: no\n")))
    assert bench.told == []
    bench.end()
    bench.begin()
    bench.service.note_takeover("the supervisor was killed by SIGKILL", 1.0)
    assert bench.told == ["rank 0 raised:\nTraceback\nValueError: no"]
