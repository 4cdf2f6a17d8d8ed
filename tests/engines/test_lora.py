"""Adapters: only they are trained and published, and rollouts with them have the trainer's log-probs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_flashrl.engines import Prompt, RolloutEngine, Sampling
from lightning_flashrl.engines.adapters import LoRA, add_lora
from lightning_flashrl.engines.rollout import SlotDecoder, TransformersGenerate
from lightning_flashrl.engines.trainer import CausalLMTrainer, ExperienceBatch
from lightning_flashrl.errors import ConfigurationError, WeightMismatchError
from lightning_flashrl.testing.engines import check_rollout_engine
from lightning_flashrl.weights import WeightPublisher, WeightReceiver

VOCABULARY = 23
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LORA = LoRA(rank=4, alpha=16)
SAMPLING = Sampling(max_new_tokens=10, temperature=0.8, eos_token_id=1)


def _model(kind: str, dtype: str = "float32") -> PreTrainedModel:
    """The same weights each time, far from uniform."""
    torch.manual_seed(5)
    sizes = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **SIZES[kind]}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def _with_adapters(kind: str, seed: int, dtype: str = "float32") -> PreTrainedModel:
    model = _model(kind, dtype)
    torch.manual_seed(seed)
    add_lora(model, LORA)
    return model


def _batch(tokens: Tensor) -> ExperienceBatch:
    count, length = tokens.shape
    mask = torch.ones(count, length - 1, dtype=torch.bool)
    numbers = torch.zeros(count, dtype=torch.int64)
    return ExperienceBatch(
        tokens, torch.ones_like(tokens), mask, mask.float(), mask.long(), mask[:, 0], numbers, numbers
    )


def _train(trainer: CausalLMTrainer, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (-trainer(_batch(torch.randint(2, VOCABULARY, (4, 12), generator=draw))).mean()).backward()
        optimizer.step()


def _slots(model: PreTrainedModel) -> RolloutEngine:
    return SlotDecoder(model, SAMPLING, num_slots=3, max_length=24)


def _batches(model: PreTrainedModel) -> RolloutEngine:
    return TransformersGenerate(model, SAMPLING, batch_size=3, max_length=24)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1)])
@pytest.mark.parametrize("make", [_slots, _batches])
def test_rollouts_have_the_trainers_log_probs_after_each_update(
    kind: str, dtype: str, tolerance: float, make: Callable[[PreTrainedModel], RolloutEngine]
) -> None:
    trainer = CausalLMTrainer(_with_adapters(kind, 1, dtype), temperature=0.8)
    engine = make(_with_adapters(kind, 2, dtype))
    optimizer = torch.optim.Adam([weight for weight in trainer.parameters() if weight.requires_grad], lr=0.02)
    probe = torch.arange(2, 14)
    draw = torch.Generator().manual_seed(3)
    with (
        WeightPublisher(trainer.weights()) as publisher,
        WeightReceiver(publisher.address, tolerance=tolerance) as receiver,
    ):
        scores = [trainer.score(probe)]
        for version in range(1, 4):
            _train(trainer, optimizer, 3)
            scores.append(trainer.score(probe))
            publisher.publish(trainer.weights(), version, probe, scores[-1])
            publisher.wait()
            assert receiver.load(engine) == version
            prompts = [
                Prompt(number, torch.randint(2, VOCABULARY, (1 + number,), generator=draw), seed=10 * version + number)
                for number in range(5)
            ]
            engine.submit(prompts)
            while engine.num_open:
                for completion in engine.step():
                    prompt = prompts[completion.request_id].tokens
                    policy_logprobs = trainer(_batch(torch.cat([prompt, completion.tokens])[None]))
                    assert policy_logprobs.dtype == torch.float32
                    difference = policy_logprobs[0, len(prompt) - 1 :] - completion.logprobs
                    assert difference.abs().max() < tolerance
    for before, after in itertools.pairwise(scores):
        assert (after - before).abs().max() > 3 * tolerance  # else there is nothing to tell versions apart


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_nothing_else_are_trained_and_published(kind: str, dtype: str) -> None:
    trainer = CausalLMTrainer(_model(kind, dtype), lora=LORA)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainable = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trainer.weights().keys() == trainable.keys()
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trainable.items())
    assert sum(map(torch.numel, trainable.values())) < 0.6 * sum(map(torch.numel, _model(kind).parameters()))
    _train(trainer, torch.optim.SGD(trainer.parameters(), lr=0.5, weight_decay=0.1), 3)
    changed = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == trainable.keys()


def test_adapters_begin_as_the_model_without_them() -> None:
    probe = torch.arange(2, 14)
    plain = CausalLMTrainer(_model("llama"))
    torch.testing.assert_close(CausalLMTrainer(_model("llama"), lora=LORA).score(probe), plain.score(probe))


def test_a_small_update_counts_although_the_model_is_coarse() -> None:
    """In bfloat16 a weight of 1 keeps its value when 0.001 is added."""
    trainer = CausalLMTrainer(_model("llama", "bfloat16"), lora=LORA)
    weights = [weight for weight in trainer.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(1.0)
            weight.add_(1e-3)
    assert all((weight > 1).all() for weight in weights)


def test_the_engine_keeps_the_protocol_with_adapters() -> None:
    def trained(seed: int) -> CausalLMTrainer:
        trainer = CausalLMTrainer(_with_adapters("qwen3", seed))
        _train(trainer, torch.optim.Adam(trainer.parameters(), lr=0.05), 6)
        return trainer

    weights, other = trained(1).weights(), trained(2).weights()

    def make(sampling: Sampling) -> SlotDecoder:
        engine = SlotDecoder(_with_adapters("qwen3", 3), sampling, num_slots=3, max_length=20)
        engine.load_weights(weights, 2)
        return engine

    check_rollout_engine(make, other, vocabulary=VOCABULARY)


class TestWeightsThatDoNotFit:
    def test_only_adapters_of_the_same_kind_are_loaded(self) -> None:
        engine = _slots(_with_adapters("llama", 1))
        plain = _slots(_model("llama"))
        weights = CausalLMTrainer(_with_adapters("llama", 2)).weights()
        with pytest.raises(ConfigurationError, match="28 missing"):
            engine.load_weights(_model("llama").state_dict(), 1)
        with pytest.raises(ConfigurationError, match="28 unknown"):
            plain.load_weights(weights, 1)
        with pytest.raises(ConfigurationError, match="21 unknown"):
            engine.load_weights(_with_adapters("llama", 2).state_dict(), 1)
        larger = CausalLMTrainer(_model("llama"), lora=LoRA(rank=5)).weights()
        with pytest.raises(ConfigurationError, match="has the shape"):
            engine.load_weights(larger, 1)
        assert engine.version == 0

    def test_adapters_on_another_model_are_noticed(self) -> None:
        """Names and shapes fit; the probe tells."""
        trainer = CausalLMTrainer(_with_adapters("llama", 1))
        other = _with_adapters("llama", 1)
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(1.1)
        probe = torch.arange(2, 14)
        with WeightPublisher(trainer.weights()) as publisher, WeightReceiver(publisher.address) as receiver:
            publisher.publish(trainer.weights(), 1, probe, trainer.score(probe))
            publisher.wait()
            with pytest.raises(WeightMismatchError):
                receiver.load(_slots(other))


class TestBadInput:
    def test_a_missing_package_is_named_with_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigurationError, match=r"install lightning-flashrl\[lora\]"):
            CausalLMTrainer(_model("llama"), lora=LORA)

    def test_layers_that_are_not_there_are_said(self) -> None:
        with pytest.raises(ConfigurationError, match=r"lora.target_modules=\('nope',\)"):
            CausalLMTrainer(_model("llama"), lora=LoRA(target_modules=("nope",)))

    def test_adapters_are_added_once(self) -> None:
        with pytest.raises(ConfigurationError, match="adapters already"):
            CausalLMTrainer(_with_adapters("llama", 1), lora=LORA)

    def test_what_would_be_trained_and_not_published_is_refused(self) -> None:
        model = _with_adapters("llama", 1)
        model.get_input_embeddings().weight.requires_grad_(True)
        with pytest.raises(
            ConfigurationError, match=r"trains 1 weight\(s\) beside LoRA's \(model.embed_tokens.weight\)"
        ):
            CausalLMTrainer(model)

    @pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0}], ids=str)
    def test_settings_that_cannot_be_are_refused(self, values: dict[str, int]) -> None:
        with pytest.raises(ConfigurationError, match="use 1 or more of each"):
            LoRA(**values)


def test_a_folder_and_a_config_take_adapters(tmp_path: Path) -> None:
    _model("llama").save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    loaded = CausalLMTrainer.from_folder(str(tmp_path / "model"), lora=LORA)
    assert all(torch.equal(weight, loaded.weights()[name]) for name, weight in _adapters(_with_adapters("llama", 1)))
    made = CausalLMTrainer.from_config("llama", vocab_size=VOCABULARY, **_LLAMA, lora=LoRA(target_modules=["q_proj"]))
    assert len(made.weights()) == 4
    assert all(".q_proj.lora_" in name for name in made.weights())


def _adapters(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in model.state_dict().items() if ".lora_" in name]
