"""Which rows a step gets, without rollouts: the test itself answers prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_flashrl.asyncrl.steps import UPDATE, Feeder, StepPlan, StepSampler
from lightning_flashrl.engines.experience import EXPERIENCE
from lightning_flashrl.errors import ConfigurationError, EndOfStream, LeaseTimeoutError
from lightning_flashrl.streaming import Lease, Task, TransferQueue
from lightning_flashrl.tasks import Problem
from lightning_flashrl.weights import StalenessGate

FIELDS = ("prompt.tokens", "prompt.group_id", "response.tokens", "reward")


class Run:
    """A queue with a plan, and prompts of one token each."""

    def __init__(self, prompts: int = 2, group_size: int = 2, max_staleness: int = 0, **settings: Any) -> None:
        settings.setdefault("waits_for_all", False)
        self.plan = StepPlan(StalenessGate(max_staleness, prompts), group_size, **settings)
        self.queue = TransferQueue(
            EXPERIENCE,
            {
                "rollout": ["prompt"],
                UPDATE: Task(FIELDS, StepSampler(self.plan), token_fields=("prompt.tokens", "response.tokens")),
            },
        )
        problems = (Problem(str(number), "") for number in range(1000))
        take = lambda count: list(itertools.islice(problems, count))  # noqa: E731
        self.feeder = Feeder(self.queue, self.plan, take, lambda text: [int(text)])

    def prompts(self, count: int) -> list[tuple[Lease, int]]:
        lease = self.queue.lease("rollout", count=count, timeout_s=10)
        return [(lease, row) for row in lease.rows]

    def answer(self, prompt: tuple[Lease, int], reward: float = 1.0, length: int = 1) -> None:
        lease, row = prompt
        tokens = [list(range(length))]
        data = {
            "response.tokens": tokens,
            "response.rollout_logprobs": [[-1.0] * length],
            "response.versions": [[0] * length],
            "response.is_complete": [True],
            "policy_version": [0],
            "reward": [reward],
        }
        self.queue.commit(lease, data, rows=[row])

    def take(self, step: int, tokens: int = 100) -> Lease:
        return self.queue.lease(UPDATE, tokens=tokens, policy_version=step, timeout_s=0.3)


@pytest.fixture
def make() -> Iterator[Any]:
    runs: list[Run] = []

    def begin(**settings: Any) -> Run:
        runs.append(Run(**settings))
        return runs[-1]

    yield begin
    for run in runs:
        run.feeder.close()
        run.queue.shutdown()


def groups(lease: Lease) -> list[int]:
    return list(lease["prompt.group_id"])


def test_a_step_is_handed_out_in_micro_batches_and_ends(make: Any) -> None:
    run = make(prompts=3)
    for prompt in run.prompts(6):
        run.answer(prompt)
    assert groups(run.take(0, tokens=8)) == [0, 0, 1, 1]
    last = run.take(0, tokens=8)
    assert groups(last) == [2, 2]
    with pytest.raises(EndOfStream, match="step 0 has no more rows"):
        run.take(0)
    with pytest.raises(LeaseTimeoutError):
        run.take(1)
    run.plan.step_done()
    with pytest.raises(EndOfStream, match="step 0 is over"):
        run.take(0)
    assert list(run.prompts(6)[0][0]["prompt.min_version"]) == [1] * 6


def test_on_policy_groups_come_in_order_whoever_is_ready_first(make: Any) -> None:
    run = make(prompts=2)
    prompts = run.prompts(4)
    for prompt in prompts[2:]:
        run.answer(prompt)
    with pytest.raises(LeaseTimeoutError):
        run.take(0, tokens=1)
    for prompt in prompts[:2]:
        run.answer(prompt)
    assert groups(run.take(0)) == [0, 0, 1, 1]


def test_a_synchronous_step_waits_for_all_its_rows(make: Any) -> None:
    streaming, sync = make(), make(waits_for_all=True)
    for run in (streaming, sync):
        for prompt in run.prompts(4)[:2]:
            run.answer(prompt)
    assert groups(streaming.take(0, tokens=1)) == [0, 0]
    with pytest.raises(LeaseTimeoutError):
        sync.take(0, tokens=1)


def test_a_row_that_fails_is_not_waited_for_and_a_whole_group_is_replaced(make: Any) -> None:
    run = make(prompts=2)
    prompts = run.prompts(4)
    run.queue.clear([prompts[0][1]])  # one of group 0
    run.queue.clear([row for _, row in prompts[2:]])  # all of group 1
    run.answer(prompts[1])
    for prompt in run.prompts(2):
        run.answer(prompt)
    assert groups(run.take(0)) == [0, 2, 2]
    assert run.plan.num_failed == 3


def test_groups_with_equal_rewards_are_replaced_if_asked_for(make: Any) -> None:
    run = make(prompts=1, filters_uninformative=True)
    for prompt in run.prompts(2):
        run.answer(prompt, reward=1.0)
    with pytest.raises(LeaseTimeoutError):
        run.take(0)
    for prompt, reward in zip(run.prompts(2), (0.0, 1.0), strict=True):
        run.answer(prompt, reward)
    assert groups(run.take(0)) == [1, 1]
    assert run.plan.num_uninformative == 2
    assert run.queue.statistics().tasks[UPDATE].num_stale == 2


def test_rows_of_a_lost_lease_belong_to_the_same_step(make: Any) -> None:
    run = make(prompts=1)
    for prompt in run.prompts(2):
        run.answer(prompt)
    run.queue.release(run.take(0))
    assert groups(run.take(0)) == [0, 0]


def test_a_group_larger_than_the_budget_comes_alone(make: Any) -> None:
    run = make(prompts=2)
    for prompt in run.prompts(4):
        run.answer(prompt, length=50)
    assert groups(run.take(0, tokens=20)) == [0, 0]
    assert groups(run.take(0, tokens=20)) == [1, 1]


def test_the_limit_counts_what_is_trained(make: Any) -> None:
    run = make(prompts=1, limit=2)
    first = run.prompts(2)
    run.queue.clear([row for _, row in first])
    for step in (0, 1):
        for prompt in run.prompts(2):
            run.answer(prompt)
        run.queue.commit(run.take(step))
        run.plan.step_done()
    with pytest.raises(EndOfStream, match="no more prompts"):
        run.take(2)
    assert run.feeder.num_begun == 3


def test_leases_without_a_step_are_refused(make: Any) -> None:
    run = make()
    with pytest.raises(ConfigurationError, match="policy_version"):
        run.queue.lease(UPDATE, count=2)


def test_prompts_without_tokens_are_refused() -> None:
    plan = StepPlan(StalenessGate(0, 1), 1, waits_for_all=False)
    with TransferQueue(EXPERIENCE, {UPDATE: Task(FIELDS, StepSampler(plan))}) as queue:
        feeder = Feeder(queue, plan, lambda count: [Problem("", "")], lambda text: [])
        while feeder.error is None:
            torch.empty(0)
        feeder.close()
        assert isinstance(feeder.error, ConfigurationError)
