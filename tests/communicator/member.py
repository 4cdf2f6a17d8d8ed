"""One of several processes that a test runs: ``member.py CHECK RANK SIZE STORE_PORT``."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_flashrl.communicator import GlooTransport, NcclTransport, Transport
from lightning_flashrl.communicator.collectives import BufferPool, Collective, flatten
from lightning_flashrl.communicator.communicator import Communicator
from lightning_flashrl.communicator.install import make_default
from lightning_flashrl.testing.conformance import check_transport

sys.path.insert(0, str(Path(__file__).parent))

from gloo_as_device import GlooAsDevice


class Rendezvous:
    """Values that all members see."""

    def __init__(self, port: int) -> None:
        self._store = dist.TCPStore("127.0.0.1", port, is_master=False)
        self._lock = threading.Lock()

    def put(self, key: str, value: bytes) -> None:
        with self._lock:
            self._store.set(key, value)

    def fetch(self, key: str, timeout_s: float, abandoned: threading.Event) -> bytes:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if abandoned.is_set():
                raise RuntimeError(f"nobody waits for {key} any more")
            with self._lock:
                if self._store.check([key]):
                    return self._store.get(key)
            time.sleep(0.002)
        raise TimeoutError(f"{key} did not come within {timeout_s} s")


def _make_nccl(rank: int) -> Transport:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return NcclTransport(device)


def conformance_gloo(rank: int, size: int, rendezvous: Rendezvous) -> None:
    check_transport(GlooTransport, rendezvous.put, rendezvous.fetch, rank, size)


class Forgetful(GlooTransport):
    """What gloo is to an operation that it forgets: nothing ends it."""

    def _shut_connections(self) -> None:
        pass


def conformance_forgetful(rank: int, size: int, rendezvous: Rendezvous) -> None:
    check_transport(Forgetful, rendezvous.put, rendezvous.fetch, rank, size)


def conformance_device(rank: int, size: int, rendezvous: Rendezvous) -> None:
    check_transport(GlooAsDevice, rendezvous.put, rendezvous.fetch, rank, size)


def conformance_nccl(rank: int, size: int, rendezvous: Rendezvous) -> None:
    check_transport(lambda: _make_nccl(rank), rendezvous.put, rendezvous.fetch, rank, size, limit_s=30.0)


# ---------------------------------------------------------------------- collectives
def _values(*shape: int, rank: int, salt: float = 0.0) -> torch.Tensor:
    """Numbers whose sums depend on the order of summation."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count, dtype=torch.float32).mul(0.37 + rank + salt).sin() / 3).reshape(shape)


def _garbage(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.full(shape, float("nan")) for _ in range(count)]


def _make_collectives(rank: int, size: int) -> dict[str, Callable[[], Collective]]:
    """For each kind, a new call with the inputs of this rank."""

    def values(*shape: int, salt: float = 0.0) -> torch.Tensor:
        return _values(*shape, rank=rank, salt=salt)

    def in_place(name: str, count: int, *options: Any, contributes: bool = True) -> Callable[[], Collective]:
        def make() -> Collective:
            tensors = [values(1000, salt=index) for index in range(count)]
            return Collective(name, tensors, tensors if contributes else [], options, is_in_place=True)

        return make

    root = 1
    broadcast, reduce, gather, scatter = (
        dist.BroadcastOptions(), dist.ReduceOptions(), dist.GatherOptions(), dist.ScatterOptions()
    )  # fmt: skip
    for options in (broadcast, reduce, gather, scatter):
        options.rootRank = root
    average = dist.AllreduceOptions()
    average.reduceOp = dist.ReduceOp.MAX
    is_root = rank == root
    splits_out = [3, 7] if rank == 0 else [2, 5]
    splits_in = [3, 2] if rank == 0 else [7, 5]
    return {
        "allreduce": in_place("allreduce", 1),
        "allreduce of maxima": in_place("allreduce", 1, average),
        "allreduce_coalesced": in_place("allreduce_coalesced", 3),
        "broadcast": in_place("broadcast", 1, broadcast, contributes=is_root),
        "reduce": in_place("reduce", 1, reduce),
        "allgather": lambda: Collective(
            "allgather", [_garbage(size, 100)], [values(100)], (), is_in_place=False
        ),
        "_allgather_base": lambda: Collective(
            "_allgather_base", *_garbage(1, size * 100), values(100), (), is_in_place=False
        ),
        "gather": lambda: Collective(
            "gather", [_garbage(size, 100)] if is_root else [], [values(100)], (gather,), is_in_place=False
        ),
        "scatter": lambda: Collective(
            "scatter", _garbage(1, 100), [[values(100, salt=to) for to in range(size)]] if is_root else [],
            (scatter,), is_in_place=False,
        ),
        "reduce_scatter": lambda: Collective(
            "reduce_scatter", _garbage(1, 100), [[values(100, salt=to) for to in range(size)]], (), is_in_place=False
        ),
        "_reduce_scatter_base": lambda: Collective(
            "_reduce_scatter_base", *_garbage(1, 100), values(size * 100), (), is_in_place=False
        ),
        "alltoall": lambda: Collective(
            "alltoall", _garbage(size, 100), [values(100, salt=to) for to in range(size)], (), is_in_place=False
        ),
        "alltoall_base": lambda: Collective(
            "alltoall_base", *_garbage(1, size * 100), values(size * 100), ([], []), is_in_place=False
        ),
        "alltoall_base, uneven": lambda: Collective(
            "alltoall_base", *_garbage(1, sum(splits_out)), values(sum(splits_in)), (splits_out, splits_in),
            is_in_place=False,
        ),
        "barrier": lambda: Collective("barrier", [], [], (), is_in_place=True),
    }  # fmt: skip


