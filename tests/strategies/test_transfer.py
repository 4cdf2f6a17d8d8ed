"""State that a donor sends is the state that a newcomer has."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_flashrl.communicator.base import Transport
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies import memory
from lightning_flashrl.strategies.transfer import (
    Arrival,
    copy_tree,
    load_optimizer_tree,
    optimizer_tree,
    send_state,
)

CPU = torch.device("cpu")


class _Done:
    def wait(self) -> bool:
        return True


class _Wire:
    """A native group of two, as far as messages go: bytes in order, sizes must agree."""

    def __init__(self) -> None:
        self._messages: deque[tuple[int, bytes]] = deque()
        self.num_sent = 0

    def send(self, tensors: list[torch.Tensor], _: int, tag: int) -> _Done:
        (tensor,) = tensors
        assert tensor.is_contiguous()
        self._messages.append((tag, tensor.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()))
        self.num_sent += 1
        return _Done()

    def recv(self, tensors: list[torch.Tensor], _: int, tag: int) -> _Done:
        (tensor,) = tensors
        sent_tag, content = self._messages.popleft()
        assert (sent_tag, len(content)) == (tag, tensor.nbytes)
        assert tensor.is_contiguous()
        tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return _Done()

    @property
    def is_empty(self) -> bool:
        return not self._messages


def _over_the_wire(
    tree: Any, sent: list[torch.Tensor] | None = None, own: list[torch.Tensor] | None = None, version: int = 7
) -> Any:
    wire: Any = _Wire()
    send_state(wire, 1, version, sent or [], tree, CPU)
    arrival = Arrival(wire, 0, CPU)
    received = arrival.finish(own or [])
    assert wire.is_empty
    assert arrival.version == version
    return received


class _End:
    """One end of a wire between two threads."""

    def __init__(self, sends: Queue[bytes], receives: Queue[bytes]) -> None:
        self._sends, self._receives = sends, receives
        self.num_sent = 0

    def send(self, tensors: list[torch.Tensor], _: int, tag: int) -> _Done:
        self._sends.put(tensors[0].reshape(-1).view(torch.uint8).numpy().tobytes())
        self.num_sent += 1
        return _Done()

    def recv(self, tensors: list[torch.Tensor], _: int, tag: int) -> _Done:
        content = self._receives.get(timeout=10)
        tensors[0].view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return _Done()


def _from_memory(tree: Any, sent: list[torch.Tensor], own: list[torch.Tensor]) -> tuple[Any, int]:
    """Tree that arrived, and messages that the donor sent."""
    there, back = Queue[bytes](), Queue[bytes]()
    donor: Any = _End(there, back)
    newcomer: Any = _End(back, there)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_state, donor, 1, 7, sent, tree, CPU, reader_pid=os.getpid())
        received = Arrival(newcomer, 0, CPU).finish(own)
        sending.result(timeout=10)
    return received, donor.num_sent


_STATE = {"step": torch.tensor(3.0), "exp_avg": torch.randn(300, 7), "empty": torch.zeros(0)}
_SENT = [torch.randn(3, 2), torch.randn(4, 4).t(), torch.randn(0, 3), torch.randn(2, 3, 4, 4)]


def _own() -> list[torch.Tensor]:
    own = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in _SENT]
    own[3] = torch.nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    return list(own)


def test_on_one_host_the_donors_memory_is_read() -> None:
    own = _own()
    received, num_sent = _from_memory(_STATE, _SENT, own)
    assert _is_same(received, _STATE)
    assert all(torch.equal(mine.detach(), theirs) for mine, theirs in zip(own, _SENT, strict=True))
    assert num_sent == 2  # length and header


def test_where_memory_must_not_be_read_the_state_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(memory._libc, "process_vm_readv", refuse)
    own = _own()
    received, num_sent = _from_memory(_STATE, _SENT, own)
    assert _is_same(received, _STATE)
    assert all(torch.equal(mine.detach(), theirs) for mine, theirs in zip(own, _SENT, strict=True))
    assert num_sent == 2 + 2 + 3  # those that are not empty


def test_a_donor_that_is_gone_counts_as_a_lost_peer() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(ConnectionError, match="is gone") as caught:
        memory.read_tensors(ended.pid, [1 << 20], [torch.zeros(4)])
    assert any(sign in str(caught.value) for sign in Transport.peer_failure_signs)


def test_memory_of_another_process_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MAX_SPANS", 2)
    monkeypatch.setattr(memory, "_MAX_BYTES", 64)
    sent = [torch.randn(50), torch.zeros(0), torch.randn(7), torch.arange(33)]
    taken = [torch.empty_like(tensor) for tensor in sent]
    memory.read_tensors(os.getpid(), [tensor.data_ptr() for tensor in sent], taken)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(taken, sent, strict=True))


def _is_same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=False)
        return len(left) == len(right) and all(_is_same(k, m) and _is_same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(_is_same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


_KEYS = st.one_of(
    st.integers(-(2**31), 2**31), st.text(max_size=3), st.booleans(), st.none(), st.just("\0"), st.just("\1")
)
_TENSORS = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.complex64]),
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    _TENSORS,
)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(_KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(_TREES)
def test_a_tree_arrives_as_it_was_sent(tree: Any) -> None:
    assert _is_same(_over_the_wire(tree), tree)


@given(_TREES)
def test_a_copied_tree_is_the_same_and_shares_no_tensor(tree: Any) -> None:
    copy = copy_tree(tree)
    assert _is_same(copy, tree)
    addresses = {t.data_ptr() for t in _tensors(tree) if t.numel()}
    assert not addresses & {t.data_ptr() for t in _tensors(copy) if t.numel()}


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in _tensors(value)]
    return [t for value in tree for t in _tensors(value)] if isinstance(tree, (list, tuple)) else []


def test_not_a_number_arrives() -> None:
    received = _over_the_wire({"loss": float("nan"), "tensor": torch.tensor([float("nan"), -0.0])})
    assert math.isnan(received["loss"])
    assert received["tensor"].isnan().tolist() == [True, False]
    assert math.copysign(1, received["tensor"][1]) == -1


def test_parameters_are_received_where_they_are() -> None:
    sent = [torch.randn(3, 2), torch.randn(4, 4).t(), torch.randn(0, 3), torch.randn(2, 3, 4, 4)]
    own = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in sent]
    own[3] = torch.nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    addresses = [parameter.data_ptr() for parameter in own]
    received = _over_the_wire({"step": torch.tensor(3.0)}, sent, list(own))
    assert received["step"].item() == 3
    for parameter, original, address in zip(own, sent, addresses, strict=True):
        assert torch.equal(parameter.detach(), original)
        assert parameter.data_ptr() == address
        assert parameter.requires_grad


def test_the_bytes_sent_are_told() -> None:
    wire: Any = _Wire()
    size = send_state(wire, 1, 1, [torch.zeros(10)], {"exp_avg": torch.zeros(5)}, CPU)
    assert size == 60
    assert wire.num_sent == 4  # length, header, two tensors


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has 1 parameters, this replacement built 2"):
        _over_the_wire({}, [torch.zeros(2)], [torch.zeros(2), torch.zeros(2)])
    with pytest.raises(ConfigurationError, match=r"parameter 0 is float32 \(2,\) at the donor and float32 \(3,\)"):
        _over_the_wire({}, [torch.zeros(2)], [torch.zeros(3)])


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(ConfigurationError, match="holds a set"):
        _over_the_wire({"seen": {1, 2}})


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, history_size=3),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    ],
    ids=["adamw", "sgd", "lbfgs", "adagrad"],
)
def test_an_optimizer_goes_on_with_the_state_of_the_donors(make: Any) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1, bias=False)) for _ in range(2)]
    optimizers = [make(list(model.parameters())) for model in models]
    inputs = torch.randn(8, 3)
    for _ in range(3):
        _step(models[0], optimizers[0], inputs)
    tree = {"optimizers": optimizer_tree([optimizers[0]], models[0])}
    received = _over_the_wire(tree, list(models[0].parameters()), list(models[1].parameters()))
    load_optimizer_tree([optimizers[1]], received["optimizers"], models[1])
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            _step(model, optimizer, inputs)
    assert _is_same([p.detach() for p in models[0].parameters()], [p.detach() for p in models[1].parameters()])
    assert _is_same(optimizer_tree([optimizers[0]], models[0]), optimizer_tree([optimizers[1]], models[1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device beside the host")
def test_what_a_donor_keeps_in_host_memory_stays_there() -> None:
    wire: Any = _Wire()
    tree = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, device="cuda")}
    send_state(wire, 1, 7, [], tree, torch.device("cuda", 0))
    received = Arrival(wire, 0, torch.device("cuda", 0)).finish([])
    assert (received["step"].device.type, received["exp_avg"].device.type) == ("cpu", "cuda")
    assert _is_same(received, tree)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def test_state_of_parameters_that_were_never_stepped_stays_away() -> None:
    stepped, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.Adam([{"params": [frozen]}, {"params": [stepped]}])
    stepped.grad = torch.ones(2)
    theirs.step()
    alone = torch.nn.Module()  # the parameters are nobody's
    assert list(optimizer_tree([theirs], alone)[0]) == [1]
    ours = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [ours[0]]}, {"params": [ours[1]]}])
    load_optimizer_tree([optimizer], _over_the_wire(optimizer_tree([theirs], alone)), alone)
    assert ours[0] not in optimizer.state
    assert _is_same(dict(optimizer.state[ours[1]]), dict(theirs.state[stepped]))


def test_state_of_a_group_that_was_added_in_training_is_there_before_the_group() -> None:
    theirs, ours = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)) for _ in range(2))
    optimizers = [torch.optim.Adam(model[1].parameters()) for model in (theirs, ours)]
    optimizers[0].add_param_group({"params": list(theirs[0].parameters())})
    _step(theirs, optimizers[0], torch.ones(4, 2))
    load_optimizer_tree([optimizers[1]], _over_the_wire(optimizer_tree([optimizers[0]], theirs)), ours)
    assert _is_same(dict(optimizers[1].state[ours[0].weight]), dict(optimizers[0].state[theirs[0].weight]))
