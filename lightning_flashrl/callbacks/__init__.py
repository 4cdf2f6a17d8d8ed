"""Lightning callbacks of this package, one a file."""

from lightning_flashrl.callbacks.flash_recovery import FlashRecovery

__all__ = ["FlashRecovery"]
