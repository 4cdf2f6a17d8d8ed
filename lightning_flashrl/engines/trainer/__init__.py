"""Trainer engines, a file each, and the batches that they read."""

from lightning_flashrl.engines.trainer.batch import ExperienceBatch, TokenBatch
from lightning_flashrl.engines.trainer.causal_lm import CausalLMTrainer
from lightning_flashrl.engines.trainer.critic import CausalLMCritic
from lightning_flashrl.engines.trainer.simulated import SimulatedTrainer

__all__ = ["CausalLMCritic", "CausalLMTrainer", "ExperienceBatch", "SimulatedTrainer", "TokenBatch"]
