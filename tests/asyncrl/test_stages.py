"""A step's rows go through `critic`, then through both updates; groups lose rows and nobody waits for them."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import pytest
import torch

from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import StepPlan
from lightning_flashrl.engines.experience import prompt_rows
from lightning_flashrl.errors import EndOfStream, WouldBlock
from lightning_flashrl.streaming import Lease, Ragged, TransferQueue
from lightning_flashrl.tasks import Problem
from lightning_flashrl.weights import StalenessGate

GROUP_SIZE = 2


class Desk:
    """A queue and a plan, without anybody who works on its rows."""

    def __init__(self, stages: Stages, *, batch: int = 2, max_staleness: int = 0, limit: int | None = None) -> None:
        self.stages = stages
        self.plan = StepPlan(StalenessGate(max_staleness, batch), GROUP_SIZE, waits_for_all=False, limit=limit)
        self.queue = TransferQueue(stages.schema, stages.tasks(self.plan))
        self.asked: collections.Counter[tuple[str, int]] = collections.Counter()

    def put(self, groups: Sequence[int]) -> tuple[int, ...]:
        self.plan.begin(groups[0], len(groups))
        problems = [Problem(f"{group}", "") for group in groups]
        tokens = [torch.tensor([group]) for group in groups]
        rows = self.queue.put(prompt_rows(tokens, problems, group_size=GROUP_SIZE, first_group=groups[0]))
        self.queue.commit(self.queue.lease_nowait("rollout", ["prompt.seed"], count=len(rows)))
        return rows

    def roll_out(self, rows: Sequence[int]) -> None:
        """Write completions of two tokens."""
        count = len(rows)
        data = {
            "response.tokens": [torch.tensor([1, 2])] * count,
            "response.rollout_logprobs": [torch.tensor([-1.0, -1.0])] * count,
            "response.versions": [torch.tensor([0, 0])] * count,
            "response.is_complete": [True] * count,
            "policy_version": [0] * count,
            "reward": [0.5] * count,
        }
        self.queue.put(data, rows)

    def lease(self, task: str, version: int = 0, tokens: int = 6) -> Lease:
        lease = self.queue.lease_nowait(
            task,
            self.stages.fields(task),
            tokens=tokens,
            policy_version=version,
            micro_batch=self.asked[task, version],
        )
        self.asked[task, version] += 1
        return lease

    def judge(self, lease: Lease) -> None:
        lengths = lease["response.tokens"].lengths
        self.queue.commit(lease, {"values": Ragged(torch.zeros(int(lengths.sum())), lengths)})

    def is_over(self, task: str, version: int = 0) -> bool:
        try:
            self.lease(task, version)
        except EndOfStream:
            return True
        except WouldBlock:
            return False
        raise AssertionError(f"{task} had more rows")


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(Stages(has_critic=True))
    with desk.queue:
        yield desk


def test_updates_follow_the_critic_and_end_when_all_that_it_took_was_handed_out(desk: Desk) -> None:
    rows = desk.put([0, 1])
    desk.roll_out(rows)
    first, second = desk.lease("critic"), desk.lease("critic")
    assert (first.rows, second.rows) == (rows[:2], rows[2:])
    assert desk.is_over("critic")
    assert not desk.is_over("update")  # the step has all its groups, but not their values
    desk.judge(second)
    assert desk.lease("update").rows == rows[2:]
    assert not desk.is_over("update")
    desk.judge(first)
    assert desk.lease("update").rows == rows[:2]
    assert desk.is_over("update")
    assert not desk.is_over("critic_update", version=1)


def test_each_update_gets_every_row_once_and_the_next_step_begins_anew(desk: Desk) -> None:
    for version, groups in enumerate(([0, 1], [2, 3])):
        rows = desk.put(groups)
        desk.roll_out(rows)
        for _ in groups:
            desk.judge(desk.lease("critic", version))
        for task in ("update", "critic_update"):
            leases = [desk.lease(task, version) for _ in groups]
            assert tuple(row for lease in leases for row in lease.rows) == rows
            assert desk.is_over(task, version)
        desk.plan.step_done(version + 1)
    for task in desk.stages.trained:
        desk.queue.control.refresh(task)
    found = desk.queue.statistics()
    assert found.num_rows == 0
    assert {found.tasks[task].num_committed for task in desk.stages.trained} == {8}


def test_a_group_that_comes_back_is_handed_out_again_before_the_step_is_over(desk: Desk) -> None:
    desk.roll_out(desk.put([0, 1]))
    for _ in range(2):
        desk.judge(desk.lease("critic"))
    lost = desk.lease("update")
    desk.lease("update")
    assert desk.is_over("update")
    desk.queue.release(lost)  # its consumer died
    assert desk.lease("update").rows == lost.rows
    assert desk.is_over("update")


@pytest.mark.parametrize("has_critic", [True, False])
def test_nobody_waits_for_rows_that_failed_before_they_had_a_reward(*, has_critic: bool) -> None:
    stages = Stages(has_critic=has_critic)
    desk = Desk(stages)
    with desk.queue:
        rows = desk.put([0, 1])
        desk.queue.clear(rows[:1])
        desk.roll_out(rows[1:])
        task = stages.trained[0]
        assert desk.lease(task, tokens=3).rows == rows[1:2]
        assert desk.lease(task).rows == rows[2:]
        assert desk.is_over(task)


def test_a_group_that_lost_all_its_rows_is_replaced() -> None:
    desk = Desk(Stages(), limit=2)
    with desk.queue:
        rows = desk.put([0, 1])
        desk.roll_out(rows[2:])
        assert desk.plan.room() == 0
        desk.queue.clear(rows[:2])
        assert desk.plan.room() == 1
        rows = desk.put([2])
        desk.roll_out(rows)
        assert len(desk.lease("update", tokens=12)) == 4
        assert desk.is_over("update")


@pytest.mark.parametrize(
    ("stages", "tasks", "fields"),
    [
        (Stages(), ["rollout", "update"], set()),
        (Stages(has_reward=True), ["rollout", "reward", "update"], set()),
        (Stages(has_reference=True), ["rollout", "reference", "update"], {"ref_logprobs"}),
        (Stages(has_critic=True), ["rollout", "critic", "critic_update", "update"], {"values"}),
    ],
    ids=["plain", "reward", "reference", "critic"],
)
def test_a_run_has_the_tasks_and_fields_that_it_needs(stages: Stages, tasks: list[str], fields: set[str]) -> None:
    desk = Desk(stages)
    with desk.queue:
        assert list(desk.queue.statistics().tasks) == tasks
        assert {"ref_logprobs", "values"} & set(desk.queue.schema) == fields
        assert fields <= set(stages.fields("update"))
