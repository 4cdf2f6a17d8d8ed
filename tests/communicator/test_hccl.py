from __future__ import annotations

import sys
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from lightning_flashrl.communicator import HcclTransport, hccl, make_transport
from lightning_flashrl.communicator.base import KeyValueStore
from lightning_flashrl.errors import ConfigurationError

from ..fake_torch_npu import FakeNpu, install  # noqa: TID252 - tests are not an installed package


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> FakeNpu:
    monkeypatch.setenv("TORCH_HCCL_ASYNC_ERROR_HANDLING", "0")
    return install(monkeypatch)


@pytest.fixture
def transport(npu: FakeNpu, monkeypatch: pytest.MonkeyPatch) -> HcclTransport:
    """A transport of NPU 1 whose tensors are on the CPU."""
    made = HcclTransport(torch.device("npu", 1))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.full(shape, 0.0))
    return made


class Quorums:
    """Rendezvous of a single member, as the controller keeps it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def store(self, quorum: int, group: str = "0") -> KeyValueStore:
        return KeyValueStore(f"q{quorum}/{group}/", self.values.__setitem__, lambda key, _: self.values[key], 1.0)


def test_without_torch_npu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ConfigurationError, match=r"pip install lightning-flashrl\[npu\]"):
        make_transport("hccl")


def test_a_torch_npu_that_does_not_load_is_told_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=r"libhccl\.so.*set_env\.sh"):
        make_transport("hccl")


@pytest.mark.parametrize("name", ["TORCH_HCCL_ASYNC_ERROR_HANDLING", "HCCL_ASYNC_ERROR_HANDLING"])
def test_a_watchdog_that_would_end_survivors_is_refused(
    npu: FakeNpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigurationError, match="watchdog would end a survivor"):
        make_transport("hccl")


def test_rank_tables_are_refused(npu: FakeNpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_TABLE_FILE", "/etc/ranks.json")
    with pytest.raises(ConfigurationError, match="unset it"):
        make_transport("hccl")


def test_the_current_device_is_the_default(npu: FakeNpu) -> None:
    assert HcclTransport().device == torch.device("npu", 0)


def test_connect_sets_the_options_and_meets_the_members(npu: FakeNpu, transport: HcclTransport) -> None:
    group: Any = transport.connect(Quorums().store(0), 0, 1, 90.0, "0")
    options = group.native.options
    assert options._timeout == timedelta(seconds=90)
    assert options.global_ranks_in_group == []
    assert not options.is_high_priority_stream
    assert npu.log == ["set 1", "make group 0", "connect 0"]


def test_an_abort_ends_the_hosts_wait_and_leaves_the_device_alone(npu: FakeNpu, transport: HcclTransport) -> None:
    group: Any = transport.connect(Quorums().store(0), 0, 1, 90.0, "0")
    group.native.is_hung = True
    work = group.allreduce([torch.ones(1)])
    npu.log.clear()
    threading.Timer(0.05, transport.abort).start()
    with pytest.raises(RuntimeError, match="aborted") as caught:
        work.wait()
    assert transport.is_peer_failure(caught.value)
    assert npu.log == []


def test_settle_lets_kernels_end_then_stops_the_device_rebuilds_every_link_and_restarts(
    npu: FakeNpu, transport: HcclTransport
) -> None:
    quorums = Quorums()
    for name in ("0", "1"):
        transport.connect(quorums.store(0, name), 0, 1, 90.0, name)
    transport.abort()
    npu.log.clear()
    npu.num_busy_queries = 3
    transport.settle()
    transport.settle()
    assert npu.log == [
        "set 1",
        "record on stream of 1",
        "stop 1",
        "watchdog 0 2",
        "watchdog 1 2",
        "abort 0 for reinit",
        "abort 1 for reinit",
        "restart 1",
        "clear 0",
        "watchdog 0 1",
        "clear 1",
        "watchdog 1 1",
    ]
    assert not distributed_c10d._pg_map


def test_after_an_abort_the_same_native_group_meets_under_the_new_quorums_keys(
    npu: FakeNpu, transport: HcclTransport
) -> None:
    quorums = Quorums()
    first: Any = transport.connect(quorums.store(0), 0, 1, 90.0, "0")
    transport.abort()
    second: Any = transport.connect(quorums.store(1), 0, 1, 90.0, "0")
    assert second.native is first.native
    assert quorums.values["q0/0/0"] == quorums.values["q1/0/0"] == b"\xffid"
    assert npu.log.count("stop 1") == 1
    second.allreduce([torch.ones(1)]).wait()
    with pytest.raises(RuntimeError, match="aborted"):
        first.allreduce([torch.ones(1)])


def test_a_failed_collective_is_noticed_though_its_wait_does_not_raise(npu: FakeNpu, transport: HcclTransport) -> None:
    group: Any = transport.connect(Quorums().store(0), 0, 1, 90.0, "0")
    work = group.allreduce([torch.ones(1)])
    group.native.is_failing = True
    with pytest.raises(RuntimeError, match="native library"):
        work.wait()


def test_a_rank_whose_device_does_not_recover_must_be_replaced(
    npu: FakeNpu, transport: HcclTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.connect(Quorums().store(0), 0, 1, 90.0, "0")
    npu.stop_result = 507
    transport.abort()
    with pytest.raises(RuntimeError, match="stop_device returned 507; this rank must be replaced") as caught:
        transport.settle()
    assert not transport.is_peer_failure(caught.value)
    assert not distributed_c10d._pg_map
    monkeypatch.setattr(hccl, "_DRAIN_TIMEOUT_S", 0.01)
    npu.num_busy_queries = 1000
    with pytest.raises(RuntimeError, match=r"have not ended within 0\.01 s; this rank must be replaced"):
        transport.settle()


@pytest.mark.parametrize(
    ("text", "is_peer_failure"),
    [
        ("FORCE STOP.\n[ERROR] ... ERR00100 PTA call acl api failed", True),
        ("HCCL function error: hcclAllReduce, error code is 9 [ERROR] ... ERR02200 DIST call hccl api failed", True),
        ("[1] is setting up HCCL communicator and retrieving hcclUniqueId from [0] ... got error", True),
        ("HCCL AllReduce: Unsupported data type\n[ERROR] ... ERR02007 DIST feature not supported", False),
        ("Tensors must be NPU and dense\n[ERROR] ... ERR02001 DIST invalid parameter", False),
        ("shape '[2]' is invalid for input of size 3", False),
    ],
)  # fmt: skip
def test_errors_of_lost_peers_are_told_from_the_programs(
    transport: HcclTransport, text: str, is_peer_failure: bool
) -> None:
    assert transport.is_peer_failure(RuntimeError(text)) == is_peer_failure


def test_a_module_missing_inside_torch_npu_is_not_taken_for_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "torch_npu":
                raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ConfigurationError, match="yaml"):
        hccl.import_torch_npu()
