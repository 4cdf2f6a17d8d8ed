"""Asynchronous reinforcement learning with Lightning: the module, the data module, their settings.

Names are imported when they are asked for: the process of a run's host needs no Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_flashrl.asyncrl.datamodule import StepBatch, StreamingDataModule
    from lightning_flashrl.asyncrl.module import AsyncRL
    from lightning_flashrl.asyncrl.service import RLClient, RLService
    from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow

_HOMES = {
    "AsyncRL": "module",
    "RLClient": "service",
    "RLService": "service",
    "RolloutSettings": "settings",
    "StepBatch": "datamodule",
    "StepSettings": "settings",
    "StreamingDataModule": "datamodule",
    "Workflow": "settings",
}

__all__ = [
    "AsyncRL",
    "RLClient",
    "RLService",
    "RolloutSettings",
    "StepBatch",
    "StepSettings",
    "StreamingDataModule",
    "Workflow",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
