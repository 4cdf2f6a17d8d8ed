"""The TransferQueue: a column store between the tasks of an RL workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_flashrl import _lazy

if TYPE_CHECKING:
    from lightning_flashrl.streaming.client import TransferQueueClient
    from lightning_flashrl.streaming.control import QueueStatistics
    from lightning_flashrl.streaming.ledger import Task, TaskStatistics
    from lightning_flashrl.streaming.loader import Request, StreamingDataset
    from lightning_flashrl.streaming.queue import Lease, QueueVerbs, TransferQueue
    from lightning_flashrl.streaming.samplers import (
        Candidates,
        Demand,
        OldestFirst,
        PromptGroups,
        Sampler,
        StalenessAware,
        TokenBalanced,
    )
    from lightning_flashrl.streaming.schema import Batch, Field, Ragged, Schema
    from lightning_flashrl.streaming.server import TransferQueueServer

# Loaded when they are asked for: a storage unit's process needs none of them, and no torch.
_HOMES = {
    "Batch": "schema",
    "Candidates": "samplers",
    "Demand": "samplers",
    "Field": "schema",
    "Lease": "queue",
    "OldestFirst": "samplers",
    "PromptGroups": "samplers",
    "QueueStatistics": "control",
    "QueueVerbs": "queue",
    "Ragged": "schema",
    "Request": "loader",
    "Sampler": "samplers",
    "Schema": "schema",
    "StalenessAware": "samplers",
    "StreamingDataset": "loader",
    "Task": "ledger",
    "TaskStatistics": "ledger",
    "TokenBalanced": "samplers",
    "TransferQueue": "queue",
    "TransferQueueClient": "client",
    "TransferQueueServer": "server",
}

__all__ = [
    "Batch",
    "Candidates",
    "Demand",
    "Field",
    "Lease",
    "OldestFirst",
    "PromptGroups",
    "QueueStatistics",
    "QueueVerbs",
    "Ragged",
    "Request",
    "Sampler",
    "Schema",
    "StalenessAware",
    "StreamingDataset",
    "Task",
    "TaskStatistics",
    "TokenBalanced",
    "TransferQueue",
    "TransferQueueClient",
    "TransferQueueServer",
]


__getattr__, __dir__ = _lazy.hooks(__name__, _HOMES)
