"""Rollout engines, a file each."""

from lightning_flashrl.engines.rollout.generate import TransformersGenerate
from lightning_flashrl.engines.rollout.simulated import LogNormalLengths, RolloutSpeed, SimulatedEngine
from lightning_flashrl.engines.rollout.slot_decoder import SlotDecoder

__all__ = ["LogNormalLengths", "RolloutSpeed", "SimulatedEngine", "SlotDecoder", "TransformersGenerate"]
