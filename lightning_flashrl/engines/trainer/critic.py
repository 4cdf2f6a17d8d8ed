"""The default critic: the body of any transformers causal language model, with a head of one number."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lightning_flashrl.engines.trainer.batch import TokenBatch
from lightning_flashrl.engines.trainer.causal_lm import CausalLMTrainer, without_dropout
from lightning_flashrl.errors import ConfigurationError

_HEAD_FILE = "value_head.pt"


class CausalLMCritic(nn.Module):
    """Computes values of the tokens of a completion, with gradients.

    Its head begins with zeros: every value is 0 before the first update, so that advantages begin as rewards.

    Args:
        body: the language model without its head. Its dropout is turned off.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(self, body: PreTrainedModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, 1, dtype=body.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        without_dropout(body)
        if gradient_checkpointing:
            body.activation_checkpointing_enable()

    @classmethod
    def from_folder(cls, path: str | Path, *, gradient_checkpointing: bool = False) -> CausalLMCritic:
        """Load a model that ``save_pretrained`` wrote, its own or that of a language model. Nothing is downloaded.

        Raises:
            ConfigurationError: there is no model.
        """
        try:
            body = AutoModel.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"critic_engine.path={str(path)!r} holds no model ({error}); give a folder that save_pretrained wrote"
            ) from error
        critic = cls(body, gradient_checkpointing=gradient_checkpointing)
        head = Path(path) / _HEAD_FILE
        if head.exists():
            critic.head.load_state_dict(torch.load(head, weights_only=True))
        return critic

    @classmethod
    def from_config(cls, model_type: str, *, gradient_checkpointing: bool = False, **sizes: object) -> CausalLMCritic:
        """Make a critic with a random body, as torch's generator stands.

        Args:
            model_type: as transformers calls it: ``"llama"``, ``"qwen3"``, ``"gpt2"``, …
            gradient_checkpointing: compute activations again in the backward pass.
            sizes: fields of the model's config.

        Raises:
            ConfigurationError: transformers does not know the type.
        """
        try:
            config = AutoConfig.for_model(model_type, **sizes)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"critic_engine.model_type={model_type!r}: {error}") from error
        return cls(
            AutoModel.from_config(config),  # type: ignore[no-untyped-call]
            gradient_checkpointing=gradient_checkpointing,
        )

    @classmethod
    def from_policy(cls, policy: CausalLMTrainer, *, gradient_checkpointing: bool = False) -> CausalLMCritic:
        """Make a critic whose body begins as a copy of the policy's: it reads already."""
        body = copy.deepcopy(policy.model.base_model)
        assert isinstance(body, PreTrainedModel)
        return cls(body, gradient_checkpointing=gradient_checkpointing)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the value before each token but the first.

        Returns:
            ``[N, L - 1]`` float32; what stands outside the loss mask means nothing.
        """
        states = self.body(input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False)
        values: Tensor = self.head(states.last_hidden_state[:, :-1])
        return values[:, :, 0].float()

    def save_pretrained(self, path: str | Path) -> None:
        """Write what :meth:`from_folder` reads."""
        self.body.save_pretrained(path)
        torch.save(self.head.state_dict(), Path(path) / _HEAD_FILE)
