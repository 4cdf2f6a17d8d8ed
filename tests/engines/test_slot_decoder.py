"""Completions are those of the model: tokens as its own generation, log-probs as the trainer's forward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from lightning_flashrl.engines import Completion, Finish, Prompt, Sampling
from lightning_flashrl.engines.rollout import SlotDecoder
from lightning_flashrl.errors import ConfigurationError

VOCABULARY = 31
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_attention_heads=4, num_key_value_heads=2))


def _llama_tied() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_attention_heads=4, tie_word_embeddings=True))


def _qwen() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128))


MODELS = {"llama": _llama, "llama with tied embeddings": _llama_tied, "qwen3": _qwen, "gpt2": _gpt2}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def make_model(request: pytest.FixtureRequest) -> Callable[[int], PreTrainedModel]:
    """Make a model of each kind, with weights far from uniform."""

    def make(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        model: PreTrainedModel = request.param()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(4)
        return model.eval()

    return make


def _prompts(count: int, seed: int = 0) -> list[Prompt]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=draw).tolist()
    return [
        Prompt(number, torch.randint(2, VOCABULARY, (length,), generator=draw), seed=100 + number)
        for number, length in enumerate(lengths)
    ]


def _run(engine: SlotDecoder) -> dict[int, Completion]:
    done = {}
    while engine.num_open:
        done.update({completion.request_id: completion for completion in engine.step()})
    return done


def _forward_logprobs(model: PreTrainedModel, prompt: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """What a trainer computes."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, tokens])[None, :-1]).logits[0]
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 :].gather(1, tokens[:, None])[:, 0]


def test_log_probs_are_those_of_the_trainer(make_model: Callable[[int], PreTrainedModel]) -> None:
    model = make_model(1)
    sampling = Sampling(max_new_tokens=12, temperature=0.7, eos_token_id=1)
    engine = SlotDecoder(model, sampling, num_slots=4, max_length=24)
    prompts = _prompts(11)
    engine.submit(prompts)
    done = _run(engine)
    assert sorted(done) == list(range(11))
    for prompt in prompts:
        completion = done[prompt.request_id]
        expected = _forward_logprobs(model, prompt.tokens, completion.tokens, 0.7)
        torch.testing.assert_close(completion.logprobs, expected, atol=2e-5, rtol=1e-4)
        is_stopped = completion.tokens[-1].item() == 1
        assert completion.finish is (Finish.STOP if is_stopped else Finish.LENGTH)
        assert is_stopped or len(completion.tokens) == 12
        assert 1 not in completion.tokens[:-1]


def test_greedy_tokens_are_those_of_the_models_own_generation(make_model: Callable[[int], PreTrainedModel]) -> None:
    model = make_model(2)
    engine = SlotDecoder(model, Sampling(max_new_tokens=10, temperature=0), num_slots=3, max_length=20)
    prompts = _prompts(7)
    engine.submit(prompts)
    done = _run(engine)
    for prompt in prompts:
        expected = model.generate(
            prompt.tokens[None],
            attention_mask=torch.ones_like(prompt.tokens[None]),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt.tokens) :]
        assert done[prompt.request_id].tokens.tolist() == expected.tolist()


def test_a_completion_does_not_depend_on_its_neighbours(make_model: Callable[[int], PreTrainedModel]) -> None:
    model = make_model(3)
    sampling = Sampling(max_new_tokens=15, eos_token_id=1)
    prompts = _prompts(9)
    found = []
    for num_slots in (1, 4, 16):
        engine = SlotDecoder(model, sampling, num_slots=num_slots, max_length=24)
        engine.submit(prompts)
        done = _run(engine)
        found.append([done[number].tokens.tolist() for number in range(9)])
    assert found[0] == found[1] == found[2]


def test_draws_follow_the_model(make_model: Callable[[int], PreTrainedModel]) -> None:
    model = make_model(4)
    prompt = torch.tensor([5, 9, 3])
    engine = SlotDecoder(model, Sampling(max_new_tokens=1), num_slots=500, max_length=8)
    engine.submit([Prompt(number, prompt, seed=number) for number in range(4000)])
    counts = torch.bincount(
        torch.stack([completion.tokens[0] for completion in _run(engine).values()]), minlength=VOCABULARY
    )
    with torch.no_grad():
        expected = model(input_ids=prompt[None]).logits[0, -1].softmax(-1)
    assert (counts / 4000 - expected).abs().max() < 0.03
    assert (counts[expected < 1e-9] == 0).all()


