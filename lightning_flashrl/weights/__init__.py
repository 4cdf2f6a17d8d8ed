"""Versioned weights, from the trainer to the rollouts, and how old a row may be when it is trained."""

from lightning_flashrl.weights.publisher import WeightPublisher, WeightsAddress, keep, let_go
from lightning_flashrl.weights.receiver import Swap, WeightReceiver
from lightning_flashrl.weights.staleness import Decision, StalenessGate

__all__ = ["Decision", "StalenessGate", "Swap", "WeightPublisher", "WeightReceiver", "WeightsAddress", "keep", "let_go"]
