"""The trainer's log-probs are those of the rollouts, for rows of any length beside each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_flashrl.algorithms import clipped_surrogate, group_advantages, mismatch_metrics, reduce_tokens
from lightning_flashrl.engines import Sampling
from lightning_flashrl.engines.adapters import LoRA
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.rollout import SlotDecoder
from lightning_flashrl.engines.trainer import CausalLMTrainer, ExperienceBatch, TokenBatch
from lightning_flashrl.engines.trainer.batch import cheapest_passes
from lightning_flashrl.engines.worker import RolloutWorker
from lightning_flashrl.errors import ConfigurationError, SchemaMismatchError
from lightning_flashrl.streaming import Batch, TransferQueue
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort

TASK = DigitSort()
TOKENIZER = CharacterTokenizer(TASK.alphabet)
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_dropout": 0.5,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def _trainer(kind: str, seed: int = 0, **options: Any) -> CausalLMTrainer:
    torch.manual_seed(seed)
    return CausalLMTrainer.from_config(kind, vocab_size=len(TOKENIZER), **SIZES[kind], **options)


def _rollouts(trainer: CausalLMTrainer, count: int, temperature: float = 1.0) -> Batch:
    """Completions by an engine with the trainer's weights."""
    other = _trainer(str(trainer.model.config.model_type), seed=99).model
    sampling = Sampling(max_new_tokens=8, temperature=temperature, eos_token_id=TOKENIZER.eos_token_id)
    engine = SlotDecoder(other, sampling, num_slots=4, max_length=24)
    engine.load_weights(trainer.weights(), 5)
    with TransferQueue(EXPERIENCE, {"rollout": ["prompt"], "update": []}) as queue:
        problems = [TASK.problem(number) for number in range(count)]
        queue.put(
            prompt_rows(
                [torch.tensor(TOKENIZER.encode(problem.prompt)) for problem in problems],
                problems,
                group_size=2,
                first_group=0,
            )
        )
        queue.close()
        RolloutWorker(queue, engine, TASK.reward, TOKENIZER.decode, num_places=4).run()
        return queue.lease("update", count=2 * count).batch


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"gradient_checkpointing": True}], ids=str)
def test_log_probs_are_those_of_the_rollouts(kind: str, options: dict[str, Any]) -> None:
    trainer = _trainer(kind, **options)
    batch = ExperienceBatch.of(_rollouts(trainer, 6, options.get("temperature", 1.0)))
    assert len(batch) == 12
    policy_logprobs = trainer(batch)
    assert policy_logprobs.shape == batch.loss_mask.shape
    torch.testing.assert_close(
        policy_logprobs[batch.loss_mask], batch.rollout_logprobs[batch.loss_mask], atol=2e-5, rtol=1e-4
    )
    found = mismatch_metrics(policy_logprobs, batch.rollout_logprobs, batch.loss_mask, clip_low=0.2, clip_high=0.2)
    assert found["kl_k3"] < 1e-8
    assert found["ess"] > 0.9999
    assert (batch.versions[batch.loss_mask] == 5).all()
    assert batch.policy_versions.tolist() == [5] * 12


@pytest.mark.parametrize("kind", SIZES)
def test_a_step_makes_rewarded_completions_likelier(kind: str) -> None:
    trainer = _trainer(kind)
    batch = ExperienceBatch.of(_rollouts(trainer, 8))
    rewards = (batch.tokens.sum(dim=1) % 2).float()  # any rule will do
    advantages = group_advantages(rewards, 2)[:, None]
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.05)
    before = trainer(batch)
    loss = reduce_tokens(clipped_surrogate(before, batch.rollout_logprobs, advantages), batch.loss_mask, "sequence")
    loss.backward()
    optimizer.step()
    moved = ((trainer(batch) - before) * batch.loss_mask).sum(dim=1).detach()
    assert float((moved * advantages[:, 0]).sum()) > 0


def test_padding_changes_nothing() -> None:
    trainer = _trainer("llama")
    rows = _rollouts(trainer, 6)
    together = ExperienceBatch.of(rows)
    for row in range(len(together)):
        alone = Batch({name: _row(column, row) for name, column in rows.columns.items()})
        single = ExperienceBatch.of(alone)
        length = single.tokens.shape[1]
        assert torch.equal(together.tokens[row, :length], single.tokens[0])
        assert not together.loss_mask[row, length - 1 :].any()
        mask = single.loss_mask[0]
        torch.testing.assert_close(
            trainer(together)[row, : length - 1][mask], trainer(single)[0][mask], atol=1e-5, rtol=1e-4
        )


def _row(column: Any, row: int) -> Any:
    from lightning_flashrl.streaming import Ragged

    return Ragged.of([column[row]]) if isinstance(column, Ragged) else column[row : row + 1]


def test_a_saved_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    trainer = _trainer("llama", seed=3)
    trainer.model.save_pretrained(tmp_path / "model")
    again = CausalLMTrainer.from_folder(str(tmp_path / "model"))
    assert all(torch.equal(mine, again.weights()[name]) for name, mine in trainer.weights().items())
    probe = torch.arange(2, 9)
    torch.testing.assert_close(again.score(probe), trainer.score(probe))
    assert trainer.model.training


