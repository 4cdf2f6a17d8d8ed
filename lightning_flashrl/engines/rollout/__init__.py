"""Rollout engines, a file each."""

from lightning_flashrl.engines.rollout.generate import TransformersGenerate
from lightning_flashrl.engines.rollout.slot_decoder import SlotDecoder

__all__ = ["SlotDecoder", "TransformersGenerate"]
