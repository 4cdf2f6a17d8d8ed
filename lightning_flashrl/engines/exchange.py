"""What of a model goes from a trainer to its rollout engines.

A model with LoRA adapters exchanges these only: the rest is the same on both sides from the start and never changes.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_flashrl.errors import ConfigurationError


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    return hasattr(model, "peft_config")


def is_adapter(name: str) -> bool:
    """Whether a weight of a model with adapters is part of one.

    >>> is_adapter("model.layers.0.mlp.up_proj.lora_A.default.weight"), is_adapter("model.norm.weight")
    (True, False)
    """
    return any(part.startswith("lora_") for part in name.split("."))


def exchanged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a trainer publishes and a rollout engine loads: the adapters if there are any, else all weights.

    They are the live ones, by the names of ``model.state_dict()``.
    """
    weights = model.state_dict()
    if not has_adapters(model):
        return weights
    return {name: weight for name, weight in weights.items() if is_adapter(name)}


def check_trainable(model: nn.Module) -> None:
    """Look whether all that is trained is also exchanged.

    Raises:
        ConfigurationError: rollouts would miss what is trained.
    """
    exchanged = exchanged_weights(model).keys()
    left = [name for name, weight in model.named_parameters() if weight.requires_grad and name not in exchanged]
    if left:
        raise ConfigurationError(
            f"the model has adapters and trains {len(left)} weight(s) beside LoRA's ({', '.join(left[:3])}), which "
            "rollout engines would not get; freeze them, or train without adapters"
        )
