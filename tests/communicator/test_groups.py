"""Who connects a group: the program that makes it, or the recovery."""

from __future__ import annotations

import threading

import pytest
from torch._C._distributed_c10d import Backend, Store

from lightning_flashrl.communicator import Transport
from lightning_flashrl.communicator.communicator import Communicator


class _NoNetwork(Transport):
    """Remembers which groups were to be connected, and under which key."""

    backend = "none"
    device_type = "cpu"

    def __init__(self) -> None:
        self.connected: list[str] = []

    def connect(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Backend:
        store.set("here", b"")
        self.connected.append(name)
        return object()  # type: ignore[return-value]

    def abort(self) -> None:
        pass


@pytest.fixture
def keys() -> list[str]:
    return []


@pytest.fixture
def transport() -> _NoNetwork:
    return _NoNetwork()


@pytest.fixture
def communicator(transport: _NoNetwork, keys: list[str]) -> Communicator:
    return Communicator(transport, put=lambda key, _: keys.append(key), fetch=lambda *_: b"", global_rank=0)


def test_without_a_fault_the_program_connects_what_it_makes(communicator: Communicator, keys: list[str]) -> None:
    assert communicator.create_group("0", 0, [0, 1]).native is not None
    assert keys == ["q0/0/here"]


def test_a_group_made_while_a_recovery_waits_for_the_program_is_left_to_it(
    communicator: Communicator, transport: _NoNetwork
) -> None:
    communicator.begin_quorum(1)
    assert communicator.create_group("0", 0, [0, 1]).native is None
    assert transport.connected == []
    assert communicator.begin_regrouping(communicator.changed) == ["0"]


def test_what_is_made_after_the_recovery_took_its_groups_is_connected_in_the_new_quorum(
    communicator: Communicator, keys: list[str]
) -> None:
    communicator.create_group("0", 0, [0, 1])
    communicator.begin_quorum(1)
    assert communicator.begin_regrouping(communicator.changed) == ["0"]
    assert communicator.create_group("g1", 0, [0, 1]).native is not None
    assert keys[-1] == "q1/g1/here"


def test_a_recovery_that_was_overtaken_leaves_the_groups_to_the_next(communicator: Communicator) -> None:
    overtaken: threading.Event = communicator.changed
    communicator.begin_quorum(1)
    communicator.begin_quorum(2)
    communicator.begin_regrouping(overtaken)
    assert communicator.create_group("0", 0, [0, 1]).native is None
