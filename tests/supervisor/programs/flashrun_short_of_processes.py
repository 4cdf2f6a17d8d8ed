"""``flashrun`` on a machine that now and then has no room for a process more."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from lightning_flashrl.cli import flashrun
from lightning_flashrl.supervisor import root


def refuse(start: Callable[..., int], numbers: list[int]) -> Callable[..., int]:
    """Let these calls fail, counted from 1."""
    num_calls = 0

    def start_or_fail(*arguments: Any) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls in numbers:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(*arguments)

    return start_or_fail


if __name__ == "__main__":
    which, *numbers = sys.argv.pop(1).split(",")
    setattr(root, which, refuse(getattr(root, which), list(map(int, numbers))))
    sys.exit(flashrun.main())
