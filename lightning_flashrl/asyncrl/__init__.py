"""Asynchronous reinforcement learning with Lightning: the module, the data module, their settings.

Names are imported when they are asked for: the process of a run's host needs no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_flashrl import _lazy

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


__getattr__, __dir__ = _lazy.hooks(__name__, _HOMES)
