"""Rollout engines, a file each. They are imported when they are asked for: not every process needs transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_flashrl import _lazy

if TYPE_CHECKING:
    from lightning_flashrl.engines.rollout.generate import TransformersGenerate
    from lightning_flashrl.engines.rollout.simulated import LogNormalLengths, RolloutSpeed, SimulatedEngine
    from lightning_flashrl.engines.rollout.slot_decoder import SlotDecoder

_HOMES = {
    "LogNormalLengths": "simulated",
    "RolloutSpeed": "simulated",
    "SimulatedEngine": "simulated",
    "SlotDecoder": "slot_decoder",
    "TransformersGenerate": "generate",
}

__all__ = ["LogNormalLengths", "RolloutSpeed", "SimulatedEngine", "SlotDecoder", "TransformersGenerate"]

__getattr__, __dir__ = _lazy.hooks(__name__, _HOMES)
