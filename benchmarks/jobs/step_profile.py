"""Times the parts of flash_ddp's own work in each step, from outside: the package does not know of it."""

from __future__ import annotations

import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from lightning_flashrl.communicator.collectives import Collective
from lightning_flashrl.communicator.communicator import Communicator
from lightning_flashrl.communicator.holding import HoldingProcessGroup
from lightning_flashrl.recovery import bulk, slot, snapshot
from lightning_flashrl.strategies import local_state, session
from lightning_flashrl.strategies.runtime import RecoveryRuntime

PARTS: dict[str, tuple[Any, str]] = {
    "publish": (session.FitSession, "_publish"),
    "publish: capture": (local_state.LocalState, "capture"),
    "publish: capture: random states": (local_state, "capture_rng"),
    "publish: capture: freeze": (snapshot.Freezer, "freeze"),
    "publish: capture: buffers": (bulk.TensorWatch, "look"),
    "publish: loggers": (session, "capture_loggers"),
    "publish: write to the slot": (slot.RankSlot, "write"),
    "gate": (RecoveryRuntime, "await_commit"),
    "gate: wait for the others": (RecoveryRuntime, "_await_slots"),
    "collectives": (HoldingProcessGroup, "_start"),
    "collectives: copies of inputs": (Collective, "save"),
    "collectives: native call": (Collective, "issue"),
    "forget inputs": (Communicator, "truncate"),
    "phases": (RecoveryRuntime, "enter_phase"),
}
"""What is timed; a part with a colon is contained in the part before the colon."""

_spent_ns = dict.fromkeys(PARTS, 0)
_steps: list[dict[str, int]] = []


def install() -> None:
    """Put a timer around each part; a step ends when it is committed."""
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, _timed(part, getattr(owner, name)))
    committed = RecoveryRuntime.committed

    def end_step(runtime: RecoveryRuntime, version: int, **keywords: Any) -> None:
        committed(runtime, version, **keywords)
        _steps.append(dict(_spent_ns))
        _spent_ns.update(dict.fromkeys(PARTS, 0))

    RecoveryRuntime.committed = end_step  # type: ignore[method-assign]


def _timed(part: str, function: Any) -> Any:
    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        began_ns = time.perf_counter_ns()
        try:
            return function(*arguments, **keywords)
        finally:
            _spent_ns[part] += time.perf_counter_ns() - began_ns

    return run


def save(path: Path) -> None:
    """Write the median microseconds a step of each part."""
    steps = _steps[len(_steps) // 4 :]  # the first ones warm up
    path.write_text(json.dumps({part: statistics.median(step[part] for step in steps) / 1e3 for part in PARTS}))
