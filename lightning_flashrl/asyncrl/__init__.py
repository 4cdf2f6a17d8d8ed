"""Asynchronous reinforcement learning with Lightning: the module, the data module, their settings."""

from lightning_flashrl.asyncrl.datamodule import StepBatch, StreamingDataModule
from lightning_flashrl.asyncrl.module import AsyncRL
from lightning_flashrl.asyncrl.service import RLClient, RLService
from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow

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
