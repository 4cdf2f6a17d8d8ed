"""The gradient buckets of DDP: a newcomer must reduce in the survivors' layout, or the last bit differs.

DDP starts with buckets in parameter order and rebuilds them after the first backward in the order in which gradients
arrived. Ring all-reduce adds in an order that depends on an element's place in its bucket. Survivors keep their
reducer; a newcomer's reducer is led through the backward passes it missed, alone, and told the survivors' layout where
it would ask rank 0. A static graph learns in its first pass which gradients there are, and their order in its second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_flashrl.communicator.holding import HoldingProcessGroup
from lightning_flashrl.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Layout:
    """How far a reducer is.

    Attributes:
        num_passes: backward passes it has led, as far as that matters.
        order: parameter indices in the order in which gradients arrived; one that arrived twice stands there twice.
        buckets: parameter indices in reduction order, e.g. ``"3 2, 1 0"``; empty while they are not rebuilt.
        used: of a static graph, for each parameter whether any rank uses it.
    """

    num_passes: int = 0
    order: tuple[int, ...] = ()
    buckets: str = ""
    used: tuple[int, ...] = ()

    @property
    def is_settled(self) -> bool:
        """Whether it will not change any more."""
        return bool(self.buckets)


class LayoutReader:
    """Reads the layout of a reducer until it is settled.

    Args:
        ddp: just built.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp
        self._arrived: list[int] = []
        self._handles: list[RemovableHandle] = []
        self.layout = Layout()
        if ddp.static_graph:  # tells nobody what arrived in its first pass
            for index, parameter in enumerate(_parameters(ddp)):
                hook = self._make_hook(index)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def _make_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        return lambda _: self._arrived.append(index)

    def read(self) -> Layout:
        """Return what is known now. For the program's thread, outside the backward pass."""
        if self.layout.is_settled or not _rebuilds(self._ddp):
            return self.layout
        num_passes, order, buckets = _told_by(self._ddp)
        used = self._ddp.reducer._get_local_used_map().tolist() if self._ddp.static_graph and num_passes else ()
        self.layout = Layout(num_passes, order or tuple(self._arrived), buckets, tuple(used))
        if num_passes:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
        return self.layout

    def adopt(self, layout: Layout) -> None:
        """Bring the fresh reducer to where the predecessor's was.

        Raises:
            ConfigurationError: the reducer did not take it (its parameters differ).
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.layout = layout
        if layout.num_passes and layout.order and _rebuilds(self._ddp):  # passes within `no_sync` leave no order
            _lead_through(self._ddp, layout)


def _rebuilds(ddp: DistributedDataParallel) -> bool:
    return ddp.static_graph or not ddp.find_unused_parameters


def _parameters(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    return [parameter for parameter in ddp.module.parameters() if parameter.requires_grad]


def _told_by(ddp: DistributedDataParallel) -> tuple[int, tuple[int, ...], str]:
    """The reducer keeps its lock while it waits for a collective, so this must not run beside a backward pass."""
    assert ddp.logger is not None
    ddp.logger.set_runtime_stats_and_log()
    told = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    order = (told.get("prev_iteration_grad_ready_order_indices") or "").replace(",", " ").split()
    return told.get("iteration") or 0, tuple(map(int, order)), told.get("rebuilt_per_bucket_param_indices") or ""


def _lead_through(ddp: DistributedDataParallel, layout: Layout) -> None:
    group = ddp.process_group
    assert isinstance(group, HoldingProcessGroup)
    buckets = [[int(index) for index in bucket.split()] for bucket in layout.buckets.split(",") if bucket]
    indices = torch.tensor([index for bucket in buckets for index in bucket] + [len(buckets)], dtype=torch.int32)
    sizes = torch.tensor([len(bucket) for bucket in buckets], dtype=torch.int32)
    answers = [indices, sizes]

    def answer(name: str, tensors: list[torch.Tensor]) -> None:
        if name == "allreduce" and tensors[0].dtype == torch.int32:
            tensors[0].copy_(torch.tensor(layout.used, dtype=torch.int32))
        if name == "broadcast" and answers and tensors[0].dtype == torch.int32 and tensors[0].shape == answers[0].shape:
            tensors[0].copy_(answers.pop(0))

    with group.alone(answer):
        if ddp.static_graph:
            _first_pass_of_static_graph(ddp, layout.order)
        if layout.num_passes > 1 or not ddp.static_graph:
            _pass(ddp, layout.order)
        for parameter in _parameters(ddp):
            parameter.grad = None
        if buckets:
            assert ddp.reducer is not None
            ddp.reducer._rebuild_buckets()
    if buckets and _told_by(ddp)[2] != layout.buckets:
        raise ConfigurationError(
            "the replacement's model has other gradient buckets; build the same model at every start"
        )


def _begin_pass(ddp: DistributedDataParallel) -> None:
    ddp.reducer.prepare_for_forward()
    ddp.reducer.prepare_for_backward([])


def _first_pass_of_static_graph(ddp: DistributedDataParallel, order: tuple[int, ...]) -> None:
    """It counts how often each gradient arrives, notes who is used, and reduces all at its end."""
    _begin_pass(ddp)
    _arrive(ddp, order)
    ddp.reducer._delay_all_reduce()  # type: ignore[attr-defined]
    ddp._static_graph_delay_allreduce_enqueued = True


def _pass(ddp: DistributedDataParallel, order: tuple[int, ...]) -> None:
    _begin_pass(ddp)
    _arrive(ddp, order)


def _arrive(ddp: DistributedDataParallel, order: tuple[int, ...]) -> None:
    """Let gradients, all zero, arrive in ``order``.

    Only the last arrival goes through autograd, which the reducer wants to be told of the end by; a parameter without
    gradient counts as zero, so the others cost no arithmetic.
    """
    parameters, sparse = _parameters(ddp), _with_sparse_gradients(ddp)
    for index in order[:-1]:
        if id(parameters[index]) in sparse:  # the reducer wants one to be there
            parameters[index].grad = _sparse_zeros(parameters[index])
        ddp.reducer._autograd_hook(index)  # type: ignore[attr-defined]
    parameter = parameters[order[-1]]
    with torch.enable_grad():
        _ZeroGradient.apply(parameter, id(parameter) in sparse).backward()  # type: ignore[no-untyped-call]


def _with_sparse_gradients(ddp: DistributedDataParallel) -> set[int]:
    modules = (module for module in ddp.module.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag)))
    return {id(module.weight) for module in modules if module.sparse}


def _sparse_zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter.detach(), layout=torch.sparse_coo)


class _ZeroGradient(torch.autograd.Function):
    """A scalar whose gradient is zero; the values of the parameter are not read."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, is_sparse: bool) -> torch.Tensor:
        ctx.save_for_backward(parameter)
        ctx.is_sparse = is_sparse
        return torch.zeros((), device=parameter.device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor, None]:
        (parameter,) = ctx.saved_tensors
        return _sparse_zeros(parameter) if ctx.is_sparse else torch.zeros_like(parameter), None
