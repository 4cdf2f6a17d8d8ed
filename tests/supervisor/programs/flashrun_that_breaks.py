"""``flashrun`` whose supervisors break as soon as they look at ranks."""

from __future__ import annotations

import sys
from typing import NoReturn

from lightning_flashrl.cli import flashrun
from lightning_flashrl.supervisor.agent import Agent


def break_down(_: Agent) -> NoReturn:
    raise RuntimeError("this supervisor breaks")


if __name__ == "__main__":
    Agent._look_at_ranks = break_down  # type: ignore[method-assign]
    sys.exit(flashrun.main())
