"""Training that survives the death of any process, and streaming RL on top of it.

Importing this package makes ``Trainer(strategy="flash_ddp")`` known, before or after ``import lightning``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_flashrl import _lazy, _registration

if TYPE_CHECKING:
    from lightning_flashrl.asyncrl import AsyncRL, StreamingDataModule
    from lightning_flashrl.callbacks import FlashRecovery
    from lightning_flashrl.strategies import FlashDDPNotebookStrategy, FlashDDPStrategy
    from lightning_flashrl.supervisor.pause import pause_hang_detection
    from lightning_flashrl.testing.faults import FaultSchedule
    from lightning_flashrl.types import Phase, StepTag

__version__ = "0.1.0"

_HOMES = {
    "AsyncRL": "asyncrl",
    "FaultSchedule": "testing.faults",
    "FlashDDPNotebookStrategy": "strategies",
    "FlashDDPStrategy": "strategies",
    "FlashRecovery": "callbacks",
    "Phase": "types",
    "StepTag": "types",
    "StreamingDataModule": "asyncrl",
    "pause_hang_detection": "supervisor.pause",
}

__all__ = [
    "AsyncRL",
    "FaultSchedule",
    "FlashDDPNotebookStrategy",
    "FlashDDPStrategy",
    "FlashRecovery",
    "Phase",
    "StepTag",
    "StreamingDataModule",
    "pause_hang_detection",
]


__getattr__, __dir__ = _lazy.hooks(__name__, _HOMES)


_registration.register_strategies()
