"""Which rows a step gets, without rollouts: the test itself answers prompts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flashrl.asyncrl.feeder import Feeder
from lightning_flashrl.asyncrl.host import HostSettings, StreamHost
from lightning_flashrl.asyncrl.settings import StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import UPDATE, PromptSampler, StepPlan, StepSampler
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.errors import ConfigurationError, EndOfStream, LeaseLostError, LeaseTimeoutError, WouldBlock
from lightning_flashrl.streaming import Lease, Task, TransferQueue
from lightning_flashrl.tasks import Problem
from lightning_flashrl.weights import StalenessGate

FIELDS = ("prompt.tokens", "prompt.group_id", "response.tokens", "reward")


class Sink:
    """What feeders see of a host."""

    def __init__(self, plan: StepPlan) -> None:
        self.resume, self.begin, self.end_prompts = plan.resume, plan.begin, plan.end_prompts
        self._plan = plan

    def wait_for_room(self, timeout_s: float) -> int:
        with self._plan.changed:
            self._plan.changed.wait_for(self._plan.room, timeout_s)
            return self._plan.room()


class Run:
    """A queue with a plan, and prompts of one token each."""

    def __init__(self, prompts: int = 2, group_size: int = 2, max_staleness: int = 0, **settings: Any) -> None:
        settings.setdefault("waits_for_all", False)
        self.asked: collections.Counter[tuple[int, int]] = collections.Counter()
        self.plan = StepPlan(StalenessGate(max_staleness, prompts), group_size, **settings)
        self.queue = TransferQueue(
            EXPERIENCE,
            {
                "rollout": Task(["prompt"], PromptSampler(self.plan)),
                UPDATE: Task(FIELDS, StepSampler(self.plan), token_fields=("prompt.tokens", "response.tokens")),
            },
        )
        problems = (Problem(str(number), "") for number in range(1000))
        take = lambda count: list(itertools.islice(problems, count))  # noqa: E731
        self.feeder = Feeder(
            self.queue, Sink(self.plan), lambda group: take, lambda text: [int(text)], group_size=group_size
        )

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

    def take(self, step: int, tokens: int = 100, micro_batch: int | None = None, replica_rank: int = 0) -> Lease:
        asked = self.asked[step, replica_rank]
        lease = self.queue.lease(
            UPDATE,
            tokens=tokens,
            policy_version=step,
            micro_batch=asked if micro_batch is None else micro_batch,
            replica_rank=replica_rank,
            timeout_s=0.3,
        )
        self.asked[step, replica_rank] += micro_batch is None
        return lease


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
    run.plan.step_done(1)
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
    assert run.queue.statistics().tasks[UPDATE].num_dropped == 3


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
        run.take(step)
        run.plan.step_done(step + 1)
        run.queue.control.refresh(UPDATE)
    assert run.queue.statistics().tasks[UPDATE].num_committed == 4
    with pytest.raises(EndOfStream, match="no more prompts"):
        run.take(2)
    assert run.plan.num_begun == 3


def test_a_successor_gets_the_same_micro_batches_in_the_same_order(make: Any) -> None:
    run = make(prompts=3, redoes_steps=True)
    for prompt in run.prompts(6):
        run.answer(prompt)
    lost, others, second = run.take(0, tokens=4), run.take(0, tokens=4, replica_rank=1), run.take(0, tokens=4)
    run.queue.release(second)  # its owner is known to be gone, not yet the one of the other
    with pytest.raises(EndOfStream, match="step 0 has no more rows"):
        run.take(0, replica_rank=1)
    assert [run.take(0, micro_batch=number).rows for number in (0, 1)] == [lost.rows, second.rows]
    with pytest.raises(LeaseLostError, match="went to a successor"):
        run.queue.renew(lost)
    run.queue.renew(others)


def test_rows_are_committed_with_their_step_once_it_can_not_be_redone(make: Any) -> None:
    run = make(prompts=1, max_staleness=1, redoes_steps=True)
    for prompt in run.prompts(4):
        run.answer(prompt)
    first = run.take(0)
    run.plan.step_done(1)
    run.queue.release(first)  # its owner dies with the step done, and its successor does it again
    counts = run.queue.statistics().tasks[UPDATE]
    assert (counts.num_committed, counts.num_stale, run.plan.num_decided(UPDATE)) == (0, 0, 2)
    assert run.take(0, micro_batch=0).rows == first.rows
    run.plan.step_done(1)
    assert run.plan.gate.version == 1
    second = run.take(1)
    counts = run.queue.statistics().tasks[UPDATE]
    assert (counts.num_committed, counts.num_leased, run.plan.num_decided(UPDATE)) == (2, 2, 0)
    with pytest.raises(EndOfStream, match="step 0 is over"):
        run.take(0, micro_batch=0)
    assert set(second.rows).isdisjoint(first.rows)


def test_rows_of_a_replica_without_a_successor_go_to_others(make: Any) -> None:
    run = make(prompts=2)
    for prompt in run.prompts(4):
        run.answer(prompt)
    lost = run.take(0, tokens=4, replica_rank=1)
    run.queue.release(lost)
    assert groups(run.take(0)) == [1, 1, 0, 0]
    with pytest.raises(EndOfStream, match="step 0 has no more rows"):
        run.take(0, replica_rank=1)


def test_rows_that_are_cleared_leave_their_share(make: Any) -> None:
    run = make(prompts=1, redoes_steps=True)
    for prompt in run.prompts(2):
        run.answer(prompt)
    lease = run.take(0)
    run.queue.clear([lease.rows[0]])
    assert run.take(0, micro_batch=0).rows == lease.rows[1:]
    run.plan.step_done(1)
    run.plan.finalize(1)
    run.queue.control.refresh(UPDATE)
    assert run.queue.statistics().tasks[UPDATE].num_committed == 1
    assert run.queue.statistics().num_rows == run.queue.statistics().tasks["rollout"].num_open


def test_leases_without_a_step_are_refused(make: Any) -> None:
    run = make()
    with pytest.raises(ConfigurationError, match="policy_version"):
        run.queue.lease(UPDATE, count=2)


def test_prompts_without_tokens_are_refused() -> None:
    plan = StepPlan(StalenessGate(0, 1), 1, waits_for_all=False)
    with TransferQueue(EXPERIENCE, {UPDATE: Task(FIELDS, StepSampler(plan))}) as queue:
        take = lambda count: [Problem("", "")]  # noqa: E731
        feeder = Feeder(queue, Sink(plan), lambda group: take, lambda text: [], group_size=1)
        while feeder.error is None:
            torch.empty(0)
        feeder.close()
        assert isinstance(feeder.error, ConfigurationError)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_whoever_dies_each_row_is_trained_once_and_by_the_same_replica(data: st.DataObject) -> None:
    """Two replicas take micro-batches in any order, lose their leases, begin again, die after the step is done."""
    run = Run(prompts=3, max_staleness=1, redoes_steps=True, limit=9)
    trained: dict[int, tuple[int, int]] = {}
    try:
        for step, num_new in enumerate((12, 6, 0)):
            for prompt in run.prompts(num_new) if num_new else ():
                run.answer(prompt)
            taken: dict[tuple[int, int], tuple[int, ...]] = {}
            is_through = {0: False, 1: False}
            leases: dict[int, list[Lease]] = {0: [], 1: []}
            while not all(is_through.values()):
                replica = data.draw(st.sampled_from([r for r in (0, 1) if not is_through[r]]))
                match data.draw(st.sampled_from(["take", "take", "die", "die unnoticed"])):
                    case "die":
                        for lease in leases[replica]:
                            run.queue.release(lease)
                        leases[replica] = []
                    case "die unnoticed":
                        leases[replica] = []
                    case _:
                        number = len(leases[replica])
                        try:
                            lease = run.take(step, 4, number, replica)
                        except EndOfStream:
                            is_through[replica] = not data.draw(st.booleans())  # else it goes on, and may die
                            continue
                        assert taken.setdefault((replica, number), lease.rows) == lease.rows
                        leases[replica].append(lease)
            run.plan.step_done(step + 1)
            for (replica, _), rows in taken.items():
                for row in rows:
                    assert row not in trained
                    trained[row] = (step, replica)
        run.plan.finalize(3)
        run.queue.control.refresh(UPDATE)
        counts = run.queue.statistics()
        assert counts.tasks[UPDATE].num_committed == len(trained) == 18
        assert counts.num_rows == 0
    finally:
        run.feeder.close()
        run.queue.shutdown()


def test_who_gives_prompts_may_die_and_none_is_given_twice_or_forgotten(make: Any) -> None:
    run = make(prompts=2, max_staleness=1)
    prompts = run.prompts(8)
    run.feeder.close()
    run.queue.clear([row for _, row in prompts[:4]])
    assert run.plan.begin(4, 2) == 0  # it dies before it has put them
    assert run.plan.resume() == 4
    assert (run.plan.num_begun, run.plan.room()) == (4, 2)
    first_group, version = 4, run.plan.begin(4, 1)
    assert run.plan.begin(4, 1) == version  # it has not heard the answer
    tokens, problems = [torch.tensor([4])], [Problem("4", "")]
    rows = prompt_rows(tokens, problems, group_size=2, first_group=first_group, min_version=version)
    put = run.queue.put(rows)
    run.queue.put(rows)  # what it had begun to put comes late
    assert run.queue.lease("rollout", count=2, timeout_s=5).rows == put
    with pytest.raises(LeaseTimeoutError):
        run.queue.lease("rollout", count=1, timeout_s=0.1)
    assert run.plan.resume() == 5


class Life:
    """A run whose processes die, come back and are added at random; nothing here waits."""

    def __init__(self, seed: int, bound: int) -> None:
        self.random = random.Random(seed)
        self.plan = StepPlan(StalenessGate(bound, 2), 2, waits_for_all=False, redoes_steps=True)
        tasks = {
            "rollout": Task(["prompt"], PromptSampler(self.plan)),
            UPDATE: Task(FIELDS, StepSampler(self.plan), token_fields=("prompt.tokens", "response.tokens")),
        }
        self.queue = TransferQueue(EXPERIENCE, tasks)
        self.fields: Sequence[str] = [*FIELDS, "policy_version"]
        self.workers: list[list[Lease]] = [[]]
        self.taken: dict[int, list[Lease]] = {0: [], 1: []}
        self.trained: dict[int, int] = {}  # row → staleness

    def feed(self) -> None:
        count = self.plan.room()
        if not count:
            return
        first_group = self.plan.next_group
        version = self.plan.begin(first_group, count)
        if self.random.random() < 0.3:  # rank 0 dies before it has put them
            self.plan.resume()
            return
        problems = [Problem(str(number), "") for number in range(count)]
        tokens = [torch.tensor([1])] * count
        self.queue.put(prompt_rows(tokens, problems, group_size=2, first_group=first_group, min_version=version))

    def scale(self) -> None:
        if self.workers and self.random.random() < 0.3:
            for lease in self.workers.pop():  # it is killed
                self.queue.release(lease)
        else:
            self.workers.append([])

    def begin(self) -> None:
        if self.workers:
            with contextlib.suppress(WouldBlock):
                worker = self.random.choice(self.workers)
                worker.append(self.queue.lease_nowait("rollout", count=1))

    def answer(self) -> None:
        """Finish what some worker has begun, under any version that it may have."""
        busy = [worker for worker in self.workers if worker]
        if not busy:
            return
        lease = self.random.choice(busy).pop(0)
        if self.random.random() < 0.1:
            self.queue.clear(lease.rows)  # its reward failed
            return
        version = self.random.randint(lease["prompt.min_version"][0], self.plan.gate.version)
        data = {
            "response.tokens": [[1]],
            "response.rollout_logprobs": [[-1.0]],
            "response.versions": [[version]],
            "response.is_complete": [True],
            "policy_version": [version],
            "reward": [1.0],
        }
        self.queue.commit(lease, data)

    def train(self) -> None:
        """Some rank takes a micro-batch, or dies; when all are through, the step is done."""
        step, replica = self.plan.gate.version, self.random.choice([0, 1])
        if self.random.random() < 0.2:
            self.taken[replica] = []
        try:
            lease = self.queue.lease_nowait(
                UPDATE,
                self.fields,
                tokens=4,
                policy_version=step,
                micro_batch=len(self.taken[replica]),
                replica_rank=replica,
            )
        except WouldBlock:
            return
        except EndOfStream:
            self.end(step)
            return
        self.taken[replica].append(lease)

    def end(self, step: int) -> None:
        for (replica, number), rows in self.plan.shares[UPDATE].get(step, {}).items():
            assert self.trained.keys().isdisjoint(rows)
            lease = self.queue.lease_nowait(
                UPDATE, self.fields, tokens=4, policy_version=step, micro_batch=number, replica_rank=replica
            )
            assert list(lease.rows) == rows
            for row, version in zip(rows, lease["policy_version"], strict=True):
                self.trained[row] = step - version
        self.plan.step_done(step + 1)
        self.taken = {0: [], 1: []}


@given(seed=st.integers(0, 1 << 30), bound=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_no_row_is_trained_too_late_whatever_dies_comes_back_or_is_added(seed: int, bound: int) -> None:
    life = Life(seed, bound)
    moves = [life.feed, life.begin, life.answer, life.train, life.begin, life.answer, life.train, life.scale]
    with life.queue:
        for _ in range(200):
            life.random.choice(moves)()
        assert all(staleness <= bound for staleness in life.trained.values())
        life.plan.finalize(life.plan.gate.version)
        life.queue.control.refresh(UPDATE)
        counts = life.queue.statistics().tasks[UPDATE]
        assert counts.num_committed == len(life.trained)
        assert counts.num_stale == 0


class HostedLife(Life):
    """The same, where the host dies, too, and the next one goes on from its journal."""

    def __init__(self, seed: int, bound: int, journal: Path) -> None:
        super().__init__(seed, bound)
        self.queue.shutdown()
        self._journal = journal
        self._settings = HostSettings(
            steps=StepSettings(prompts=2, group_size=2),
            workflow=Workflow.ASYNC,
            max_staleness=bound,
            stages=Stages(),
            version=0,
            limit=None,
            filters_uninformative=False,
            redoes_steps=True,
            first_group=0,
            lease_timeout_s=600.0,
            weights={},
            teams=(),
            log_dir=None,
        )
        self.fields = Stages().fields(UPDATE)
        self.num_deaths = 0
        self.begin_host()

    def begin_host(self) -> None:
        self.host = StreamHost(self._settings, journal=self._journal)
        self.plan, self.queue = self.host.plan, self.host.queue

    def die(self) -> None:
        """Without a word, as a killed process does; its leases are of threads of that process."""
        self.num_deaths += 1
        with self.queue.control.lock:
            self.queue.control.ledger.log = None
            assert self.queue.journal is not None
            self.queue.journal.end()
            self.queue.journal = None
            self.plan.keep = lambda: None
        self.host.close()
        self.workers = [[] for _ in self.workers]
        self.taken = {0: [], 1: []}
        self.begin_host()

    def feed(self) -> None:
        if self.random.random() < 0.1:
            self.plan.resume()
        super().feed()


def test_a_host_may_die_while_it_takes_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one begins anew as that would have."""
    life = HostedLife(0, 1, tmp_path / "journal")
    life.host.begin(0, 2)
    life.host.end_prompts()
    snapshot = life.host.snapshot()
    life.host.close()
    resumed = dataclasses.replace(life._settings, limit=5, snapshot=snapshot)

    def die(host: StreamHost) -> None:
        raise KeyboardInterrupt

    journal = tmp_path / "second"
    with monkeypatch.context() as patch:
        patch.setattr(StreamHost, "_keep", die)
        with pytest.raises(KeyboardInterrupt):
            StreamHost(resumed, journal=journal)
    assert journal.exists()
    plans = []
    for path in (journal, tmp_path / "third"):
        host = StreamHost(resumed, journal=path)
        plans.append(host.plan.state())
        host.close()
    assert plans[0] == plans[1]
    assert not plans[0].has_ended


@given(seed=st.integers(0, 1 << 30), bound=st.integers(0, 3))
@settings(deadline=None, max_examples=12)
def test_so_it_is_when_the_host_dies(seed: int, bound: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    life = HostedLife(seed, bound, tmp_path_factory.mktemp("host") / "journal")
    moves = [life.feed, life.begin, life.answer, life.train] * 4 + [life.scale, life.die]
    try:
        for _ in range(250):
            life.random.choice(moves)()
        done = len(life.trained)
        for _ in range(150):  # nothing is stuck
            for move in (life.feed, life.begin, life.begin, life.answer, life.answer, life.train, life.train):
                move()
            life.workers = life.workers or [[]]
        assert len(life.trained) > done
        assert all(staleness <= bound for staleness in life.trained.values())
        life.host.finish(life.plan.gate.version)
        view = life.host.view()
        counts = view.queue.tasks[UPDATE]
        assert counts.num_committed == len(life.trained)
        assert counts.num_stale == 0
        assert view.books()["rows_lost"] == 0
    finally:
        life.host.close()
