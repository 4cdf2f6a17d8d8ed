"""Fault injection for one's own LightningModule: on CPU, in anybody's CI."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.recovery.faults import Fault, How
from lightning_flashrl.strategies.ddp import FlashDDPStrategy
from lightning_flashrl.types import StepTag


class FaultSchedule(Callback):
    """A list of faults, as a callback.

    Each fault strikes once, in whichever process of its rank comes to its place first: the replacement of a struck rank
    is not struck again by the same fault.

    Example:
        >>> from lightning_flashrl.types import Phase
        >>> schedule = FaultSchedule().kill(rank=1, at=StepTag(3, Phase.BACKWARD))
        >>> schedule = schedule.stop(rank=0, at=StepTag(7, Phase.FORWARD))
        >>> [str(fault) for fault in schedule.faults]
        ['kill rank=1 step=3 phase=backward', 'stop rank=0 step=7 phase=forward']
    """

    def __init__(self, faults: list[Fault] | None = None) -> None:
        self.faults = list(faults or [])

    def add(self, rank: int, at: StepTag, how: How, count: int = 1) -> FaultSchedule:
        """Add a fault and return the schedule."""
        self.faults.append(Fault(rank, at, how, count))
        return self

    def kill(self, rank: int, at: StepTag, count: int = 1) -> FaultSchedule:
        """Send SIGKILL to ``rank``."""
        return self.add(rank, at, How.KILL, count)

    def stop(self, rank: int, at: StepTag, count: int = 1) -> FaultSchedule:
        """Send SIGSTOP to ``rank``."""
        return self.add(rank, at, How.STOP, count)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arm the faults of this rank."""
        strategy = trainer.strategy
        if not isinstance(strategy, FlashDDPStrategy) or strategy.runtime is None:
            raise ConfigurationError(
                f"FaultSchedule needs strategy='flash_ddp', the Trainer has {type(strategy).__name__}: with any other "
                "strategy its faults would end the job"
            )
        strategy.runtime.arm(self.faults)

    def __getstate__(self) -> dict[str, Any]:
        return {"faults": []}
