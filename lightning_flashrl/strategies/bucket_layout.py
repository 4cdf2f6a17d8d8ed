"""The gradient buckets of DDP: a newcomer must reduce in the survivors' layout, or the last bit differs.

DDP starts with buckets in parameter order and rebuilds them after the first backward in the order in which gradients
arrived. Ring all-reduce adds in an order that depends on an element's place in its bucket. Survivors keep their reducer;
a newcomer's reducer is led through its rebuild once, alone, and told the survivors' layout where it would ask rank 0.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_flashrl.communicator.holding import HoldingProcessGroup
from lightning_flashrl.errors import ConfigurationError


def read_layout(ddp: DistributedDataParallel) -> str:
    """Parameter indices of each bucket in reduction order, empty before the first rebuild."""
    ddp.logger.set_runtime_stats_and_log()
    return ddp._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices") or ""


def adopt_layout(ddp: DistributedDataParallel, layout: str) -> None:
    """Give a fresh reducer the survivors' bucket layout.

    Raises:
        ConfigurationError: the reducer did not take it (its parameters differ).
    """
    if not layout:
        return
    group = ddp.process_group
    assert isinstance(group, HoldingProcessGroup)
    buckets = [[int(index) for index in bucket.split()] for bucket in layout.split(",")]
    indices = torch.tensor([index for bucket in buckets for index in bucket] + [len(buckets)], dtype=torch.int32)
    sizes = torch.tensor([len(bucket) for bucket in buckets], dtype=torch.int32)
    answers = [indices, sizes]

    def answer(name: str, tensors: list[torch.Tensor]) -> None:
        if name == "broadcast" and answers and tensors[0].dtype == torch.int32 and tensors[0].shape == answers[0].shape:
            tensors[0].copy_(answers.pop(0))

    parameters = [p for p in ddp.module.parameters() if p.requires_grad]
    with group.alone(answer):
        ddp.reducer.prepare_for_forward()
        ddp.reducer.prepare_for_backward([])
        with torch.enable_grad():
            torch.stack([(parameter * 0).sum().float() for parameter in parameters]).sum().backward()
        for parameter in parameters:
            parameter.grad = None
        ddp.reducer._rebuild_buckets()
    if read_layout(ddp) != layout:
        raise ConfigurationError("the replacement's model has other gradient buckets; build the same model at every start")