def _bits(collective: Collective) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in flatten(collective.results)]


def _spoil(collective: Collective) -> None:
    """What a broken collective and a program that goes on may leave in the tensors."""
    for tensor in [*flatten(collective.results), *flatten(collective.inputs)]:
        tensor.fill_(float("nan"))


def _check_again(name: str, make: Callable[[], Collective], group: Any, rank: int) -> None:
    collective = make()
    collective.save(BufferPool())
    try:
        collective.issue(group).wait()
    except RuntimeError as error:
        if "does not support" in str(error):  # gloo of torch 2.11 lacks some
            return
        raise
    expected = _bits(collective)
    for redoing in (0, 1, None):
        _spoil(collective)
        spoilt = _bits(collective)
        if redoing in (rank, None):
            collective.issue_again(group).wait()
            assert _bits(collective) == expected, f"{name}: rank {rank} got other bits when it was issued again"
        else:
            collective.contribute_again(group).wait()
            assert _bits(collective) == spoilt, f"{name}: a second contribution changed the program's tensors"


def collectives(rank: int, size: int, rendezvous: Rendezvous) -> None:
    communicator = Communicator(GlooTransport(), rendezvous.put, rendezvous.fetch, rank)
    group = communicator.create_group("0", rank, list(range(size))).native
    assert group is not None
    for name, make in _make_collectives(rank, size).items():
        _check_again(name, make, group, rank)


# ---------------------------------------------------------------------- DDP
def _train(transport: Transport, prefix: str, rank: int, size: int, rendezvous: Rendezvous) -> list[bytes]:
    def put(key: str, value: bytes) -> None:
        rendezvous.put(prefix + key, value)

    def fetch(key: str, timeout_s: float, abandoned: threading.Event) -> bytes:
        return rendezvous.fetch(prefix + key, timeout_s, abandoned)

    make_default(Communicator(transport, put, fetch, rank), rank, size, connect=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        wrapped(_values(8, 64, rank=rank, salt=step)).square().mean().backward()
        optimizer.step()
    dist.barrier()
    dist.destroy_process_group()
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def ddp(rank: int, size: int, rendezvous: Rendezvous) -> None:
    expected = _train(GlooTransport(), "gloo/", rank, size, rendezvous)
    assert _train(GlooAsDevice(), "device/", rank, size, rendezvous) == expected


if __name__ == "__main__":
    check, *numbers = sys.argv[1:]
    rank, size, port = map(int, numbers)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = Rendezvous(port)
    globals()[check](rank, size, rendezvous)
    rendezvous.put(f"done/{rank}", b"1")
    for member in range(size):  # connections of a group stay open until all are done
        rendezvous.fetch(f"done/{member}", 60.0, threading.Event())
    for thing in gc.get_objects():
        if type(thing) is Communicator:
            thing.close()
    if check.startswith("conformance_"):
        # These checks break groups whose native operations nothing ends: threads wait for them, and the end of another
        # member would wake those in the middle of the interpreter's shutdown.
        sys.stdout.flush()
        os._exit(0)
