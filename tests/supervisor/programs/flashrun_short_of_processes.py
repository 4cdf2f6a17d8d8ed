"""``flashrun`` on a machine that has no room for the second and third supervisor."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from lightning_flashrl.cli import flashrun
from lightning_flashrl.supervisor import process, root

refusals = [False, True, True]


def fork(live: Callable[[], int]) -> int:
    if refusals and refusals.pop(0):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    return process.fork(live)


if __name__ == "__main__":
    root.fork = fork  # type: ignore[attr-defined]
    sys.exit(flashrun.main())
