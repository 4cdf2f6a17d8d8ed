"""A process that computes rewards for a :class:`~lightning_flashrl.engines.rewards.RewardPool`, one after the other.

It is run as a file and imports nothing of this package, so that it starts in milliseconds and holds what the reward
needs and nothing else. Settings and jobs arrive on standard input, answers leave on a pipe of their own: a reward may
print. It ends with its parent at any moment, also in the middle of a computation that no signal handler interrupts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LENGTH = struct.Struct(">I")
"""What stands before an answer: its length in bytes."""
READY, BEGUN, REWARD, RAISED, NO_NUMBER = "ready", "begun", "reward", "raised", "no number"
"""Kinds of answers. A job has two: that it has begun, and how it ended."""
_PR_SET_PDEATHSIG = 1
_MAX_TEXT = 2000


class Settings(NamedTuple):
    """What the process must know; it travels as a plain tuple.

    Attributes:
        reward: pickled.
        import_path: ``sys.path``.
        max_memory_bytes: what a reward may allocate beyond what is there when it has been loaded.
    """

    reward: bytes
    import_path: list[str]
    max_memory_bytes: int | None


def main() -> None:
    """Serve until standard input ends."""
    answers, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent_pid)
    with contextlib.suppress(OSError):  # a machine without memory is to end this process rather than its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.set_inheritable(answers, False)
    jobs = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        reward = _load(Settings(*pickle.load(jobs)))
    except BaseException as error:  # noqa: BLE001 - the user's own module; its error is told
        _answer(answers, RAISED, _text(error))
        return
    _answer(answers, READY, None)
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        _answer(answers, BEGUN, None)
        _answer(answers, *_compute(reward, *job))


def _die_with(parent_pid: int) -> None:
    """Ask the kernel to end this process with the thread that started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it was faster
        os._exit(1)


def _load(settings: Settings) -> Callable[..., Any]:
    sys.path[:] = settings.import_path
    reward: Callable[..., Any] = pickle.loads(settings.reward)
    if settings.max_memory_bytes is not None:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * os.sysconf("SC_PAGE_SIZE") + settings.max_memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return reward


def _compute(reward: Callable[..., Any], prompt: str, completion: str, row: dict[str, Any]) -> tuple[str, Any]:
    try:
        value = float(reward(prompt, completion, row))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # noqa: BLE001 - the user's own function
        return RAISED, _text(error)
    return (REWARD, value) if math.isfinite(value) else (NO_NUMBER, f"returned {value}")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_TEXT]


def _answer(fd: int, kind: str, value: Any) -> None:
    data = json.dumps([kind, value]).encode()
    data = LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
