"""Replicated state from a donor to a newcomer, tensor by tensor, over the native group that has just been formed.

A header says which tensors there are; it is msgpack, never pickle. On one host the newcomer reads them out of the
donor's memory and then says that it has them; elsewhere, or where that is forbidden, the donor sends them. The donor
gives its own tensors, the newcomer takes them into its own: neither holds a second copy of the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import torch
from torch._C._distributed_c10d import Backend

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies import memory

_HEADER_TAG = 1_000_001
_TENSOR_TAG = 1_000_002
_ANSWER_TAG = 1_000_003
NUM_IN_FLIGHT = 16
"""Tensors under way at once: a round trip for each would cost more than the bytes of small ones."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Type and shape of a tensor that follows."""

    dtype: str
    shape: list[int]
    is_on_host: bool = False
    """Kept in host memory whatever the device is, as step counts of optimizers are."""


class Header(msgspec.Struct, frozen=True):
    r"""What a donor is about to give.

    Attributes:
        version: optimizer updates the state contains.
        tree: the state besides parameters, with each tensor replaced by ``{"\0": index}``.
        tensors: those of the tree, then the parameters, in order.
        num_parameters: how many of the last tensors are parameters.
        pid: of the donor, if the newcomer may try to read its memory; 0 otherwise.
        addresses: of the tensors in the donor's memory.
    """

    version: int
    tree: Any
    tensors: list[TensorSpec]
    num_parameters: int
    pid: int = 0
    addresses: list[int] = []


