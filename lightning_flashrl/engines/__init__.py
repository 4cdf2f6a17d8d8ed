"""What generates and what trains, behind small protocols."""

from lightning_flashrl.engines.base import (
    Completion,
    CriticEngine,
    Finish,
    Prompt,
    RolloutEngine,
    Sampling,
    TrainerEngine,
)

__all__ = ["Completion", "CriticEngine", "Finish", "Prompt", "RolloutEngine", "Sampling", "TrainerEngine"]
