"""LoRA adapters through ``peft``: a few small matrices are trained and published, the model stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_flashrl.engines.exchange import has_adapters, is_adapter
from lightning_flashrl.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Which layers get adapters, and how large.

    There is no dropout: what is trained is the policy that sampled.

    Attributes:
        rank: of each adapter's two matrices.
        alpha: their product counts ``alpha / rank`` times.
        target_modules: names of layers, as peft takes them; ``"all-linear"`` for all but the output layer.

    Raises:
        ConfigurationError: no rank, or no weight.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ConfigurationError(f"lora.rank={self.rank}, lora.alpha={self.alpha}; use 1 or more of each")


def add_lora(model: PreTrainedModel, lora: LoRA) -> None:
    """Put adapters into a model and freeze everything else.

    They begin as the identity, and are kept in float32 whatever the model is: small updates are lost in bfloat16. A
    rollout engine's model gets the same adapters by the same call, and their values from the trainer.

    Raises:
        ConfigurationError: peft is not installed, the model has adapters already, or no layer has these names.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigurationError(f"LoRA needs the package peft ({error}); install lightning-flashrl[lora]") from error
    if has_adapters(model):
        raise ConfigurationError("the model has adapters already; add them once, to the plain model")
    targets = lora.target_modules
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        model.add_adapter(settings)
    except ValueError as error:
        raise ConfigurationError(f"lora.target_modules={targets!r}: {error}") from error
    for name, weight in model.named_parameters():
        if is_adapter(name):
            weight.data = weight.data.float()
