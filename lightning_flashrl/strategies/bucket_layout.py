"""The gradient buckets of DDP: a newcomer must reduce in the survivors' layout, or the last bit differs.

DDP starts with buckets in parameter order and rebuilds them after the first backward in the order in which gradients
arrived. Ring all-reduce adds in an order that depends on an element's place in its bucket. Survivors keep their
reducer; a newcomer's reducer is led through its rebuild once, alone, and told the survivors' layout where it would ask
rank 0.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_flashrl.communicator.holding import HoldingProcessGroup
from lightning_flashrl.errors import ConfigurationError


def read_layout(ddp: DistributedDataParallel) -> tuple[str, str]:
    """Return the reducer's (buckets, order in which gradients arrived), each empty while it is not known.

    Buckets are parameter indices in reduction order. Must be called by the program's thread, outside the backward pass:
    the reducer keeps its lock while it waits for a collective.
    """
    assert ddp.logger is not None
    ddp.logger.set_runtime_stats_and_log()
    told = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    return told.get("rebuilt_per_bucket_param_indices") or "", told.get("prev_iteration_grad_ready_order_indices") or ""


def adopt_layout(ddp: DistributedDataParallel, layout: str, ready_order: str) -> None:
    """Bring a fresh reducer to where the predecessor's was.

    Args:
        ddp: just built.
        layout: buckets; empty if the predecessor had not rebuilt them yet. Then this reducer rebuilds them, with all
            others, in its first forward, and asks rank 0 as they did.
        ready_order: order in which the predecessor's gradients arrived; empty if it had no backward yet.

    Raises:
        ConfigurationError: the reducer did not take it (its parameters differ).
    """
    if not ready_order or (ddp.find_unused_parameters and not ddp.static_graph):
        return
    group = ddp.process_group
    assert isinstance(group, HoldingProcessGroup)
    buckets = [[int(index) for index in bucket.split()] for bucket in layout.split(",")] if layout else []
    indices = torch.tensor([index for bucket in buckets for index in bucket] + [len(buckets)], dtype=torch.int32)
    sizes = torch.tensor([len(bucket) for bucket in buckets], dtype=torch.int32)
    answers = [indices, sizes]

    def answer(name: str, tensors: list[torch.Tensor]) -> None:
        if name == "broadcast" and answers and tensors[0].dtype == torch.int32 and tensors[0].shape == answers[0].shape:
            tensors[0].copy_(answers.pop(0))

    parameters = [parameter for parameter in ddp.module.parameters() if parameter.requires_grad]
    order = [int(index) for index in ready_order.replace(",", " ").split()]
    with group.alone(answer):
        ddp.reducer.prepare_for_forward()
        ddp.reducer.prepare_for_backward([])
        with torch.enable_grad():
            # Autograd runs what was created last first, so the last of these is the first gradient to arrive.
            terms = [(parameters[index] * 0).sum().float() for index in reversed(order)]
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        if ddp.static_graph:
            ddp.reducer._delay_all_reduce()  # type: ignore[attr-defined]
        for parameter in parameters:
            parameter.grad = None
        if layout:
            ddp.reducer._rebuild_buckets()
    if layout and read_layout(ddp)[0] != layout:
        raise ConfigurationError(
            "the replacement's model has other gradient buckets; build the same model at every start"
        )
