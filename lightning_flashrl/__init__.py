"""Training that survives the death of any process, and streaming RL on top of it.

Importing this package makes ``Trainer(strategy="flash_ddp")`` known, before or after ``import lightning``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_flashrl import _registration

if TYPE_CHECKING:
    from lightning_flashrl.asyncrl import AsyncRL, StreamingDataModule
    from lightning_flashrl.callbacks import FlashRecovery
    from lightning_flashrl.strategies import FlashDDPNotebookStrategy, FlashDDPStrategy
    from lightning_flashrl.supervisor.pause import pause_hang_detection
    from lightning_flashrl.testing.faults import FaultSchedule
    from lightning_flashrl.types import Phase, StepTag

__version__ = "0.1.0"

_HOMES = {
    "AsyncRL": "lightning_flashrl.asyncrl",
    "FaultSchedule": "lightning_flashrl.testing.faults",
    "FlashDDPNotebookStrategy": "lightning_flashrl.strategies",
    "FlashDDPStrategy": "lightning_flashrl.strategies",
    "FlashRecovery": "lightning_flashrl.callbacks",
    "Phase": "lightning_flashrl.types",
    "StepTag": "lightning_flashrl.types",
    "StreamingDataModule": "lightning_flashrl.asyncrl",
    "pause_hang_detection": "lightning_flashrl.supervisor.pause",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_registration.register_strategies()
