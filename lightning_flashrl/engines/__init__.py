"""What generates and what trains, behind small protocols."""

from lightning_flashrl.engines.base import Completion, Finish, Prompt, RolloutEngine, Sampling, TrainerEngine

__all__ = ["Completion", "Finish", "Prompt", "RolloutEngine", "Sampling", "TrainerEngine"]
