"""What each collective reads and writes: enough to issue it again with the inputs it had the first time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import Backend, Work

Nested = Any
"""A tensor, a list of tensors or a list of lists of tensors."""

TRANSFERS = frozenset({"recv", "recv_anysource", "send"})
"""Methods of a native group that take part in no numbered call."""
COLLECTIVES = frozenset(
    {
        "_allgather_base",
        "_reduce_scatter_base",
        "all_gather_single",
        "all_to_all_single",
        "allgather",
        "allgather_coalesced",
        "allreduce",
        "allreduce_coalesced",
        "alltoall",
        "alltoall_base",
        "barrier",
        "broadcast",
        "gather",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "scatter",
    }
)
"""Methods of a native group that give a handle of work all members take part in."""


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], nested: Nested) -> Nested:
    """Apply ``function`` to each tensor of a nested list."""
    if isinstance(nested, torch.Tensor):
        return function(nested)
    return [map_tensors(function, item) for item in nested]


def flatten(nested: Nested) -> list[torch.Tensor]:
    """All tensors of a nested list, in order."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for item in nested for tensor in flatten(item)]


class BufferPool:
    """Reuses the memory of saved inputs: each step needs the same sizes again."""

    def __init__(self, max_bytes: int = 1 << 33) -> None:
        self._free: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self._max_bytes = max_bytes
        self._bytes = 0

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy ``tensor`` into a buffer of the pool."""
        if tensor.layout is not torch.strided:  # a sparse gradient has another size each time
            return tensor.detach().clone()
        free = self._free.get((tensor.shape, tensor.dtype, tensor.device))
        if free:
            buffer = free.pop()
            self._bytes -= buffer.nbytes
        else:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return buffer.copy_(tensor.detach())

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer that :meth:`save` handed out and nobody needs any more."""
        if buffer.layout is not torch.strided:
            return
        if self._bytes + buffer.nbytes <= self._max_bytes:
            self._free.setdefault((buffer.shape, buffer.dtype, buffer.device), []).append(buffer)
            self._bytes += buffer.nbytes


@dataclass(slots=True)
class Collective:
    """One call of a collective.

    Attributes:
        name: method of the native backend.
        results: tensors the call writes (the same as ``inputs`` for in-place collectives).
        inputs: tensors the call reads; empty where this rank contributes nothing.
        options: remaining arguments, passed on as they are.
        is_in_place: whether inputs are overwritten with results.
        is_stable: the inputs do not change before the next commit, so they are kept by reference.
        saved: copies of the inputs, made by :meth:`save`.
    """

    name: str
    results: Nested
    inputs: Nested
    options: tuple[Any, ...]
    is_in_place: bool
    is_stable: bool = False
    saved: Nested = field(default_factory=list)
    borrowed: list[torch.Tensor] = field(default_factory=list)

    def save(self, pool: BufferPool) -> None:
        """Keep the inputs, which the program may overwrite once the call has returned."""
        if self.is_stable:
            self.saved = self.inputs
            return

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            copy = pool.save(tensor)
            self.borrowed.append(copy)
            return copy

        self.saved = map_tensors(keep, self.inputs)

    def forget(self, pool: BufferPool) -> None:
        """Return the memory of the saved inputs."""
        for buffer in self.borrowed:
            pool.give_back(buffer)
        self.borrowed = []
        self.saved = []

    def issue(self, backend: Backend) -> Work:
        """Start the call on the program's own tensors."""
        return self._call(backend, self.results, self.inputs)

    def issue_again(self, backend: Backend) -> Work:
        """Start a call that did not finish once more: same inputs, results to the program's tensors."""
        if self.is_in_place and not self.is_stable:
            with torch.no_grad():
                for tensor, copy in zip(flatten(self.inputs), flatten(self.saved), strict=True):
                    tensor.copy_(copy)
            return self._call(backend, self.results, self.results)
        return self._call(backend, self.results, self.results if self.is_in_place else self.saved)

    def contribute_again(self, backend: Backend) -> Work:
        """Start a finished call once more for a newcomer's sake; the results go nowhere."""
        if self.is_in_place:
            if flatten(self.inputs):
                scratch = map_tensors(torch.clone, self.saved)
            else:
                scratch = map_tensors(torch.empty_like, self.results)
            return self._call(backend, scratch, scratch)
        return self._call(backend, map_tensors(torch.empty_like, self.results), self.saved)

    def _call(self, backend: Backend, results: Nested, inputs: Nested) -> Work:
        method: Callable[..., Work] = getattr(backend, self.name)
        if self.name == "barrier":
            return method(*self.options)
        if self.is_in_place:
            return method(results, *self.options)
        return method(results, inputs, *self.options)
