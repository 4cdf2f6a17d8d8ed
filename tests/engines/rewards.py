"""Rewards of every kind, the bad ones too. A worker process imports this and nothing heavy."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_calls = 0


def by_command(prompt: str, completion: str, row: Mapping[str, Any]) -> Any:
    """Do what the completion says; any number is the reward itself."""
    global _calls
    _calls += 1
    action = _ACTIONS.get(completion)
    return action(row) if action is not None else float(completion)


def by_row(prompt: str, completion: str, row: Mapping[str, Any]) -> Any:
    """Do what the row says, for any completion."""
    return by_command(prompt, row.get("do", "1"), row)


def _wait_for_file(row: Mapping[str, Any]) -> float:
    _begun(row)
    while not Path(row["until"]).exists():
        time.sleep(0.005)
    return 0.5


def _hang_in_c(row: Mapping[str, Any]) -> None:
    _begun(row)
    ctypes.PyDLL(None).pause()  # without letting other threads run


def _begun(row: Mapping[str, Any]) -> None:
    if "path" in row:
        _write(row["path"], os.getpid())


def _write(path: str, pid: int) -> None:
    """Let the file appear with all that is in it."""
    Path(f"{path}.new").write_text(str(pid))
    os.replace(f"{path}.new", path)


def _hang(row: Mapping[str, Any]) -> None:
    _begun(row)
    while True:
        time.sleep(1)


def _hang_with_a_child(row: Mapping[str, Any]) -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    _write(row["path"], pid)
    signal.pause()


def _ignore_signals(row: Mapping[str, Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    _hang(row)


def _write_everywhere(row: Mapping[str, Any]) -> None:
    for fd in range(3, 64):
        try:
            os.write(fd, b"\0\0\0\4oops")
        except OSError:
            continue


def _raise(row: Mapping[str, Any]) -> None:
    raise ZeroDivisionError("no way")


_ACTIONS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "raise": _raise,
    "raise text that is not ascii": lambda row: [][1:][0] if "x" in row else _fail_with("ä" * 5000),
    "recurse": lambda row: _ACTIONS["recurse"](row),
    "sys.exit": lambda row: sys.exit("bye"),
    "nan": lambda row: float("nan"),
    "infinite": lambda row: float("inf"),
    "none": lambda row: None,
    "text": lambda row: "good",
    "true": lambda row: True,
    "hang": _hang,
    "wait for a file": _wait_for_file,
    "hang in c": _hang_in_c,
    "hang with a child": _hang_with_a_child,
    "hang and ignore signals": _ignore_signals,
    "stop": lambda row: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda row: os._exit(3),
    "exit well": lambda row: os._exit(0),
    "segv": lambda row: ctypes.string_at(0),
    "kill": lambda row: os.kill(os.getpid(), signal.SIGKILL),
    "memory": lambda row: len(bytearray(1 << 40)),
    "kill strangely": lambda row: os.kill(os.getpid(), signal.SIGRTMIN + 5),
    "close everything": lambda row: os.closerange(3, 64),
    "close everything and hang": lambda row: os.closerange(3, 64) or _hang(row),
    "write everywhere": _write_everywhere,
    "print": lambda row: print("printed") or 0.75,
    "read": lambda row: len(sys.stdin.read()),
    "pid": lambda row: os.getpid(),
    "calls": lambda row: _calls,
    "length": lambda row: len(row["text"]),
}


def _fail_with(text: str) -> None:
    raise ValueError(text)
