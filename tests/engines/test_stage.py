"""Tasks between rollout and update: what they write is right, and rows that fail, go or come back do no harm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_flashrl.engines.experience import experience_fields, prompt_rows
from lightning_flashrl.engines.reference import REFERENCE_FIELDS, FrozenPolicy, ReferenceStage
from lightning_flashrl.engines.reward_task import REWARD_FIELDS, RewardStage
from lightning_flashrl.engines.rewards import RewardPool
from lightning_flashrl.engines.stage import Result, StageWorker
from lightning_flashrl.engines.trainer import CausalLMCritic, CausalLMTrainer, ExperienceBatch, TokenBatch
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import Batch, Lease, Ragged, TransferQueue
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort
from lightning_flashrl.weights import WeightPublisher, WeightReceiver

TASK = DigitSort()
TOKENIZER = CharacterTokenizer(TASK.alphabet)
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
TASKS = {
    "rollout": ["prompt"],
    "reward": REWARD_FIELDS,
    "reference": REFERENCE_FIELDS,
    "update": ["prompt", "response", "reward", "ref_logprobs"],
}


def _trainer(kind: str, seed: int, **options: Any) -> CausalLMTrainer:
    torch.manual_seed(seed)
    return CausalLMTrainer.from_config(kind, vocab_size=len(TOKENIZER), **SIZES[kind], **options)


def _queue(count: int, tasks: Mapping[str, Any] = TASKS) -> TransferQueue:
    """Prompts with answers of all lengths, right and wrong."""
    queue = TransferQueue(experience_fields(has_reference=True, has_critic=True), tasks)
    problems = [TASK.problem(number) for number in range(count)]
    rows = prompt_rows(
        [torch.tensor(TOKENIZER.encode(problem.prompt)) for problem in problems],
        problems,
        group_size=1,
        first_group=0,
    )
    queue.put(rows)
    lease = queue.lease("rollout", ["prompt"], count=count)
    texts = [problem.answer[: None if number % 3 == 0 else 1 + number % 4] for number, problem in enumerate(problems)]
    tokens = [torch.tensor(TOKENIZER.encode(text)) for text in texts]
    queue.commit(
        lease,
        {
            "response.tokens": tokens,
            "response.rollout_logprobs": [torch.full((len(row),), -1.0) for row in tokens],
            "response.versions": [torch.zeros(len(row), dtype=torch.int64) for row in tokens],
            "response.is_complete": [True] * count,
            "policy_version": [0] * count,
        },
    )
    queue.close()
    return queue


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("max_tokens", [12, 64, 4096])
def test_reference_log_probs_are_those_of_the_published_weights(kind: str, max_tokens: int) -> None:
    published = _trainer(kind, 0, temperature=0.7)
    probe = torch.arange(2, 8)
    twin = published.twin_factory()()
    policy = FrozenPolicy(twin)
    with (
        _queue(17) as queue,
        WeightPublisher(published.weights()) as publisher,
        WeightReceiver(publisher.address) as receiver,
    ):
        publisher.publish(published.weights(), 3, probe, published.score(probe))
        publisher.wait()
        receiver.load(policy)
        assert policy.version == 3
        with torch.no_grad():  # what is trained meanwhile changes nothing
            expected_of = _trainer(kind, 0, temperature=0.7)
            for weight in published.parameters():
                weight.add_(1)
        worker = StageWorker(
            queue, "reference", REFERENCE_FIELDS, ReferenceStage(policy, max_tokens), tokens=max_tokens
        )
        worker.run()
        with RewardPool(TASK.reward, num_workers=1, timeout_s=60) as pool:
            StageWorker(queue, "reward", REWARD_FIELDS, RewardStage(pool, TOKENIZER.decode), count=3).run()
        lease = queue.lease("update", ["prompt", "response", "policy_version", "reward", "ref_logprobs"], count=17)
        batch = ExperienceBatch.of(lease.batch)
        assert batch.ref_logprobs is not None
        with torch.no_grad():
            expected = expected_of(batch)
        mask = batch.loss_mask
        torch.testing.assert_close(batch.ref_logprobs[mask], expected[mask], atol=1e-5, rtol=1e-4)
        assert worker.statistics.num_completions == 17
        assert worker.statistics.num_tokens == int(mask.sum())
        right = [float(number % 3 == 0 or len(TASK.problem(number).answer) <= 1 + number % 4) for number in range(17)]
        assert batch.rewards.tolist() == right


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="weights do not fit the model"):
        FrozenPolicy(_trainer("llama", 0)).load_weights(_trainer("gpt2", 0).weights(), 1)


def test_rows_that_are_cleared_while_a_stage_has_them_are_let_go() -> None:
    def stage(lease: Lease) -> Iterator[Result]:
        queue.clear(lease.rows[:2])
        for row in lease.rows:
            yield Result(row, {"reward": 1.0})

    with _queue(5, {"rollout": ["prompt"], "reward": REWARD_FIELDS}) as queue:
        worker = StageWorker(queue, "reward", REWARD_FIELDS, stage, count=5)
        worker.run()
        assert (worker.statistics.num_completions, worker.statistics.num_lost) == (3, 2)
        assert queue.statistics().num_rows == 0


def test_a_stage_that_raises_gives_back_what_it_had_not_begun() -> None:
    def stage(lease: Lease) -> Iterator[Result]:
        yield Result(lease.rows[0], {"reward": 1.0})
        raise RuntimeError("out of memory")

    with _queue(4, {"rollout": ["prompt"], "reward": REWARD_FIELDS}) as queue:
        with pytest.raises(RuntimeError, match="out of memory"):
            StageWorker(queue, "reward", REWARD_FIELDS, stage, count=4).run()
        assert queue.statistics().tasks["reward"].num_ready == 3


def test_a_worker_asks_for_rows_or_for_tokens() -> None:
    with _queue(1) as queue, pytest.raises(ConfigurationError, match="give one of them"):
        StageWorker(queue, "reward", REWARD_FIELDS, lambda lease: iter(()))


# --------------------------------------------------------------------------- the critic
def _batch(kind: str = "llama", count: int = 6) -> TokenBatch:
    with _queue(count, {"rollout": ["prompt"], "reference": REFERENCE_FIELDS}) as queue:
        return TokenBatch.of(queue.lease("reference", count=count).batch)


@pytest.mark.parametrize("kind", SIZES)
def test_a_critic_learns_what_is_to_come(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    critic = CausalLMCritic.from_config(kind, vocab_size=len(TOKENIZER), **SIZES[kind])
    batch = _batch()
    mask = batch.loss_mask
    assert not critic(batch)[mask].any()
    target = (batch.tokens[:, :1] % 2).float().expand_as(mask)  # a rule about the prompt
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.01)
    for _ in range(200):
        loss = (critic(batch) - target)[mask].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    critic.save_pretrained(tmp_path / "critic")
    again = CausalLMCritic.from_folder(tmp_path / "critic")
    torch.testing.assert_close(again(batch)[mask], critic(batch)[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SIZES)
def test_a_value_knows_the_tokens_before_its_own_and_no_later_ones(kind: str) -> None:
    torch.manual_seed(0)
    critic = CausalLMCritic.from_policy(_trainer(kind, 0))
    torch.nn.init.normal_(critic.head.weight)
    batch = _batch()
    before = critic(batch)
    place = 4
    tokens = batch.tokens.clone()
    tokens[:, place] = (tokens[:, place] + 1) % len(TOKENIZER)
    after = critic(TokenBatch(tokens, batch.attention_mask, batch.loss_mask))
    torch.testing.assert_close(after[:, :place], before[:, :place])
    assert not torch.allclose(after[:, place], before[:, place])


def test_the_body_of_a_policy_is_copied_not_shared(tmp_path: Path) -> None:
    trainer = _trainer("llama", 3)
    trainer.model.save_pretrained(tmp_path / "policy")
    batch = _batch()
    for critic in (CausalLMCritic.from_policy(trainer), CausalLMCritic.from_folder(tmp_path / "policy")):
        shared = {weight.data_ptr() for weight in trainer.parameters()}
        assert not shared & {weight.data_ptr() for weight in critic.parameters()}
        torch.testing.assert_close(
            critic.body(input_ids=batch.tokens).last_hidden_state,
            trainer.model.base_model(input_ids=batch.tokens).last_hidden_state,
        )


def test_settings_of_a_critic_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"critic_engine\.model_type='lama'"):
        CausalLMCritic.from_config("lama")
    with pytest.raises(ConfigurationError, match="holds no model"):
        CausalLMCritic.from_folder(tmp_path)


def test_values_and_reference_come_back_where_they_were() -> None:
    batch = _batch()
    numbers = torch.arange(batch.loss_mask.numel()).view(batch.loss_mask.shape).float()
    column = batch.ragged(numbers)
    with _queue(6, {"rollout": ["prompt"], "reference": REFERENCE_FIELDS, "update": []}) as queue:
        lease = queue.lease("reference", count=6)
        queue.commit(lease, {"ref_logprobs": column, "values": Ragged(column.values + 0.5, column.lengths)})
        rows = queue.lease("update", ["prompt", "response", "policy_version", "ref_logprobs", "values"], count=6)
    rewarded = Batch({**rows.batch.columns, "reward": [0.0] * 6})
    again = ExperienceBatch.of(rewarded)
    assert again.ref_logprobs is not None
    assert again.values is not None
    assert torch.equal(again.ref_logprobs, numbers * batch.loss_mask)
    assert torch.equal(again.values, (numbers + 0.5) * batch.loss_mask)
    index = torch.tensor([4, 1])
    part = again.select(index)
    assert part.values is not None
    longest = int(again.attention_mask[index].sum(dim=1).max())
    assert part.tokens.shape == (2, longest)
    assert torch.equal(part.values, again.values[index, : longest - 1])
    assert not again.values[index, longest - 1 :].any()
