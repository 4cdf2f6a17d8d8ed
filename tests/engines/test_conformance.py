"""Every engine keeps the protocol, and the check finds those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_flashrl.engines import Completion, Sampling
from lightning_flashrl.engines.bigram import BigramPolicy
from lightning_flashrl.engines.rollout import SimulatedEngine, SlotDecoder, TransformersGenerate
from lightning_flashrl.testing.engines import check_rollout_engine


def _model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


@pytest.mark.parametrize("num_slots", [1, 3, 16])
@pytest.mark.parametrize("recompute_cache", [False, True])
def test_the_slot_decoder_keeps_it(num_slots: int, recompute_cache: bool) -> None:
    def make(sampling: Sampling) -> SlotDecoder:
        return SlotDecoder(
            _model(0), sampling, num_slots=num_slots, max_length=20, recompute_cache=recompute_cache, version=2
        )

    check_rollout_engine(make, _model(1).state_dict(), vocabulary=23)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_generation_of_transformers_keeps_it(batch_size: int) -> None:
    def make(sampling: Sampling) -> TransformersGenerate:
        return TransformersGenerate(_model(0), sampling, batch_size=batch_size, max_length=20, version=2)

    check_rollout_engine(make, _model(1).state_dict(), vocabulary=23)


@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_the_simulated_engine_keeps_it(num_slots: int) -> None:
    def make(sampling: Sampling) -> SimulatedEngine:
        return SimulatedEngine(sampling, vocabulary=23, num_slots=num_slots, max_length=20, version=2)

    check_rollout_engine(make, BigramPolicy(23, seed=1).state_dict(), vocabulary=23)


class KeepsOldWeights(SlotDecoder):
    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version


class ForgetsVersions(SlotDecoder):
    def step(self) -> list[Completion]:
        return [
            Completion(done.request_id, done.tokens, done.logprobs, done.versions * 0, done.finish)
            for done in super().step()
        ]


class RoundsLogprobs(SlotDecoder):
    def step(self) -> list[Completion]:
        return [
            Completion(done.request_id, done.tokens, done.logprobs.round(), done.versions, done.finish)
            for done in super().step()
        ]


class LosesRequests(SlotDecoder):
    def interrupt(self) -> list[Completion]:
        return super().interrupt()[1:]


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (KeepsOldWeights, "loaded weights are used"),
        (ForgetsVersions, "tokens name the version"),
        (RoundsLogprobs, "log-probs are the model's own"),
        (LosesRequests, "returns every open request"),
    ],
)
def test_a_broken_promise_is_found(broken: type[SlotDecoder], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_rollout_engine(
            lambda sampling: broken(_model(0), sampling, num_slots=3, max_length=20, version=2),
            _model(1).state_dict(),
            vocabulary=23,
        )
