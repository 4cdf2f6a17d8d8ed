"""Queues of every kind: what one test says of the verbs holds wherever the queue is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_flashrl.streaming import Field, QueueVerbs, TransferQueue, TransferQueueClient, TransferQueueServer

KINDS = ["local", "client", "client over sockets only", "client of two units", "client of a unit over sockets only"]
FIELDS = {
    "prompt": Field(torch.int64, (None,)),
    "response": {"tokens": Field(torch.int64, (None,)), "logprobs": Field(torch.float32, (None,))},
    "reward": Field(float),
    "group_id": Field(int),
    "answer": Field(str),
    "image": Field(torch.uint8, (2, 3)),
    "frames": Field(torch.bfloat16, (None, 4)),
}
TASKS = {"rollout": ["prompt"], "update": ["prompt", "response", "reward"]}

OpenQueue = Callable[..., QueueVerbs]


@pytest.fixture(params=KINDS)
def open_queue(request: pytest.FixtureRequest) -> Iterator[OpenQueue]:
    """Make a queue and return what its users have in hand."""
    kind: str = request.param
    with contextlib.ExitStack() as stack:

        def make(fields: Any = FIELDS, tasks: Any = TASKS, **settings: Any) -> QueueVerbs:
            num_units = 2 if "two units" in kind else int("a unit" in kind)
            queue = stack.enter_context(TransferQueue(fields, tasks, num_storage_units=num_units, **settings))
            if kind == "local":
                return queue
            server = stack.enter_context(TransferQueueServer(queue))
            transport: Any = "socket" if "sockets only" in kind else "shared_memory"
            return stack.enter_context(TransferQueueClient(server.endpoint, server.secret, transport=transport))

        yield make
