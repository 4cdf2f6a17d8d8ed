"""The only reader of time. Tests give deciders a number instead."""

from __future__ import annotations

import time


def now_s() -> float:
    """Seconds on a monotonic clock that all processes of one host share."""
    return time.monotonic()


def now_ns() -> int:
    """Nanoseconds on a monotonic clock that all processes of one host share."""
    return time.monotonic_ns()


def wall_s() -> float:
    """Seconds since the Unix epoch, for logs only."""
    return time.time()


def sleep(duration_s: float) -> None:
    """Suspend the calling thread for ``duration_s`` seconds."""
    time.sleep(duration_s)
