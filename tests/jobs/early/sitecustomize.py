"""Lets a rank of a test job die in its part of a recovery: ``--die rank:quorum:stage[:how[:incarnation]]``.

A replacement takes part in recoveries before its program runs, so this stands on ``PYTHONPATH``, where the interpreter
finds it first.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning_flashrl.supervisor import runner


def _faults() -> list[tuple[int, str, str]]:
    """(quorum, stage, how) of this process."""
    me = (int(os.environ["RANK"]), int(os.environ["FLASHRL_INCARNATION"]))
    found = []
    for option, line in zip(sys.argv, sys.argv[1:], strict=False):
        if option == "--die":
            rank, at, where, how, incarnation = (line.split(":") + ["kill", "0"][line.count(":") - 2 :])[:5]
            if me == (int(rank), int(incarnation)):
                found.append((int(at), where, how))
    return found


def _prepare() -> None:
    faults = _faults()
    if not faults and "--send" not in sys.argv:
        return
    from lightning_flashrl.communicator.communicator import Communicator
    from lightning_flashrl.recovery.faults import How
    from lightning_flashrl.recovery.slot import Word
    from lightning_flashrl.strategies import memory, transfer
    from lightning_flashrl.supervisor.client import RankClient

    client = RankClient.from_environ()
    assert client is not None

    def before(owner: Any, name: str, stage: str) -> None:
        original, seen = getattr(owner, name), set[int]()

        def dying(*arguments: Any, **keywords: Any) -> Any:
            quorum = client.slot[Word.QUORUM_ID]
            for at, where, how in faults:
                if (at, where) == (quorum, stage) and quorum not in seen:
                    seen.add(quorum)
                    How(how).strike()
            return original(*arguments, **keywords)

        setattr(owner, name, dying)

    before(RankClient, "send_report", "report")
    before(RankClient, "send_restored", "restored")
    before(Communicator, "reconnect", "rendezvous")
    before(Communicator, "join", "rendezvous")
    before(Communicator, "redo", "redo")
    before(Communicator, "enter", "enter")
    before(Communicator, "close", "left")
    before(transfer, "send_state", "give")
    before(transfer, "_hear_whether_taken", "giving")
    before(transfer.Arrival, "__init__", "arrival")
    before(transfer.Arrival, "finish", "take")
    if "--send" in sys.argv:

        def refuse(*_: Any) -> None:
            raise memory.ForeignMemoryError("switched off")

        memory.read_tensors = refuse


if "FLASHRL_SLOT_FDS" in os.environ or "FLASHRL_STANDBY_FD" in os.environ:
    runner.before_program.append(_prepare)
