"""The benchmark job under torchft: one replica group of one rank. Runs in torchft's own environment."""

import argparse
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from language_model import SHAPES, LanguageModel, batch_of, hash_of, loss_of, make_optimizer
from step_log import StepLog
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

LOOPBACK = "127.0.0.1"


class RepairedDDP(DistributedDataParallel):
    """torchft 0.2.0 asserts ``fut._fut`` in its hook, which a failed all-reduce has not set; this does not."""

    @staticmethod
    def _comm_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        work = state.allreduce(bucket.buffer())
        work.wait()
        native = getattr(work.get_future(), "_fut", None)
        if native is None:
            native = torch.futures.Future()
            native.set_result(bucket.buffer())
        return native


def main(arguments: argparse.Namespace) -> None:
    group, world_size = arguments.group, arguments.groups
    log = StepLog(arguments.folder, group)
    shape = SHAPES["recovery"]
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    model = LanguageModel(shape)
    native_optimizer = make_optimizer(model)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        native_optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": native_optimizer.state_dict()},
        replica_id=f"group{group}",
        timeout=timedelta(seconds=30),
        rank=0,
        world_size=1,
        store_addr=LOOPBACK,
        store_port=store.port,
        hostname=LOOPBACK,
    )
    wrapper = DistributedDataParallel if arguments.stock else RepairedDDP
    wrapped = wrapper(manager, model)
    optimizer = Optimizer(manager, native_optimizer)
    while manager.current_step() < arguments.steps:
        step = manager.current_step()
        optimizer.zero_grad()
        loss_of(wrapped, batch_of(shape, step, group, world_size)).backward()
        optimizer.step()
        if manager.current_step() > step:
            log.write("step", manager.current_step(), manager.num_participants())
    log.write("end", manager.current_step(), world_size, hash_of(model))
    manager.shutdown(wait=False)
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stock", action="store_true", help="the wrapper as published")
    given = parser.parse_args()
    torch.set_num_threads(1)
    socket.gethostname = lambda: LOOPBACK  # torchft advertises the host's name; all stays on this machine
    main(given)