def _strip(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        return {"\0": len(tensors) - 1}
    if isinstance(value, dict):
        return {"\1": [[_strip(k, tensors), _strip(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"\2": [_strip(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_strip(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise ConfigurationError(
        f"optimizer state holds a {type(value).__name__}, which cannot be sent to a replacement; "
        "keep tensors, numbers, strings, lists and dicts in it"
    )


def _restore(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "\0" in value:
            return tensors[value["\0"]]
        if "\2" in value:
            return tuple(_restore(v, tensors) for v in value["\2"])
        return {_restore(k, tensors): _restore(v, tensors) for k, v in value["\1"]}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value


class _Pipeline:
    """Sends or receives tensors in order, several at once.

    Args:
        transfer: starts the transfer of one tensor, given (tensors, peer, tag).
        peer: rank at the other end.
    """

    def __init__(self, transfer: Callable[[list[torch.Tensor], int, int], Any], peer: int) -> None:
        self._transfer = transfer
        self._peer = peer
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def add(self, tensor: torch.Tensor) -> None:
        """Start with ``tensor``, which is contiguous and on the backend's device."""
        if len(self._under_way) == NUM_IN_FLIGHT:
            self._finish_oldest()
        self._under_way.append((self._transfer([tensor], self._peer, _TENSOR_TAG), tensor))

    def finish(self) -> None:
        """Wait for all."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, _ = self._under_way.popleft()
        work.wait()


def _transmit(backend: Backend, tensor: torch.Tensor, peer: int, tag: int) -> None:
    backend.send([tensor], peer, tag).wait()  # type: ignore[attr-defined]


def _take(backend: Backend, tensor: torch.Tensor, peer: int, tag: int) -> None:
    backend.recv([tensor], peer, tag).wait()  # type: ignore[attr-defined]


def send_state(
    backend: Backend,
    newcomer: int,
    version: int,
    parameters: Iterable[torch.Tensor],
    tree: Any,
    device: torch.device,
    *,
    reader_pid: int = 0,
) -> int:
    """Give parameters and a tree of further state. Returns when the newcomer has all.

    Args:
        backend: of the group that both are in.
        newcomer: its rank in the group.
        version: optimizer updates the state contains.
        parameters: of the model.
        tree: further state.
        device: on which the backend works.
        reader_pid: the newcomer's process, if it is one of this host and may read this process's memory.

    Returns:
        bytes given.

    Raises:
        RuntimeError: the newcomer was lost meanwhile.
    """
    tensors: list[torch.Tensor] = []
    stripped = _strip(tree, tensors)
    num_parameters = -len(tensors)
    tensors += [parameter.detach() for parameter in parameters]
    num_parameters += len(tensors)
    specs = [TensorSpec(str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type == "cpu") for t in tensors]
    if reader_pid:
        tensors = [tensor.contiguous() for tensor in tensors]
        addresses = [tensor.data_ptr() for tensor in tensors]
        with memory.readable_by(reader_pid):
            _send_header(
                backend, newcomer, Header(version, stripped, specs, num_parameters, os.getpid(), addresses), device
            )
            is_taken = _hear_whether_taken(backend, newcomer)
    else:
        _send_header(backend, newcomer, Header(version, stripped, specs, num_parameters), device)
        is_taken = False
    if not is_taken:
        pipeline = _Pipeline(backend.send, newcomer)  # type: ignore[attr-defined]
        for tensor in tensors:
            if tensor.numel():
                pipeline.add(tensor.to(device).contiguous())
        pipeline.finish()
    return sum(tensor.nbytes for tensor in tensors)


def _send_header(backend: Backend, newcomer: int, header: Header, device: torch.device) -> None:
    encoded = msgspec.msgpack.encode(header)
    content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    _transmit(backend, torch.tensor([len(encoded)]).to(device), newcomer, _HEADER_TAG)
    _transmit(backend, content.to(device), newcomer, _HEADER_TAG)


def _receive_header(backend: Backend, donor: int, device: torch.device) -> Header:
    length = torch.zeros(1, dtype=torch.int64, device=device)
    _take(backend, length, donor, _HEADER_TAG)
    content = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    _take(backend, content, donor, _HEADER_TAG)
    return msgspec.msgpack.decode(content.cpu().numpy().tobytes(), type=Header)


def _hear_whether_taken(backend: Backend, newcomer: int) -> bool:
    answer = torch.zeros(1, dtype=torch.int64)
    _take(backend, answer, newcomer, _ANSWER_TAG)
    return bool(answer.item())


def _say_whether_taken(backend: Backend, donor: int, is_taken: bool) -> None:
    _transmit(backend, torch.tensor([int(is_taken)]), donor, _ANSWER_TAG)


class Arrival:
    """A donor's state on its way to a newcomer.

    The tree (two thirds of the bytes with Adam) is taken at once, into tensors that become the optimizers'. Parameters
    are taken by :meth:`finish`, when there is a model to take them.

    Args:
        backend: of the group that both are in.
        donor: its rank in the group.
        device: on which the backend works.

    Raises:
        RuntimeError: the donor was lost meanwhile.
    """

    def __init__(self, backend: Backend, donor: int, device: torch.device) -> None:
        self._backend = backend
        self._donor = donor
        self._device = device
        self._pipeline = _Pipeline(backend.recv, donor)  # type: ignore[attr-defined]
        self._header = header = _receive_header(backend, donor, device)
        self._is_read = header.pid != 0
        self._num_in_tree = len(header.tensors) - header.num_parameters
        self._tensors = [
            torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            for spec in header.tensors[: self._num_in_tree]
        ]
        try:
            self._take(self._tensors, header.addresses[: self._num_in_tree])
        except memory.ForeignMemoryError:
            _say_whether_taken(backend, donor, is_taken=False)
            self._is_read = False
            self._take(self._tensors, [])

    @property
    def version(self) -> int:
        """Optimizer updates the state contains."""
        return self._header.version

    def finish(self, parameters: Sequence[torch.Tensor]) -> Any:
        """Take the parameters, into those of the newcomer's model; return the tree.

        Args:
            parameters: overwritten in place.

        Raises:
            ConfigurationError: the donor's model has other parameters.
            RuntimeError: the donor was lost meanwhile.
        """
        header = self._header
        if header.num_parameters != len(parameters):
            raise ConfigurationError(
                f"the donor's model has {header.num_parameters} parameters, this replacement built {len(parameters)}; "
                "build the same model at every start"
            )
        for index, (parameter, spec) in enumerate(zip(parameters, header.tensors[self._num_in_tree :], strict=True)):
            if list(parameter.shape) != spec.shape or parameter.dtype != getattr(torch, spec.dtype):
                raise ConfigurationError(
                    f"parameter {index} is {spec.dtype} {tuple(spec.shape)} at the donor and "
                    f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)} here; "
                    "build the same model at every start"
                )
        self._take([parameter.detach() for parameter in parameters], header.addresses[self._num_in_tree :])
        if self._is_read:
            _say_whether_taken(self._backend, self._donor, is_taken=True)
        tensors = [
            tensor.cpu() if spec.is_on_host else tensor
            for tensor, spec in zip(self._tensors, header.tensors, strict=False)
        ]
        return _restore(header.tree, tensors)

    def _take(self, targets: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        buffers = [
            target
            if target.is_contiguous() and target.device == self._device
            else torch.empty_like(target, device=self._device, memory_format=torch.contiguous_format)
            for target in targets
        ]
        if self._is_read:
            try:
                memory.read_tensors(self._header.pid, addresses, buffers)
            except ConnectionError as error:
                raise RuntimeError(str(error)) from error
        else:
            for buffer in buffers:
                if buffer.numel():
                    self._pipeline.add(buffer)
            self._pipeline.finish()
        with torch.no_grad():
            for target, buffer in zip(targets, buffers, strict=True):
                if buffer is not target:
                    target.copy_(buffer)


def _keyed_parameters(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module
) -> list[tuple[int | str, torch.nn.Parameter]]:
    """Parameters of an optimizer: the module's by name, as groups may be added in training; others by position."""
    names = {id(p): name for name, p in module.named_parameters()}
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(names.get(id(p), index), p) for index, p in enumerate(parameters)]


def optimizer_tree(optimizers: Iterable[torch.optim.Optimizer], module: torch.nn.Module) -> list[dict[int | str, Any]]:
    """State of each optimizer, by name of the parameter in the module, or by its position in the groups."""
    return [
        {key: dict(optimizer.state[p]) for key, p in _keyed_parameters(optimizer, module) if p in optimizer.state}
        for optimizer in optimizers
    ]


def load_optimizer_tree(
    optimizers: Iterable[torch.optim.Optimizer],
    trees: list[dict[int | str, Any]],
    module: torch.nn.Module,
) -> None:
    """Inverse of :func:`optimizer_tree`; a parameter may belong to a group that this optimizer has yet to get."""
    named = dict(module.named_parameters())
    for optimizer, tree in zip(optimizers, trees, strict=True):
        parameters: dict[int | str, torch.nn.Parameter] = dict(_keyed_parameters(optimizer, module))
        optimizer.state.clear()
        for key, state in tree.items():
            optimizer.state[named[key] if isinstance(key, str) else parameters[key]] = state


def copy_tree(tree: Any) -> Any:
    """The same tree with every tensor copied."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copy_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copy_tree(value) for value in tree)
    return tree
