"""The benchmark job under nvidia-resiliency-ext's in-process restart. Runs in that package's own environment.

The package restarts the function; what it begins with is the user's affair. Here that is a copy in the rank's memory,
made as often as the job under torchrun writes a checkpoint.
"""

import argparse
import copy
import os
from typing import Any

import nvidia_resiliency_ext.inprocess as inprocess
import torch
import torch.distributed as dist
from language_model import SHAPES, LanguageModel, batch_of, hash_of, loss_of, make_optimizer
from step_log import StepLog
from torch.nn.parallel import DistributedDataParallel

LOOPBACK = "127.0.0.1"


class Job:
    """What outlives a restart of the function."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._log = StepLog(arguments.folder, int(os.environ["RANK"]))
        self._kept: tuple[int, Any, Any] | None = None

    def train(self, call: Any) -> None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # Over the wrapper's own store: a further port to listen on may be taken, by a client in TIME_WAIT too. Rank 0
        # then fails alone, and the others, who wait for it in C++, are ended by the wrapper after 90 s.
        store = dist.TCPStore(LOOPBACK, self._arguments.port, is_master=False, wait_for_workers=False)
        store = dist.PrefixStore(f"train_{call.iteration}", store)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
        shape = SHAPES["recovery"]
        model = LanguageModel(shape)
        optimizer = make_optimizer(model)
        first = 0
        if self._kept is not None:
            first, weights, state = self._kept
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        wrapped = DistributedDataParallel(model)
        for step in range(first, self._arguments.steps):
            optimizer.zero_grad()
            loss_of(wrapped, batch_of(shape, step, rank, world_size)).backward()
            optimizer.step()
            self._log.write("step", step + 1, world_size)
            if (step + 1) % self._arguments.checkpoint_every == 0:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                self._kept = (step + 1, *state)
        self._log.write("end", self._arguments.steps, world_size, hash_of(model))
        dist.destroy_process_group()


def main(arguments: argparse.Namespace) -> None:
    job = Job(arguments)

    def run(call: inprocess.CallWrapper = None) -> None:
        job.train(call)

    store = {"host_name": LOOPBACK, "port": arguments.port}
    inprocess.Wrapper(store_kwargs=store, initialize=None, health_check=None)(run)()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    main(given)
