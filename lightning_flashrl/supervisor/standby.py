"""A process that has imported what ranks need, and forks processes that wait to become one.

::

    agent ── fork, descriptor ──▶ standby ─fork─▶ helper ─fork─▶ rank-to-be ── Ready(pid) ──▶ agent
    agent ── Order ──────────────────────────────────────────────▶ rank-to-be becomes the rank ── Ready(pid) ──▶ agent

The helper leaves at once, so that the kernel makes the new process a child of the root (a subreaper): the death of the
standby, or of the agent, does not touch any rank. The standby has one thread and never opens a device or a process
group. Memory is shared until it is written. A waiting process
takes as much memory of its own as a rank holds, so that it need not take it when it becomes one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import select
import socket
import sys

import msgspec

from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.allocator import WarmHeap
from lightning_flashrl.supervisor.channel import RankChannel, adopt_channel
from lightning_flashrl.supervisor.process import die_with_parent
from lightning_flashrl.supervisor.runner import redirect_output, run_program, write_name

FORK = b"F"
ASK = b"A"
"""From an agent that does not know whether this one is ready."""
READY = b"R"
NOT_FORKABLE = b"T"
"""An import started a thread, or opened a device; a fork would lose the one and break the other."""

_PAUSE_MS = 10


def import_all(modules: list[str]) -> None:
    """Import what can be imported."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def num_threads() -> int:
    """Return how many threads the kernel sees in this process."""
    return len(os.listdir("/proc/self/task"))


def has_open_device() -> bool:
    """Whether torch has a device context in this process."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def look_fresh() -> None:
    """Make random generators look as in a freshly started interpreter: seeded from new entropy."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
        num_wanted = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        if num_wanted != torch.get_num_threads():
            torch.set_num_threads(num_wanted)


def serve(control: socket.socket, root_pid: int) -> RankChannel | None:
    """Fork on demand. Returns in each forked process with its channel, and with ``None`` when nobody is left to ask."""
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1, 1)
        if request == ASK:
            control.send(READY)
            continue
        if request != FORK or not fds:
            return None
        helper_pid = os.fork()
        if helper_pid:
            os.close(fds[0])
            os.waitpid(helper_pid, 0)
            continue
        if os.fork():
            os._exit(0)
        control.close()
        os.setsid()
        die_with_parent(root_pid)
        return RankChannel(fds[0])


def await_order(channel: RankChannel) -> protocol.Order | None:
    """Wait until this process is told which rank to be; ``None`` means that it is not needed.

    Meanwhile it touches as much memory as a rank holds, in small portions with pauses: the ranks are at work.
    """
    heap = WarmHeap()
    poller = select.poll()
    poller.register(channel.fileno(), select.POLLIN)
    while True:
        if not poller.poll(_PAUSE_MS if heap.is_cold else None):
            heap.touch()
            continue
        payloads = channel.receive()
        if payloads is None:
            return None
        for message in map(protocol.decode_to_rank, payloads):
            if isinstance(message, protocol.Order):
                heap.release()
                return message
            if isinstance(message, protocol.Warm):
                heap.grow_to(message.num_bytes)


def take_seat(channel: RankChannel, order: protocol.Order) -> None:
    """Take over the environment, the channel and the log of the rank that this process becomes."""
    os.environb.clear()
    os.environb.update(order.environ)
    os.environ["FLASHRL_CONTROL_FD"] = str(channel.fileno())
    adopt_channel(channel)
    write_name()
    channel.send(protocol.encode(protocol.Ready(os.getpid())))
    redirect_output(None if order.log_path is None else os.fsdecode(order.log_path))


def main() -> None:
    """Import, announce, fork; in a forked process, run the user's program."""
    root_pid = int(os.environ["FLASHRL_ROOT_PID"])
    die_with_parent(root_pid)
    control = socket.socket(fileno=int(os.environ["FLASHRL_STANDBY_FD"]))
    if not sys.flags.safe_path:
        sys.path[0] = os.environ["FLASHRL_PATH_ENTRY"]
    gc.disable()
    import_all(msgspec.json.decode(os.environ["FLASHRL_PRELOAD"], type=list[str]))
    if num_threads() > 1 or has_open_device():
        control.send(NOT_FORKABLE)
        return
    gc.collect()
    gc.freeze()
    control.send(READY)
    channel = serve(control, root_pid)
    if channel is None:
        return
    channel.send(protocol.encode(protocol.Ready(os.getpid())))
    order = await_order(channel)
    if order is None:
        return
    gc.enable()
    take_seat(channel, order)
    look_fresh()
    run_program(list(map(os.fsdecode, order.argv)), is_module=order.is_module)


if __name__ == "__main__":
    main()
