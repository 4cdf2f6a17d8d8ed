"""A test that leaves something behind fails: variable, thread, process, port, signal handler, shared memory, group."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest

# How long an example takes depends on the machine and says nothing. `make test` tries the same examples each time,
# `make test-all` others.
for _name, _is_fixed in (("fixed", True), ("random", False)):
    hypothesis.settings.register_profile(
        _name, deadline=None, derandomize=_is_fixed, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
hypothesis.settings.load_profile("fixed")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

_GRACE_S = 3.0
_OUR_THREADS = "flash"
_SET_BY_LIBRARIES = {
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
    "WANDB_MODE",
}
_LIBRARIES_WITH_HANDLERS = {"torch.utils.data._utils.signal_handling"}
_HELPER_PROCESSES = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
_SHARED_MEMORY = Path("/dev/shm")

_Handler = Callable[[int, FrameType | None], Any] | int | None


@pytest.fixture(scope="session", autouse=True)
def _adopt_orphans() -> None:
    """Processes whose parent died become children of the test process, where the guard below sees them."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


@pytest.fixture(autouse=True)
def _nothing_is_left(_adopt_orphans: None) -> Iterator[None]:
    """Compare what exists before and after a test. What a wider fixture made earlier is not the test's."""
    environment = dict(os.environ)
    handlers = _signal_handlers()
    before = {name: look() for name, look in _LOOKS.items()}
    yield
    problems = [*_changed_environment(environment), *_changed_handlers(handlers), *_open_process_group()]
    for name, look in _LOOKS.items():
        left = _still_new(before[name], look)
        if look is _shared_memory_files:
            left = {key: what for key, what in left.items() if not _is_mapped_by_others(what)}
        problems += [f"{name}: {what}" for what in left.values()]
        if look is _child_processes:
            _end_processes(list(left))
    if problems:
        pytest.fail("the test left behind\n  " + "\n  ".join(problems), pytrace=False)


def _still_new(before: dict[object, str], look: Callable[[], dict[object, str]]) -> dict[object, str]:
    """What is there now and was not before; things that are just closing get a moment."""
    deadline = time.monotonic() + _GRACE_S
    is_collected = False
    while True:
        left = {key: what for key, what in look().items() if key not in before}
        if not left or time.monotonic() > deadline:
            return left
        if not is_collected:
            gc.collect()
            is_collected = True
        time.sleep(0.01)


def _changed_environment(before: dict[str, str]) -> list[str]:
    after = dict(os.environ)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        elif name in after:
            del os.environ[name]
    return [
        f"environment variable: {name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in changed
        if name not in _SET_BY_LIBRARIES
    ]


def _signal_handlers() -> dict[signal.Signals, _Handler]:
    """Handlers of all signals but the one with which the test runner ends a test that takes too long."""
    return {number: signal.getsignal(number) for number in signal.Signals if number != signal.SIGALRM}


def _changed_handlers(before: dict[signal.Signals, _Handler]) -> list[str]:
    problems = []
    for number, after in _signal_handlers().items():
        if after == before[number] or getattr(after, "__module__", "") in _LIBRARIES_WITH_HANDLERS:
            continue
        problems.append(f"signal handler: {number.name} was {before[number]}, is {after}")
        signal.signal(number, before[number] or signal.SIG_DFL)
    return problems


def _open_process_group() -> list[str]:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return []
    distributed.destroy_process_group()
    return ["process group: torch.distributed is initialized"]


def _threads() -> dict[object, str]:
    return {
        thread: f"{thread.name} (daemon={thread.daemon})"
        for thread in threading.enumerate()
        if not thread.daemon or thread.name.startswith(_OUR_THREADS)
    }


def _child_processes() -> dict[object, str]:
    """Living children; ended ones that nobody waited for hold nothing."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return {}
    children: dict[object, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if int(parent) != os.getpid() or state == b"Z":
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:  # it ended while we looked
            continue
        if not any(helper in command for helper in _HELPER_PROCESSES):
            children[int(entry.name)] = f"{entry.name} {command.decode(errors='replace')}"
    return children


def _end_processes(pids: list[object]) -> None:
    for pid in pids:
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _listening_sockets() -> dict[object, str]:
    listening: dict[object, str] = {}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            inode = os.fstat(fd).st_ino
            with socket.socket(fileno=os.dup(fd)) as copy:
                if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    listening[inode] = f"{copy.getsockname()}"
        except OSError:  # it was closed while we looked
            continue
    return listening


def _shared_memory_files() -> dict[object, str]:
    return {name: f"{_SHARED_MEMORY / name}" for name in os.listdir(_SHARED_MEMORY)}


def _is_mapped_by_others(path: str) -> bool:
    """Whether another process has the file mapped: then another program made it at the same time."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if path.encode() in (entry / "maps").read_bytes():
                    return True
            except OSError:  # it ended, or belongs to somebody else
                continue
    return False


_LOOKS: dict[str, Callable[[], dict[object, str]]] = {
    "child process": _child_processes,
    "thread": _threads,
    "listening socket": _listening_sockets,
    "shared memory": _shared_memory_files,
}
