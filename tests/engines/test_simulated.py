"""Simulated engines take the time they are told to, and everything else about them is true."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lightning_flashrl.algorithms import clipped_surrogate, reduce_tokens
from lightning_flashrl.engines import Completion, Finish, Prompt, Sampling
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.rollout import LogNormalLengths, RolloutSpeed, SimulatedEngine
from lightning_flashrl.engines.trainer import ExperienceBatch, SimulatedTrainer
from lightning_flashrl.engines.worker import RolloutWorker
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import TransferQueue
from lightning_flashrl.tasks import Problem
from lightning_flashrl.weights import WeightPublisher, WeightReceiver

VOCABULARY = 40
END = 1


class Ticker:
    """A clock that nobody waits for."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def _engine(ticker: Ticker | None = None, **options: Any) -> SimulatedEngine:
    options.setdefault("sampling", Sampling(max_new_tokens=200, eos_token_id=END))
    return SimulatedEngine(vocabulary=VOCABULARY, sleep=(ticker or Ticker()).sleep, **options)


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(number, torch.tensor([2 + number % 30, 5]), seed=number) for number in range(count)]


def _count_sevens(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return completion.split().count("7")


def _words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _run(engine: SimulatedEngine) -> dict[int, Completion]:
    done = {}
    while engine.num_open:
        done.update({completion.request_id: completion for completion in engine.step()})
    return done


def test_time_is_that_of_its_parts() -> None:
    """Two rounds of three slots: each reads three prompts, whose first tokens come with that, and decodes nine more."""
    ticker = Ticker()
    speed = RolloutSpeed(tokens_per_s=8, prefill_s=0.25, swap_s=3)
    engine = _engine(ticker, speed=speed, sampling=Sampling(max_new_tokens=10), num_slots=3)
    engine.submit(_prompts(6))
    _run(engine)
    assert ticker.now_s == engine.busy_s == 2 * (3 * 0.25 + 9 / 8)
    engine.load_weights(SimulatedTrainer(VOCABULARY, seed=4).weights(), 1)
    assert ticker.now_s == engine.busy_s == 2 * (3 * 0.25 + 9 / 8) + 3


def test_lengths_are_those_that_are_asked_for() -> None:
    lengths = LogNormalLengths(median=60, spread=0.7)
    engine = _engine(lengths=lengths, num_slots=64)
    engine.submit(_prompts(500))
    done = _run(engine)
    for number, completion in done.items():
        wanted = lengths(random.Random(number))
        assert len(completion.tokens) == min(wanted, 200)
        assert completion.finish is (Finish.STOP if wanted <= 200 else Finish.LENGTH)
        assert (completion.tokens == END).tolist() == [False] * (len(completion.tokens) - 1) + [wanted <= 200]
        tokens = torch.cat([_prompts(500)[number].tokens, completion.tokens]) if number < 20 else None
        if tokens is not None:
            torch.testing.assert_close(engine.score(tokens)[1:], completion.logprobs)
    found = sorted(len(completion.tokens) for completion in done.values())
    assert 50 < statistics.median(found) < 70
    assert found[-1] == 200
    assert found[0] < 20


def test_an_interrupted_completion_keeps_its_length() -> None:
    lengths = LogNormalLengths(median=30, spread=0.5)
    whole, engine = _engine(lengths=lengths, num_slots=4), _engine(lengths=lengths, num_slots=4)
    whole.submit(_prompts(8))
    expected = _run(whole)
    engine.submit(_prompts(8))
    done: dict[int, Completion] = {}
    for _ in range(25):
        done.update({completion.request_id: completion for completion in engine.step()})
    stopped = engine.interrupt()
    assert any(len(completion.tokens) > 0 for completion in stopped)
    engine.submit([Prompt(s.request_id, _prompts(8)[s.request_id].tokens, s.request_id, s) for s in stopped])
    done.update(_run(engine))
    assert {number: c.tokens.tolist() for number, c in done.items()} == {
        number: c.tokens.tolist() for number, c in expected.items()
    }


def test_a_simulated_trainer_and_engine_go_through_the_whole_pipeline() -> None:
    """Published weights arrive, log-probs agree, and what is rewarded becomes likelier."""
    ticker = Ticker()
    trainer = SimulatedTrainer(VOCABULARY, seed=3, tokens_per_s=1000, temperature=0.8, sleep=ticker.sleep)
    optimizer = torch.optim.Adam(trainer.parameters(), lr=0.05)
    sampling = Sampling(max_new_tokens=12, eos_token_id=END, temperature=0.8)
    engine = _engine(sampling=sampling, num_slots=8)
    probe = torch.arange(2, 10)
    shares = []
    with WeightPublisher(trainer.weights()) as publisher, WeightReceiver(publisher.address) as receiver:
        for version in range(1, 16):
            publisher.publish(trainer.weights(), version, probe, trainer.score(probe))
            publisher.wait()
            with TransferQueue(EXPERIENCE, {"rollout": ["prompt"], "update": []}) as queue:
                rows = [torch.tensor([2 + number]) for number in range(32)]
                queue.put(prompt_rows(rows, [Problem("", "")] * 32, group_size=1, first_group=32 * version))
                queue.close()
                RolloutWorker(queue, engine, _count_sevens, _words, receiver=receiver).run()
                batch = ExperienceBatch.of(queue.lease("update", count=32).batch)
            before_s = ticker.now_s
            policy_logprobs = trainer(batch)
            assert ticker.now_s - before_s == pytest.approx(int(batch.attention_mask.sum()) / 1000)
            torch.testing.assert_close(
                policy_logprobs[batch.loss_mask], batch.rollout_logprobs[batch.loss_mask], atol=1e-5, rtol=1e-5
            )
            assert (batch.versions[batch.loss_mask] == version).all()
            shares.append(float((batch.rewards / batch.loss_mask.sum(dim=1)).mean()))
            advantages = (batch.rewards - batch.rewards.mean())[:, None]
            loss = reduce_tokens(
                clipped_surrogate(policy_logprobs, batch.rollout_logprobs, advantages), batch.loss_mask, "sequence"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert statistics.mean(shares[-3:]) > 2 * statistics.mean(shares[:3])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RolloutSpeed(tokens_per_s=0), "tokens_per_s=0"),
        (lambda: RolloutSpeed(tokens_per_s=math.nan), "tokens_per_s=nan"),
        (lambda: RolloutSpeed(prefill_s=-1), "prefill_s=-1"),
        (lambda: RolloutSpeed(swap_s=math.nan), "swap_s=nan"),
        (lambda: LogNormalLengths(median=0, spread=1), "median=0"),
        (lambda: LogNormalLengths(median=9, spread=-1), "spread=-1"),
        (lambda: _engine(num_slots=0), "num_slots=0"),
        (lambda: _engine(sampling=Sampling(max_new_tokens=2), lengths=len), "set the token that ends"),
        (lambda: _engine(sampling=Sampling(max_new_tokens=2, eos_token_id=40)), "eos_token_id=40"),
        (lambda: SimulatedEngine(Sampling(max_new_tokens=2), vocabulary=1), "vocabulary=1"),
        (lambda: SimulatedTrainer(9, tokens_per_s=0), "tokens_per_s=0"),
        (lambda: SimulatedTrainer(9, temperature=0), "temperature=0"),
        (lambda: _engine().submit([Prompt(1, torch.tensor([40]))]), "tokens from 40 to 40"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()
