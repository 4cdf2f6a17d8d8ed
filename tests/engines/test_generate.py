"""The generation of transformers, made to draw as the slot decoder does: the two give the same completions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from lightning_flashrl.engines import Completion, Finish, Prompt, RolloutEngine, Sampling
from lightning_flashrl.engines.rollout import SlotDecoder, TransformersGenerate
from lightning_flashrl.errors import ConfigurationError

VOCABULARY = 31
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}


def _sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Weights far from uniform."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def _model(kind: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return _sharpened(MODELS[kind]())


def _prompts(count: int) -> list[Prompt]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=random).tolist()
    return [
        Prompt(number, torch.randint(2, VOCABULARY, (length,), generator=random), seed=100 + number)
        for number, length in enumerate(lengths)
    ]


def _run(engine: RolloutEngine) -> dict[int, Completion]:
    done = {}
    while engine.num_open:
        done.update({completion.request_id: completion for completion in engine.step()})
    return done


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_completions_are_those_of_the_slot_decoder(kind: str, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, eos_token_id=1)
    engines: list[RolloutEngine] = [
        TransformersGenerate(_model(kind, 1), sampling, batch_size=4, max_length=24, version=3),
        SlotDecoder(_model(kind, 1), sampling, num_slots=4, max_length=24, version=3),
    ]
    for engine in engines:
        engine.submit(_prompts(11))
    found, expected = map(_run, engines)
    assert found.keys() == expected.keys()
    for number, completion in found.items():
        assert completion.tokens.tolist() == expected[number].tokens.tolist()
        assert completion.finish is expected[number].finish
        assert completion.versions.tolist() == [3] * len(completion.tokens)
        torch.testing.assert_close(completion.logprobs, expected[number].logprobs, atol=2e-5, rtol=1e-4)
    if temperature == 1:  # both ways to end are there to be compared
        assert {completion.finish for completion in found.values()} == {Finish.STOP, Finish.LENGTH}


def test_models_that_do_not_attend_to_everything_are_generated_with() -> None:
    torch.manual_seed(2)
    model = _sharpened(MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)))
    engine = TransformersGenerate(model, Sampling(max_new_tokens=12), batch_size=3, max_length=24)
    prompts = _prompts(6)
    engine.submit(prompts)
    done = _run(engine)
    for prompt in prompts:
        tokens = torch.cat([prompt.tokens, done[prompt.request_id].tokens])
        scores = engine.score(tokens)[len(prompt.tokens) - 1 :]
        torch.testing.assert_close(done[prompt.request_id].logprobs, scores, atol=2e-5, rtol=1e-4)


def test_generation_settings_of_the_model_are_put_aside() -> None:
    """A penalty would change the distribution that is drawn from, and then log-probs would not be the trainer's."""
    plain, set_up = _model("llama", 3), _model("llama", 3)
    set_up.generation_config = GenerationConfig(
        repetition_penalty=3.0, suppress_tokens=[4, 5, 6], eos_token_id=7, max_new_tokens=2, top_k=1
    )
    sampling = Sampling(max_new_tokens=10)
    engines = [TransformersGenerate(model, sampling, max_length=24) for model in (plain, set_up)]
    for engine in engines:
        engine.submit(_prompts(6))
    expected, found = map(_run, engines)
    assert {number: done.tokens.tolist() for number, done in found.items()} == {
        number: done.tokens.tolist() for number, done in expected.items()
    }


def test_an_interruption_returns_what_has_not_begun_and_what_had_begun_before() -> None:
    sampling = Sampling(max_new_tokens=10)
    prompts = _prompts(5)
    whole = TransformersGenerate(_model("llama", 4), sampling, max_length=24)
    whole.submit(prompts)
    expected = _run(whole)
    decoder = SlotDecoder(_model("llama", 4), sampling, num_slots=5, max_length=24)
    decoder.submit(prompts)
    for _ in range(4):
        decoder.step()
    begun = {completion.request_id: completion for completion in decoder.interrupt()}
    engine = TransformersGenerate(_model("llama", 4), sampling, batch_size=2, max_length=24)
    engine.submit(
        [Prompt(p.request_id, p.tokens, p.seed, begun[p.request_id] if p.request_id % 2 else None) for p in prompts]
    )
    done = {completion.request_id: completion for completion in engine.step()}
    assert sorted(done) == [0, 1]
    stopped = {completion.request_id: completion for completion in engine.interrupt()}
    assert {number: len(completion.tokens) for number, completion in stopped.items()} == {2: 0, 3: 4, 4: 0}
    assert all(completion.finish is Finish.INTERRUPTED for completion in stopped.values())
    engine.submit([Prompt(p.request_id, p.tokens, p.seed, stopped[p.request_id]) for p in prompts[2:]])
    done.update(_run(engine))
    for number in range(5):
        assert done[number].tokens.tolist() == expected[number].tokens.tolist()


def test_a_batch_that_fails_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = _prompts(3)
    whole = TransformersGenerate(_model("llama", 5), Sampling(max_new_tokens=8), max_length=24)
    whole.submit(prompts)
    expected = _run(whole)
    model = _model("llama", 5)
    engine = TransformersGenerate(model, Sampling(max_new_tokens=8), max_length=24)
    engine.submit(prompts)
    calls = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return type(model).forward(model, *args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    assert engine.num_open == 3
    assert [len(completion.tokens) for completion in engine.interrupt()] == [3, 3, 3]
    engine.submit(prompts)
    assert {number: done.tokens.tolist() for number, done in _run(engine).items()} == {
        number: done.tokens.tolist() for number, done in expected.items()
    }


def test_what_cannot_be_is_refused() -> None:
    sampling = Sampling(max_new_tokens=4)
    for options in ({"batch_size": 0}, {"max_length": 1}):
        with pytest.raises(ConfigurationError, match="use 1 or more"):
            TransformersGenerate(_model("llama", 0), sampling, **options)
    finished = Completion(1, torch.tensor([2] * 4), torch.zeros(4), torch.zeros(4, dtype=torch.int64), Finish.LENGTH)
    engine = TransformersGenerate(_model("llama", 0), sampling, max_length=8)
    with pytest.raises(ConfigurationError, match="has begun with 4 tokens"):
        engine.submit([Prompt(1, torch.tensor([3]), begun=finished)])
    assert engine.step() == []
