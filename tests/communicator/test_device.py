from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import BarrierOptions, HashStore, Work

from lightning_flashrl.communicator.base import KeyValueStore
from lightning_flashrl.communicator.device import (
    MUST_BE_REPLACED,
    DeviceGroup,
    DeviceTransport,
    GroupStore,
    require_off,
)
from lightning_flashrl.errors import ConfigurationError


class HandledWork(Work):
    """A native handle whose collective ends when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.has_run = threading.Event()
        self.error: RuntimeError | None = None
        self.num_waits = 0

    def is_completed(self) -> bool:
        return self.has_run.is_set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.num_waits += 1
        if self.error is not None:
            raise self.error
        return True


class HandledGroup:
    """A native group that keeps what it was called with."""

    def __init__(self) -> None:
        self.works: list[HandledWork] = []
        self.calls: list[tuple[Any, ...]] = []

    def _issue(self, *call: Any) -> HandledWork:
        self.calls.append(call)
        self.works.append(HandledWork())
        return self.works[-1]

    def allreduce(self, tensors: list[torch.Tensor], *options: Any) -> Work:
        return self._issue("allreduce", tensors, *options)

    def allgather(self, outputs: Any, inputs: Any, *options: Any) -> Work:
        return self._issue("allgather", outputs, inputs, *options)

    def barrier(self, options: BarrierOptions) -> Work:
        return self._issue("barrier", options)

    def size(self) -> int:
        return 1


class HandledTransport(DeviceTransport):
    backend = "handled"
    device_type = "cpu"
    program_error_signs = ("invalid usage",)

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cpu"))
        self.given_up: list[Any] = []
        self.entered: list[str] = []
        self.failed: list[Work] = []

    def enter_device(self) -> None:
        self.entered.append(threading.current_thread().name)

    def _open(self, store: Any, rank: int, size: int, timeout_s: float, name: str) -> Any:
        return HandledGroup()

    def _meet(self, group: DeviceGroup) -> None:
        pass

    def _give_up(self, natives: list[Any]) -> None:
        self.given_up += natives

    def has_failed(self, work: Work) -> bool:
        return work in self.failed


@pytest.fixture
def transport() -> HandledTransport:
    return HandledTransport()


@pytest.fixture
def group(transport: HandledTransport) -> Any:
    return transport.connect(HashStore(), 0, 1, 60.0, "0")


def _wait_in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work.wait())
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="waiter")
    thread.start()
    return thread, outcome


def test_wait_holds_the_host_until_the_device_has_run_the_collective(group: Any) -> None:
    work = group.allreduce([torch.ones(2)])
    thread, outcome = _wait_in_thread(work)
    thread.join(0.05)
    assert thread.is_alive()
    assert group.native.works[0].num_waits == 0, "a stream was put behind a collective that had not run"
    group.native.works[0].has_run.set()
    thread.join(5)
    assert outcome == [True]
    assert work.is_success()


def test_an_abort_ends_a_wait_at_once(transport: HandledTransport, group: Any) -> None:
    thread, outcome = _wait_in_thread(group.allreduce([torch.ones(2)]))
    transport.abort()
    thread.join(5)
    assert transport.is_peer_failure(outcome[0])
    assert transport.given_up == [group.native]


def test_a_collective_that_ends_after_the_abort_is_not_trusted(transport: HandledTransport, group: Any) -> None:
    work = group.allreduce([torch.ones(2)])
    transport.abort()
    group.native.works[0].has_run.set()
    assert work.is_completed()
    assert not work.is_success()
    with pytest.raises(RuntimeError, match="aborted"):
        work.wait()


def test_a_result_that_was_seen_stays_good_after_an_abort(transport: HandledTransport, group: Any) -> None:
    work = group.allreduce([torch.ones(2)])
    group.native.works[0].has_run.set()
    work.wait()
    transport.abort()
    assert work.is_success()
    assert work.wait()


def test_a_broken_group_takes_no_calls_and_a_new_one_does(transport: HandledTransport, group: Any) -> None:
    transport.abort()
    with pytest.raises(RuntimeError, match="aborted"):
        group.allreduce([torch.ones(2)])
    assert group.native.calls == []
    again: Any = transport.connect(HashStore(), 0, 1, 60.0, "0")
    again.allreduce([torch.ones(2)])
    assert again.size() == 1


def test_a_connect_overtaken_by_an_abort_fails(transport: HandledTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_meet", lambda group: transport.abort())
    with pytest.raises(RuntimeError, match="aborted"):
        transport.connect(HashStore(), 0, 1, 60.0, "0")
    assert transport.given_up


def test_errors_of_the_native_library_come_out_of_wait(transport: HandledTransport, group: Any) -> None:
    work = group.allreduce([torch.ones(2)])
    native = group.native.works[0]
    native.error = RuntimeError("ncclRemoteError")
    native.has_run.set()
    with pytest.raises(RuntimeError, match="ncclRemoteError"):
        work.wait()
    silent = group.allreduce([torch.ones(2)])
    transport.failed.append(group.native.works[1])
    group.native.works[1].has_run.set()
    with pytest.raises(RuntimeError, match="native library") as caught:
        silent.wait()
    assert transport.is_peer_failure(caught.value)


def test_wait_gives_up_after_its_timeout(group: Any) -> None:
    with pytest.raises(RuntimeError, match=r"timed out after 0\.01 s"):
        group.allreduce([torch.ones(2)]).wait(timedelta(seconds=0.01))


def test_a_future_is_resolved_when_the_device_has_run_the_collective(transport: HandledTransport, group: Any) -> None:
    outputs = [[torch.zeros(1), torch.ones(1)]]
    first, second = group.allgather(outputs, [torch.ones(1)]), group.allreduce([torch.ones(2)])
    futures = [first.get_future(), second.get_future()]
    assert first.get_future() is futures[0]
    group.native.works[1].has_run.set()
    assert [t.tolist() for t in futures[1].wait()] == [[1, 1]]
    assert not futures[0].done()
    group.native.works[0].has_run.set()
    assert [t.tolist() for t in futures[0].wait()] == [[0], [1]]
    assert "flashrl-device" in transport.entered


def test_an_abort_fails_a_future(transport: HandledTransport, group: Any) -> None:
    future = group.allreduce([torch.ones(2)]).get_future()
    transport.abort()
    with pytest.raises(RuntimeError, match="aborted"):
        future.wait()


def test_a_barrier_names_the_device() -> None:
    group: Any = HandledTransport(torch.device("cuda", 3)).connect(HashStore(), 0, 1, 60.0, "0")
    group.barrier()
    asked = BarrierOptions()
    asked.device_ids = [1]
    group.barrier(asked)
    assert [call[1].device_ids for call in group.native.calls] == [[3], [1]]


def test_own_faults_are_not_blamed_on_peers(transport: HandledTransport) -> None:
    assert transport.is_peer_failure(RuntimeError("Connection reset by peer"))
    assert not transport.is_peer_failure(RuntimeError("invalid usage, Connection reset by peer"))
    assert not transport.is_peer_failure(RuntimeError(f"abort failed; {MUST_BE_REPLACED}"))


def test_a_group_store_can_be_pointed_at_another_quorum() -> None:
    values: dict[str, bytes] = {}

    def store(quorum: int) -> KeyValueStore:
        return KeyValueStore(f"q{quorum}/", values.__setitem__, lambda key, _: values[key], 1.0)

    kept = GroupStore(store(1))
    kept.set("id", b"\xff\x00")
    kept.target = store(2)
    kept.set("id", b"\x01")
    kept.wait(["id"])
    assert values == {"q1/id": b"\xff\x00", "q2/id": b"\x01"}
    assert kept.get("id") == b"\x01"
    assert not kept.check(["id"])
    assert not kept.delete_key("id")


@pytest.mark.parametrize("value", ["0", "false", "OFF"])
def test_switches_that_are_off_are_left_alone(value: str) -> None:
    environ = {"A": value}
    require_off(environ, {"A": "it would end the process", "B": "likewise"}, default_on=["A", "B"])
    assert environ == {"A": value, "B": "0"}


def test_a_switch_that_is_on_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigurationError, match="A=3: it would end the process; unset it or set it to 0"):
        require_off({"A": "3"}, {"A": "it would end the process"}, default_on=["A"])
