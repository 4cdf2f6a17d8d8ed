"""Trainer engines, a file each, and the batches that they read."""

from lightning_flashrl.engines.trainer.batch import ExperienceBatch
from lightning_flashrl.engines.trainer.causal_lm import CausalLMTrainer
from lightning_flashrl.engines.trainer.simulated import SimulatedTrainer

__all__ = ["CausalLMTrainer", "ExperienceBatch", "SimulatedTrainer"]
