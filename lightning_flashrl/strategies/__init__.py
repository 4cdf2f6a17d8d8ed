"""Lightning strategies whose ranks may die."""

from typing import Any

from lightning.pytorch.strategies import Strategy

from lightning_flashrl.strategies.ddp import FlashDDPStrategy
from lightning_flashrl.strategies.environment import FlashEnvironment
from lightning_flashrl.strategies.notebook import FlashDDPNotebookStrategy

__all__ = ["FlashDDPNotebookStrategy", "FlashDDPStrategy", "FlashEnvironment", "make_strategy"]

_CLASSES = {"flash_ddp": FlashDDPStrategy, "flash_ddp_notebook": FlashDDPNotebookStrategy}


def make_strategy(name: str, **kwargs: Any) -> Strategy:
    """Build the strategy registered under ``name``."""
    return _CLASSES[name](**kwargs)
