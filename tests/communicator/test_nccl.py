from __future__ import annotations

import ast
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore

from lightning_flashrl.communicator import NcclTransport, make_transport, nccl
from lightning_flashrl.errors import ConfigurationError


class StandIn:
    """A ``ProcessGroupNCCL`` whose aborts end when ``may_abort`` is set."""

    made: list[StandIn]
    may_abort: threading.Event

    class Options(SimpleNamespace):
        pass

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.options = options
        self.rank_and_size = (rank, size)
        self.device: torch.device | None = None
        self.is_aborting = threading.Event()
        self.abort_error: RuntimeError | None = None
        type(self).made.append(self)

    def eager_connect_single_device(self, device: torch.device) -> None:
        self.device = device

    def abort(self) -> None:
        self.is_aborting.set()
        self.may_abort.wait(10)
        if self.abort_error is not None:
            raise self.abort_error


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    StandIn.made = []
    StandIn.may_abort = threading.Event()
    monkeypatch.setattr(_distributed_c10d, "ProcessGroupNCCL", StandIn, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in nccl._DEFAULT_ON:
        monkeypatch.setenv(name, "0")
    return StandIn


def test_without_nccl_the_remedy_is_named() -> None:
    if hasattr(_distributed_c10d, "ProcessGroupNCCL"):
        pytest.skip("this torch has nccl")
    with pytest.raises(ConfigurationError, match="install a CUDA build of torch"):
        make_transport("nccl")


def test_without_a_gpu_the_remedy_is_named(native: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES"):
        make_transport("nccl")


@pytest.mark.parametrize(
    ("name", "value"),
    [("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"), ("TORCH_NCCL_DESYNC_DEBUG", "1"), ("TORCH_DISTRIBUTED_DEBUG", "detail")],
)
def test_variables_that_would_end_a_survivor_are_refused(
    native: type[StandIn], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="would end a survivor"):
        make_transport("nccl")


def test_connect_opens_the_communicator_on_the_device(native: type[StandIn]) -> None:
    group: Any = make_transport("nccl").connect(HashStore(), 0, 1, 90.0, "0")
    assert native.made == [group.native]
    assert group.native.device == torch.device("cuda", 1)
    assert group.native.options._timeout == timedelta(seconds=90)
    assert group.native.options.group_name == "0"
    assert not group.native.options.is_high_priority_stream


def test_all_groups_are_aborted_at_once_and_the_next_connect_waits_for_it(native: type[StandIn]) -> None:
    transport = NcclTransport(torch.device("cuda", 0))
    groups: list[Any] = [transport.connect(HashStore(), 0, 1, 90.0, name) for name in "01"]
    transport.abort()
    assert all(group.native.is_aborting.wait(5) for group in groups)
    settling = threading.Thread(target=transport.settle, name="settling")
    settling.start()
    settling.join(0.05)
    assert settling.is_alive()
    native.may_abort.set()
    settling.join(5)
    assert not settling.is_alive()
    transport.abort()
    assert len(native.made) == 2, "groups of an earlier abort are forgotten"


def test_a_rank_whose_abort_fails_or_hangs_must_be_replaced(
    native: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl, "_SETTLE_TIMEOUT_S", 0.05)
    transport = make_transport("nccl")
    transport.connect(HashStore(), 0, 1, 90.0, "0")
    transport.abort()
    with pytest.raises(RuntimeError, match=r"in 0\.05 s; this rank must be replaced") as hung:
        transport.connect(HashStore(), 0, 1, 90.0, "0")
    native.made[0].abort_error = RuntimeError("unhandled cuda error")
    native.may_abort.set()
    monkeypatch.setattr(nccl, "_SETTLE_TIMEOUT_S", 5.0)
    with pytest.raises(RuntimeError, match="unhandled cuda error; this rank must be replaced"):
        transport.settle()
    assert not transport.is_peer_failure(hung.value)


@pytest.mark.parametrize(
    ("text", "is_peer_failure"),
    [
        ("NCCL error ... remote process exited or there was a network error\nncclRemoteError: A call failed", True),
        ("NCCL error: unhandled system error, NCCL version 2.27\nncclSystemError: System call failed", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600000 ms", True),
        ("NCCL error ... invalid usage\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.", False),
        ("NCCL error ... invalid argument\nncclInvalidArgument: Invalid value for an argument.", False),
        ("NCCL error: unhandled cuda error", False),
        ("Tensors must be CUDA and dense", False),
        ("Invalid input tensor shape (2 vs 3)", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
    ],
)
def test_errors_of_lost_peers_are_told_from_the_programs(
    native: type[StandIn], text: str, is_peer_failure: bool
) -> None:
    assert make_transport("nccl").is_peer_failure(RuntimeError(text)) == is_peer_failure


def test_torch_declares_what_is_used_of_it() -> None:
    declared = ast.parse((Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi").read_text())
    classes = {node.name: node for node in declared.body if isinstance(node, ast.ClassDef)}
    backend, group = classes["Backend"], classes["ProcessGroupNCCL"]
    methods = {node.name for owner in (backend, group) for node in owner.body if isinstance(node, ast.FunctionDef)}
    assert methods >= {"abort", "eager_connect_single_device"}
    constructor = next(node for node in group.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert [argument.arg for argument in constructor.args.args] == ["self", "store", "rank", "size", "options"]
    options = [
        node
        for owner in (backend, group)
        for node in owner.body
        if isinstance(node, ast.ClassDef) and node.name == "Options"
    ]
    names = {ast.unparse(item.target) for node in options for item in node.body if isinstance(item, ast.AnnAssign)}
    names |= {item.name for node in options for item in node.body if isinstance(item, ast.FunctionDef)}
    assert names >= {"_timeout", "is_high_priority_stream", "group_name"}
