"""Replicated state from a donor to a newcomer, tensor by tensor, over the native group that has just been formed.

A header says which tensors follow; it is msgpack, never pickle. The donor sends its own tensors, the newcomer receives
into its own: neither holds a second copy of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import torch
from torch._C._distributed_c10d import Backend

from lightning_flashrl.errors import ConfigurationError

_HEADER_TAG = 1_000_001
_TENSOR_TAG = 1_000_002
NUM_IN_FLIGHT = 16
"""Tensors under way at once: a round trip for each would cost more than the bytes of small ones."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Type and shape of a tensor that follows."""

    dtype: str
    shape: list[int]
    is_on_host: bool = False
    """Kept in host memory whatever the device is, as step counts of optimizers are."""


class Header(msgspec.Struct, frozen=True):
    r"""What a donor is about to send.

    Attributes:
        version: optimizer updates the state contains.
        tree: the state with each tensor replaced by ``{"\0": index}``.
        tensors: the tensors, in order.
    """

    version: int
    tree: Any
    tensors: list[TensorSpec]


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
        self._under_way: deque[tuple[Any, torch.Tensor, torch.Tensor | None]] = deque()

    def add(self, buffer: torch.Tensor, target: torch.Tensor | None = None) -> None:
        """Start with ``buffer``; once it has arrived, copy it to ``target``."""
        if len(self._under_way) == NUM_IN_FLIGHT:
            self._finish_oldest()
        self._under_way.append((self._transfer([buffer], self._peer, _TENSOR_TAG), buffer, target))

    def finish(self) -> None:
        """Wait for all."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, buffer, target = self._under_way.popleft()
        work.wait()
        if target is not None:
            with torch.no_grad():
                target.copy_(buffer)


def _transmit(backend: Backend, tensor: torch.Tensor, peer: int, tag: int) -> None:
    backend.send([tensor], peer, tag).wait()  # type: ignore[attr-defined]


def _take(backend: Backend, tensor: torch.Tensor, peer: int, tag: int) -> None:
    backend.recv([tensor], peer, tag).wait()  # type: ignore[attr-defined]


def send_state(
    backend: Backend, newcomer: int, version: int, parameters: Iterable[torch.Tensor], tree: Any, device: torch.device
) -> int:
    """Send parameters and a tree of further state.

    Returns:
        bytes sent.

    Raises:
        RuntimeError: the newcomer was lost meanwhile.
    """
    tensors: list[torch.Tensor] = []
    stripped = _strip(tree, tensors)
    tensors = [p.detach() for p in parameters] + tensors
    num_parameters = len(tensors) - _count(stripped)
    header = Header(
        version,
        [num_parameters, stripped],
        [TensorSpec(str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type == "cpu") for t in tensors],
    )
    encoded = msgspec.msgpack.encode(header)
    content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    _transmit(backend, torch.tensor([len(encoded)]).to(device), newcomer, _HEADER_TAG)
    _transmit(backend, content.to(device), newcomer, _HEADER_TAG)
    pipeline = _Pipeline(backend.send, newcomer)  # type: ignore[attr-defined]
    for tensor in tensors:
        if tensor.numel():
            pipeline.add(tensor.to(device).contiguous())
    pipeline.finish()
    return len(encoded) + sum(t.nbytes for t in tensors)


def _count(tree: Any) -> int:
    if isinstance(tree, dict):
        if "\0" in tree:
            return 1
        return sum(_count(v) for v in tree.values())
    if isinstance(tree, list):
        return sum(_count(v) for v in tree)
    return 0


def receive_state(
    backend: Backend, donor: int, parameters: Sequence[torch.Tensor], device: torch.device
) -> tuple[int, Any]:
    """Receive into ``parameters`` and return (version, tree of further state).

    Raises:
        RuntimeError: the donor was lost meanwhile, or its model has other parameters.
    """
    length = torch.zeros(1, dtype=torch.int64, device=device)
    _take(backend, length, donor, _HEADER_TAG)
    content = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    _take(backend, content, donor, _HEADER_TAG)
    header = msgspec.msgpack.decode(content.cpu().numpy().tobytes(), type=Header)
    num_parameters, tree = header.tree
    if num_parameters != len(parameters):
        raise ConfigurationError(
            f"the donor's model has {num_parameters} parameters, this replacement built {len(parameters)}; "
            "build the same model at every start"
        )
    received: list[torch.Tensor] = []
    pipeline = _Pipeline(backend.recv, donor)  # type: ignore[attr-defined]
    for index, spec in enumerate(header.tensors):
        if index < num_parameters:
            target = parameters[index].detach()
            if list(target.shape) != spec.shape or target.dtype != getattr(torch, spec.dtype):
                raise ConfigurationError(
                    f"parameter {index} is {spec.dtype} {tuple(spec.shape)} at the donor and "
                    f"{str(target.dtype).removeprefix('torch.')} {tuple(target.shape)} here; "
                    "build the same model at every start"
                )
        else:
            target = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
        if target.numel() and target.is_contiguous() and target.device == device:
            pipeline.add(target)
        elif target.numel():
            pipeline.add(torch.empty_like(target, device=device, memory_format=torch.contiguous_format), target)
        received.append(target)
    pipeline.finish()
    for index, spec in enumerate(header.tensors):
        if index >= num_parameters and spec.is_on_host:
            received[index] = received[index].cpu()
    return header.version, _restore(tree, received[num_parameters:])


def optimizer_tree(optimizers: Iterable[torch.optim.Optimizer]) -> list[dict[int, Any]]:
    """State of each optimizer, by position of the parameter in its groups."""
    trees: list[dict[int, Any]] = []
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        trees.append({i: dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state})
    return trees


def load_optimizer_tree(optimizers: Iterable[torch.optim.Optimizer], trees: list[dict[int, Any]]) -> None:
    """Inverse of :func:`optimizer_tree`."""
    for optimizer, tree in zip(optimizers, trees, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.state.clear()
        for index, state in tree.items():
            optimizer.state[parameters[index]] = state


def copy_tree(tree: Any) -> Any:
    """The same tree with every tensor copied."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copy_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copy_tree(value) for value in tree)
    return tree