def test_an_interrupted_rollout_goes_on_as_if_nothing_had_been(make_model: Callable[[int], PreTrainedModel]) -> None:
    model = make_model(5)
    sampling = Sampling(max_new_tokens=14, eos_token_id=1)
    prompts = _prompts(6)
    whole = SlotDecoder(model, sampling, num_slots=3, max_length=24)
    whole.submit(prompts)
    expected = _run(whole)
    engine = SlotDecoder(model, sampling, num_slots=3, max_length=24)
    engine.submit(prompts)
    done = {}
    for _ in range(5):
        done.update({completion.request_id: completion for completion in engine.step()})
    stopped = engine.interrupt()
    assert engine.num_open == 0
    assert all(completion.finish is Finish.INTERRUPTED for completion in stopped)
    assert any(len(completion.tokens) > 0 for completion in stopped)
    assert sorted([*done, *(completion.request_id for completion in stopped)]) == list(range(6))
    by_id = {prompt.request_id: prompt for prompt in prompts}
    engine.submit(
        [
            Prompt(begun.request_id, by_id[begun.request_id].tokens, by_id[begun.request_id].seed, begun)
            for begun in stopped
        ]
    )
    done.update(_run(engine))
    for number in range(6):
        assert done[number].tokens.tolist() == expected[number].tokens.tolist()
        torch.testing.assert_close(done[number].logprobs, expected[number].logprobs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute_cache", [False, True])
def test_weights_change_between_two_tokens(make_model: Callable[[int], PreTrainedModel], recompute_cache: bool) -> None:
    old, new = make_model(6), make_model(7)
    sampling = Sampling(max_new_tokens=12)
    engine = SlotDecoder(
        make_model(6), sampling, num_slots=4, max_length=24, recompute_cache=recompute_cache, version=3
    )
    prompts = _prompts(4)
    engine.submit(prompts)
    for _ in range(5):
        engine.step()
    engine.load_weights(new.state_dict(), 4)
    done = _run(engine)
    for prompt in prompts:
        completion = done[prompt.request_id]
        assert completion.versions.tolist() == [3] * 5 + [4] * 7
        before = _forward_logprobs(old, prompt.tokens, completion.tokens)
        after = _forward_logprobs(new, prompt.tokens, completion.tokens)
        torch.testing.assert_close(completion.logprobs[:5], before[:5], atol=2e-5, rtol=1e-4)
        if recompute_cache:
            torch.testing.assert_close(completion.logprobs[5:], after[5:], atol=2e-5, rtol=1e-4)


def test_scores_tell_which_weights_are_there(make_model: Callable[[int], PreTrainedModel]) -> None:
    old, new = make_model(8), make_model(9)
    engine = SlotDecoder(make_model(8), Sampling(max_new_tokens=1), num_slots=1, max_length=12)
    probe = torch.arange(3, 11)
    torch.testing.assert_close(engine.score(probe), _forward_logprobs(old, probe[:1], probe[1:]), atol=1e-6, rtol=1e-5)
    engine.load_weights(new.state_dict(), 1)
    torch.testing.assert_close(engine.score(probe), _forward_logprobs(new, probe[:1], probe[1:]), atol=1e-6, rtol=1e-5)


class TestBadInput:
    @pytest.fixture
    def engine(self) -> SlotDecoder:
        torch.manual_seed(0)
        return SlotDecoder(_llama(), Sampling(max_new_tokens=4), num_slots=2, max_length=8)

    def test_prompts_that_cannot_be_are_refused_together(self, engine: SlotDecoder) -> None:
        good = Prompt(1, torch.tensor([3]))
        for bad, words in [
            (Prompt(2, torch.zeros(0, dtype=torch.int64)), "prompt of 0 tokens"),
            (Prompt(2, torch.ones(5, dtype=torch.int64)), "it may have 1 to 4"),
            (Prompt(1, torch.tensor([4])), "request 1 is under way already"),
        ]:
            with pytest.raises(ConfigurationError, match=words):
                engine.submit([good, bad])
            assert engine.num_open == 0

    def test_weights_of_another_model_are_refused(self, engine: SlotDecoder) -> None:
        weights = dict(_llama().state_dict())
        name = "model.norm.weight"
        with pytest.raises(ConfigurationError, match=r"1 missing \(model\.norm\.weight\), 0 unknown"):
            engine.load_weights({key: value for key, value in weights.items() if key != name}, 1)
        with pytest.raises(ConfigurationError, match=r"'model\.norm\.weight' has the shape \[7\]"):
            engine.load_weights({**weights, name: torch.zeros(7)}, 1)
        assert engine.version == 0

    def test_settings_that_cannot_be_are_refused(self) -> None:
        for make in (
            lambda: Sampling(max_new_tokens=0),
            lambda: Sampling(max_new_tokens=1, temperature=-0.1),
            lambda: SlotDecoder(_llama(), Sampling(max_new_tokens=1), num_slots=0),
            lambda: SlotDecoder(_llama(), Sampling(max_new_tokens=1), max_length=1),
        ):
            with pytest.raises(ConfigurationError):
                make()

    def test_no_requests_are_no_work(self, engine: SlotDecoder) -> None:
        assert engine.step() == []
        assert engine.interrupt() == []
