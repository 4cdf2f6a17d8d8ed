"""The default trainer engine: any transformers causal language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_flashrl.engines.adapters import LoRA, add_lora
from lightning_flashrl.engines.base import Sampling
from lightning_flashrl.engines.exchange import check_trainable, exchanged_weights
from lightning_flashrl.engines.rollout import SlotDecoder
from lightning_flashrl.engines.trainer.batch import TokenBatch
from lightning_flashrl.errors import ConfigurationError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CausalLMTrainer(nn.Module):
    """Computes log-probs of sampled tokens, with gradients. They are float32 whatever the model computes with.

    Args:
        model: the language model. Its dropout is turned off: what is trained is the policy that sampled.
        temperature: that of the rollouts; logits are divided by it, as there.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        lora: train adapters only, and publish only these; needs ``lightning-flashrl[lora]``.

    Raises:
        ConfigurationError: a temperature that is not above 0, a model that cannot checkpoint, adapters that cannot be,
            or weights that are trained beside adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigurationError(f"trainer_engine.temperature={temperature}; use a number above 0")
        if lora is not None:
            add_lora(model, lora)
        check_trainable(model)
        self.model = model
        self.temperature = temperature
        self._lora = lora
        without_dropout(model)
        if gradient_checkpointing:
            try:
                model.activation_checkpointing_enable()
            except ValueError as error:
                raise ConfigurationError(f"trainer_engine.gradient_checkpointing=true: {error}") from error
        model.train()  # without dropout all that this changes is that activations are checkpointed

    @classmethod
    def from_folder(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> CausalLMTrainer:
        """Load a model that ``save_pretrained`` wrote. Nothing is downloaded.

        Args:
            path: the folder.
            dtype: ``"float32"`` or ``"bfloat16"``: of the model's weights. Adapters are float32 always.
            temperature: that of the rollouts.
            gradient_checkpointing: compute activations again in the backward pass.
            lora: train adapters only.

        Raises:
            ConfigurationError: there is no model, or a setting that the class does not take.
        """
        weights = _dtype(dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=weights)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"trainer_engine.path={path!r} holds no model ({error}); give a folder that save_pretrained wrote"
            ) from error
        return cls(model, temperature=temperature, gradient_checkpointing=gradient_checkpointing, lora=lora)

    @classmethod
    def from_config(
        cls,
        model_type: str,
        *,
        dtype: str = "float32",
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        **sizes: object,
    ) -> CausalLMTrainer:
        """Make a model with random weights, as torch's generator stands.

        Args:
            model_type: as transformers calls it: ``"llama"``, ``"qwen3"``, ``"gpt2"``, …
            dtype: ``"float32"`` or ``"bfloat16"``: of the model's weights. Adapters are float32 always.
            temperature: that of the rollouts.
            gradient_checkpointing: compute activations again in the backward pass.
            lora: train adapters only.
            sizes: fields of the model's config.

        Raises:
            ConfigurationError: transformers does not know the type, or a setting that the class does not take.
        """
        weights = _dtype(dtype)
        try:
            config = AutoConfig.for_model(model_type, **sizes)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"trainer_engine.model_type={model_type!r}: {error}") from error
        model = AutoModelForCausalLM.from_config(config, dtype=weights)  # type: ignore[no-untyped-call]
        return cls(model, temperature=temperature, gradient_checkpointing=gradient_checkpointing, lora=lora)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the log-prob of each token but the first, given those before.

        Returns:
            ``[N, L - 1]`` float32; what stands outside the loss mask means nothing.
        """
        logits = self.model(input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False).logits
        logprobs: Tensor = (logits[:, :-1].float() / self.temperature).log_softmax(dim=-1)
        return logprobs.gather(2, batch.tokens[:, 1:, None])[:, :, 0]

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of given tokens, as a rollout engine's ``score`` does, for a publisher's probe.

        Args:
            tokens: ``[L]`` int64, 2 or more.

        Returns:
            ``[L - 1]`` float32, at temperature 1.
        """
        was_training = self.model.training
        self.model.train(False)
        try:
            # Whatever a Trainer computes its steps with: engines compute with the weights as they are.
            with torch.autocast(self.model.device.type, enabled=False):
                logits = self.model(input_ids=tokens[None, :-1].to(self.model.device), use_cache=False).logits[0]
        finally:
            self.model.train(was_training)
        logprobs: Tensor = logits.float().log_softmax(dim=-1).cpu()
        return logprobs.gather(1, tokens[1:, None].cpu())[:, 0]

    def rollout_engine(self, sampling: Sampling, *, num_slots: int, max_length: int) -> SlotDecoder:
        """Return an engine that generates with the live weights, for validation."""
        return SlotDecoder(self.model, sampling, num_slots=num_slots, max_length=max_length)

    def rollout_factory(self, sampling: Sampling, *, num_slots: int, max_length: int) -> Callable[[], SlotDecoder]:
        """Return what makes an engine of the same model in another process, where it loads :meth:`weights`."""
        return functools.partial(_make_engine, self._copier(), sampling, num_slots=num_slots, max_length=max_length)

    def twin_factory(self) -> Callable[[], CausalLMTrainer]:
        """Return what makes a trainer engine of the same model in another process, to which :meth:`weights` fit."""
        return functools.partial(_make_twin, self._copier(), self.temperature)

    def _copier(self) -> Callable[[], PreTrainedModel]:
        """Return what makes a model to which :meth:`weights` fit."""
        # With adapters, what is frozen is never published: it goes along.
        published = self.weights().keys()
        frozen = {name: weight.cpu() for name, weight in self.model.state_dict().items() if name not in published}
        return functools.partial(_make_model, self.model.config, self.model.dtype, self._lora, frozen)

    def weights(self) -> Mapping[str, Tensor]:
        """Return what rollout engines load, by name: the adapters if there are any, else all of the model's weights.

        They are the live ones, not copies.
        """
        return exchanged_weights(self.model)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigurationError(f"trainer_engine.dtype={name!r}; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _make_model(
    config: PretrainedConfig, dtype: torch.dtype, lora: LoRA | None, frozen: Mapping[str, Tensor]
) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    if lora is not None:
        add_lora(model, lora)
        model.load_state_dict(dict(frozen), strict=False)
    return model


def _make_engine(
    make_model: Callable[[], PreTrainedModel], sampling: Sampling, *, num_slots: int, max_length: int
) -> SlotDecoder:
    return SlotDecoder(make_model(), sampling, num_slots=num_slots, max_length=max_length)


def _make_twin(make_model: Callable[[], PreTrainedModel], temperature: float) -> CausalLMTrainer:
    return CausalLMTrainer(make_model(), temperature=temperature)


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: those that are modules, and those that attention layers keep as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