class TestBadInput:
    def test_settings_that_cannot_be_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="temperature=0"):
            _trainer("llama", temperature=0)
        with pytest.raises(ConfigurationError, match="model_type='lama'"):
            CausalLMTrainer.from_config("lama")
        with pytest.raises(ConfigurationError, match="holds no model"):
            CausalLMTrainer.from_folder(str(tmp_path))

    def test_rows_without_log_probs_for_each_token_are_refused(self) -> None:
        rows = _rollouts(_trainer("llama"), 2)
        tokens = rows.columns["response.tokens"]
        short = type(tokens)(tokens.values[: int(tokens.lengths[:-1].sum())], tokens.lengths.clone())
        short.lengths[-1] = 0
        with pytest.raises(SchemaMismatchError, match="one number for each token"):
            ExperienceBatch.of(Batch({**rows.columns, "response.tokens": short}))


class CountsCalls:
    """How often a module is computed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.number = 0
        module.register_forward_pre_hook(self._count)  # the second time it may be left as soon as enough is known

    def _count(self, *_: Any) -> None:
        self.number += 1


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_checkpointing_computes_layers_again_and_changes_no_gradient(
    kind: str, with_adapters: bool, is_loaded: bool, tmp_path: Path
) -> None:
    _trainer(kind).model.save_pretrained(tmp_path / "model")
    rows = ExperienceBatch.of(_rollouts(_trainer(kind), 3))
    gradients, counts = [], []
    for gradient_checkpointing in (False, True):
        options: dict[str, Any] = {
            "gradient_checkpointing": gradient_checkpointing,
            "lora": LoRA(rank=2) if with_adapters else None,
        }
        torch.manual_seed(0)
        if is_loaded:
            trainer = CausalLMTrainer.from_folder(str(tmp_path / "model"), **options)
        else:
            trainer = _trainer(kind, **options)
        calls = CountsCalls(next(module for name, module in trainer.model.named_modules() if name.endswith(".0.mlp")))
        trainer(rows)[rows.loss_mask].sum().backward()
        counts.append(calls.number)
        gradients.append({name: weight.grad for name, weight in trainer.named_parameters() if weight.requires_grad})
    assert counts == [1, 2]
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys()
    assert any(bool(gradient.any()) for gradient in without.values() if gradient is not None)
    for name, gradient in without.items():
        torch.testing.assert_close(with_checkpoints[name], gradient)


@pytest.mark.parametrize("kind", SIZES)
def test_a_model_in_bfloat16_has_float32_log_probs_near_those_of_its_rollouts(kind: str, tmp_path: Path) -> None:
    trainer = _trainer(kind, dtype="bfloat16")
    assert {weight.dtype for weight in trainer.weights().values()} == {torch.bfloat16}
    batch = ExperienceBatch.of(_rollouts(trainer, 6))
    policy_logprobs = trainer(batch)
    assert policy_logprobs.dtype == torch.float32
    torch.testing.assert_close(
        policy_logprobs[batch.loss_mask], batch.rollout_logprobs[batch.loss_mask], atol=0.05, rtol=0
    )
    trainer.model.save_pretrained(tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        again = CausalLMTrainer.from_folder(str(tmp_path / "model"), dtype=dtype)
        assert {str(weight.dtype) for weight in again.weights().values()} == {f"torch.{dtype}"}


def test_a_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    for make in (
        lambda: _trainer("llama", dtype="fp8"),
        lambda: CausalLMTrainer.from_folder(str(tmp_path), dtype="fp8"),
    ):
        with pytest.raises(ConfigurationError, match="dtype='fp8'; use one of float32, bfloat16"):
            make()


class TestPasses:
    @given(
        lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
        max_tokens=st.integers(1, 400),
    )
    def test_each_row_is_in_one_pass_and_no_pass_is_larger_than_set(self, lengths: list[int], max_tokens: int) -> None:
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        batch = TokenBatch(mask, mask, mask[:, 1:].bool())
        passes = batch.passes(max_tokens)
        assert sorted(torch.cat(passes).tolist()) == list(range(len(lengths)))
        for index in passes:
            part = batch.select(index)
            assert part.tokens.shape[1] == max(lengths[row] for row in index.tolist())
            assert part.tokens.numel() <= max_tokens or len(part) == 1
            assert torch.equal(part.attention_mask.sum(dim=1), torch.tensor(lengths)[index])

    @given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 5)), min_size=1, max_size=6), st.integers(1, 9000))
    def test_no_other_cut_is_cheaper(self, rows: list[tuple[int, int]], max_tokens: int) -> None:
        rows = sorted(dict(rows).items())
        lengths, counts = [length for length, _ in rows], [count for _, count in rows]
        of_rows = [length for length, count in rows for _ in range(count)]

        def cost_of_run(begin: int, end: int) -> float:
            num_rows, longest = sum(counts[begin:end]), lengths[end - 1]
            return num_rows * longest + -(-num_rows // max(1, max_tokens // longest)) * max(128, max_tokens / 32)

        def least(begin: int) -> float:
            """Of all ways to cut the lengths from here on into runs."""
            ends = range(begin + 1, len(rows) + 1)
            return min((cost_of_run(begin, end) + least(end) for end in ends), default=0.0)

        sizes = cheapest_passes(lengths, counts, max_tokens)
        ends = list(itertools.accumulate(sizes))
        assert ends[-1] == len(of_rows)
        padded = sum(size * of_rows[end - 1] for size, end in zip(sizes, ends, strict=True))
        assert padded + len(sizes) * max(128, max_tokens / 32) <= least(0) + 1e-6
