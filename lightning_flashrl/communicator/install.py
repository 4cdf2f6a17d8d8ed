"""Makes holding groups what ``torch.distributed`` uses."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from lightning_flashrl.communicator.communicator import Communicator
from lightning_flashrl.communicator.holding import DEFAULT_GROUP, HoldingProcessGroup


def make_default(communicator: Communicator, rank: int, world_size: int, connect: bool) -> HoldingProcessGroup:
    """Install a holding group as the default process group of ``torch.distributed``.

    Groups made later with ``new_group`` hold as well. ``get_backend()`` reports the native backend's name for all of
    them, so that code which asks takes the same path as without us.
    """
    c10d = dist.distributed_c10d
    native = communicator.transport.backend
    name = f"flash{native}"

    def create(options: Any, _: Any = None) -> HoldingProcessGroup:
        is_first = DEFAULT_GROUP not in communicator.groups
        ranks = list(options.global_ranks_in_group) or list(range(world_size))
        if is_first:
            return communicator.create_group(DEFAULT_GROUP, options.group_rank, ranks, connect=connect)
        communicator.await_replay_limit()
        return communicator.create_group(
            f"g{options.group_id}", options.group_rank, ranks, connect=not communicator.is_replaying
        )

    make_group = c10d._new_process_group_helper

    def make_holding_group(
        size: int, group_rank: int, ranks: list[int], backend: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if str(backend) != native:
            return make_group(size, group_rank, ranks, backend, *args, **kwargs)
        group, store = make_group(size, group_rank, ranks, name, *args, **kwargs)
        if isinstance(group, HoldingProcessGroup):
            c10d._world.pg_map[group] = (native, c10d._world.pg_map[group][1])
        return group, store

    dist.Backend._plugins.pop(name.upper(), None)
    dist.Backend.register_backend(name, create, extended_api=True, devices=[communicator.transport.device_type])
    c10d._new_process_group_helper = make_holding_group  # type: ignore[assignment]
    dist.init_process_group(native, store=HashStore(), rank=rank, world_size=world_size)
    return communicator.groups[DEFAULT_GROUP]
