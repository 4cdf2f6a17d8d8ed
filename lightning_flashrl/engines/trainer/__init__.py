"""Trainer engines, a file each, and the batches that they read. Imported when asked for, as rollout engines are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_flashrl import _lazy

if TYPE_CHECKING:
    from lightning_flashrl.engines.trainer.batch import ExperienceBatch, TokenBatch
    from lightning_flashrl.engines.trainer.causal_lm import CausalLMTrainer
    from lightning_flashrl.engines.trainer.critic import CausalLMCritic
    from lightning_flashrl.engines.trainer.simulated import SimulatedTrainer

_HOMES = {
    "CausalLMCritic": "critic",
    "CausalLMTrainer": "causal_lm",
    "ExperienceBatch": "batch",
    "SimulatedTrainer": "simulated",
    "TokenBatch": "batch",
}

__all__ = ["CausalLMCritic", "CausalLMTrainer", "ExperienceBatch", "SimulatedTrainer", "TokenBatch"]

__getattr__, __dir__ = _lazy.hooks(__name__, _HOMES)
