"""A run's streams, from the first training step to the last: queue, weights, rollout workers.

The process of global rank 0 hosts them; the other ranks are clients of its queue.

=====================  ==========================================  ======================================
who                    waits for                                   unblocked by
=====================  ==========================================  ======================================
a rank                 the next micro-batch of its step            rollouts; the end of the step
rank 0                 the copy of the weights, before an update   the publisher's thread
=====================  ==========================================  ======================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import CRITIC, UPDATE, Feeder, StepPlan
from lightning_flashrl.engines.base import RolloutEngine, TrainerEngine
from lightning_flashrl.engines.process import WorkerFleet, WorkerRecord, WorkerSettings
from lightning_flashrl.engines.reference import ReferenceSettings
from lightning_flashrl.engines.reward_task import RewardSettings
from lightning_flashrl.engines.worker import WorkerStatistics
from lightning_flashrl.errors import EndOfStream, LeaseTimeoutError, WouldBlock
from lightning_flashrl.streaming import (
    Lease,
    QueueVerbs,
    Ragged,
    TransferQueue,
    TransferQueueClient,
    TransferQueueServer,
)
from lightning_flashrl.tasks import Problem, RewardFn
from lightning_flashrl.weights import StalenessGate, WeightPublisher

_LOOK_S = 0.2
"""How often a rank that waits for rows looks whether everybody is well."""


@dataclass(frozen=True, slots=True)
class SessionAddress:
    """How a rank reaches the session's queue.

    Attributes:
        endpoint: of the queue.
        secret: of the queue.
    """

    endpoint: str
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """What rank 0 needs to begin rollouts.

    Attributes:
        settings: how many workers, and how they sample.
        make_engine: makes a worker's engine, in its process.
        reward: scores.
        num_reward_workers: processes that do so; 0 for the rollout workers themselves.
        encode: a prompt's tokens.
        decode: a completion's text.
        problems: what to ask, from ``first_group`` on.
        first_group: number of the first prompt group.
        log_dir: where workers' output goes.
        seed: of the rollouts.
        lease_timeout_s: how long rows are a worker's or rank's without a word of it.
    """

    settings: RolloutSettings
    make_engine: Callable[[], RolloutEngine]
    reward: RewardFn
    num_reward_workers: int
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[list[int]], str]
    problems: Iterator[Problem]
    first_group: int
    log_dir: Path | None
    seed: int
    lease_timeout_s: float


class Session:
    """What every rank has of the streams.

    Args:
        queue: the queue, or a client of it.
        steps: what a step is.
        replica_rank: which data-parallel replica this is.
        stages: the run's tasks.

    Attributes:
        waited_s: time without a micro-batch, in all, since the first one came.
        began_s: when the first one came, on :func:`lightning_flashrl.clock.now_s`: rollout workers had started then.
    """

    def __init__(self, queue: QueueVerbs, steps: StepSettings, replica_rank: int, stages: Stages) -> None:
        self.waited_s = 0.0
        self.began_s: float | None = None
        self.stages = stages
        self._queue = queue
        self._steps = steps
        self._replica_rank = replica_rank
        self._held: list[Lease] = []

    def micro_batches(self, version: int) -> Iterator[Lease]:
        """Iterate over this rank's micro-batches of the step that starts from a version, whose task they name.

        Raises:
            WorkerFailedError: nobody generates any more.
        """
        tasks = list(self.stages.trained)
        while tasks:
            lease = self._next(tasks, version)
            if lease is None:
                continue
            if self.began_s is None:
                self.began_s, self.waited_s = clock.now_s(), 0.0
            self._renew()
            if lease.task != CRITIC:
                self._held.append(lease)
            yield lease

    def _next(self, tasks: list[str], version: int) -> Lease | None:
        """Return a micro-batch, the later tasks' first; ``None`` if there is none yet. Tasks that are over leave."""
        for task in reversed(tasks[1:]):
            try:
                return self._lease(task, version, 0.0)
            except WouldBlock:
                continue
            except EndOfStream:
                tasks.remove(task)
        begin_s = clock.now_s()
        try:
            return self._lease(tasks[0], version, _LOOK_S)
        except LeaseTimeoutError:
            self.check()
        except EndOfStream:
            del tasks[0]
        finally:
            self.waited_s += clock.now_s() - begin_s
        return None

    def _lease(self, task: str, version: int, timeout_s: float) -> Lease:
        return self._queue.lease(
            task,
            self.stages.fields(task),
            tokens=self._steps.micro_batch_tokens,
            policy_version=version,
            replica_rank=self._replica_rank,
            timeout_s=timeout_s,
        )

    def commit_values(self, lease: Lease, values: Ragged) -> None:
        """Write a critic's values of a lease's rows: they can be trained now.

        Args:
            lease: of the task ``critic``.
            values: of each token of the responses.
        """
        self._queue.commit(lease, {"values": values})

    def _renew(self) -> None:
        now_s = clock.now_s()
        self._held = [
            self._queue.renew(lease) if now_s > lease.deadline_s - lease.timeout_s / 2 else lease
            for lease in self._held
        ]

    def step_done(self, weights: Mapping[str, Tensor], version: int) -> None:
        """The update that these micro-batches fed is done: their rows are trained.

        Args:
            weights: after the update.
            version: of these weights.
        """
        held, self._held = self._held, []
        for lease in held:
            self._queue.commit(lease)

    def before_update(self) -> None:
        """Return when the weights may change."""

    def check(self) -> None:
        """Say what went wrong elsewhere, if anything did."""

    def close(self) -> None:
        """Let go of the streams."""


class RankSession(Session):
    """The session of a rank other than 0: a client.

    Args:
        address: of the session.
        steps: what a step is.
        replica_rank: which data-parallel replica this is.
        stages: the run's tasks.
    """

    def __init__(self, address: SessionAddress, steps: StepSettings, replica_rank: int, stages: Stages) -> None:
        self._client = TransferQueueClient(address.endpoint, address.secret)
        super().__init__(self._client, steps, replica_rank, stages)

    def close(self) -> None:
        """Let go of the queue."""
        self._client.close()


class HostSession(Session):
    """The session of rank 0, which hosts the streams.

    Args:
        steps: what a step is.
        workflow: how rollouts and training overlap.
        max_staleness: in policy versions.
        limit: prompt groups to be trained in all; ``None`` for no limit.
        filters_uninformative: whether groups with equal rewards are replaced.
        weights: of the policy; the live ones.
        version: of these weights.
        score: log-probs of a sequence under the live weights.
        rollouts: who generates.
        stages: the run's tasks.
        reference: a policy whose weights, as they are now, are the reference's; for runs that have one.

    Attributes:
        address: for the other ranks.
        plan: which rows each step gets.
        fleet: the rollout workers.
        helpers: workers of other tasks, by task.
        publisher: of the weights.
    """

    def __init__(
        self,
        steps: StepSettings,
        workflow: Workflow,
        max_staleness: int,
        *,
        limit: int | None,
        filters_uninformative: bool,
        weights: Mapping[str, Tensor],
        version: int,
        score: Callable[[Tensor], Tensor],
        rollouts: Rollouts,
        stages: Stages,
        reference: TrainerEngine | None,
    ) -> None:
        gate = StalenessGate(0 if workflow.is_on_policy else max_staleness, steps.prompts)
        gate.restored(version)
        self.plan = StepPlan(
            gate,
            steps.group_size,
            waits_for_all=workflow is Workflow.SYNC,
            filters_uninformative=filters_uninformative,
            limit=limit,
        )
        self._score = score
        with contextlib.ExitStack() as stack:
            queue = stack.enter_context(
                TransferQueue(stages.schema, stages.tasks(self.plan), lease_timeout_s=rollouts.lease_timeout_s)
            )
            super().__init__(queue, steps, 0, stages)
            self.host_queue = queue
            server = stack.enter_context(TransferQueueServer(queue))
            self.address = SessionAddress(server.endpoint, server.secret)
            self.publisher = stack.enter_context(WeightPublisher(weights))
            first, problems = _peek(rollouts.problems)
            self._probe = _probe(rollouts.encode, first)
            self.publisher.publish(weights, version, self._probe, score(self._probe))
            self.publisher.wait()
            settings = rollouts.settings
            self.fleet = stack.enter_context(
                WorkerFleet(
                    WorkerSettings(
                        endpoint=server.endpoint,
                        secret=server.secret,
                        weights=self.publisher.address,
                        swap=workflow.swap,
                        make_engine=rollouts.make_engine,
                        reward=None if stages.has_reward else rollouts.reward,
                        decode=rollouts.decode,
                        num_places=settings.num_slots + settings.num_ahead,
                        num_threads=settings.num_threads,
                    ),
                    settings.workers,
                    rollouts.log_dir,
                )
            )
            self.helpers: dict[str, WorkerFleet] = {}
            if stages.has_reward:
                self._start_rewards(stack, rollouts)
            if reference is not None:
                self._start_reference(stack, rollouts, reference, version)
            self.feeder = Feeder(
                queue,
                self.plan,
                problems,
                rollouts.encode,
                first_group=rollouts.first_group,
                seed=rollouts.seed,
            )
            stack.callback(self.feeder.close)
            self._resources = stack.pop_all()

    def _start_rewards(self, stack: contextlib.ExitStack, rollouts: Rollouts) -> None:
        job = RewardSettings(
            endpoint=self.address.endpoint,
            secret=self.address.secret,
            num_threads=rollouts.settings.num_threads,
            reward=rollouts.reward,
            decode=rollouts.decode,
            num_processes=rollouts.num_reward_workers,
            timeout_s=rollouts.settings.reward_timeout_s,
        )
        fleet = WorkerFleet(job, 1, rollouts.log_dir)
        self.helpers[job.role] = stack.enter_context(fleet)

    def _start_reference(
        self, stack: contextlib.ExitStack, rollouts: Rollouts, reference: TrainerEngine, version: int
    ) -> None:
        """Keep the reference's weights where its workers, also later ones, find them: beside those that change."""
        publisher = stack.enter_context(WeightPublisher(reference.weights()))
        publisher.publish(reference.weights(), version, self._probe, reference.score(self._probe))
        publisher.wait()
        job = ReferenceSettings(
            endpoint=self.address.endpoint,
            secret=self.address.secret,
            num_threads=rollouts.settings.num_threads,
            weights=publisher.address,
            make_engine=reference.twin_factory(),
            max_tokens=self._steps.micro_batch_tokens,
        )
        fleet = WorkerFleet(job, rollouts.settings.reference_workers, rollouts.log_dir)
        self.helpers[job.role] = stack.enter_context(fleet)

    @property
    def is_over(self) -> bool:
        """Whether all rows have been trained and no more come."""
        with self.plan.changed:
            return self.plan.is_last and not self.plan.gate.num_open

    @property
    def num_finished_groups(self) -> int:
        """Prompt groups that are done with: trained, failed or replaced."""
        with self.plan.changed:
            return self.feeder.num_begun - self.plan.gate.num_open

    def before_update(self) -> None:
        """Wait until the last version's weights are copied."""
        self.publisher.wait()

    def step_done(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Publish the new weights, and let the next step and its prompts begin."""
        self.publisher.publish(weights, version, self._probe, self._score(self._probe))
        self.plan.step_done()
        super().step_done(weights, version)

    def check(self) -> None:
        """Say what went wrong with prompts or workers.

        Raises:
            WorkerFailedError: a worker raised an error, or too many died.
            Exception: what the dataset of prompts or the tokenizer raised.
        """
        if self.feeder.error is not None:
            raise self.feeder.error
        for fleet in self._fleets:
            fleet.check()

    def books(self) -> dict[str, float]:
        """Return what became of all rows so far, and how busy everybody was.

        Rows are counted by the queue's ledger; those that were left out, by the plan. What neither knows of is lost.
        """
        counts = self.host_queue.statistics()
        update = counts.tasks[UPDATE]
        with self.plan.changed:
            dropped = self.plan.num_failed + self.plan.num_uninformative
        dropped += update.num_stale - self.plan.num_uninformative
        return {
            "rows_generated": float(counts.tasks["rollout"].num_committed),
            "rows_committed": float(update.num_committed),
            "rows_dropped": float(dropped),
            "rows_left": float(update.num_open),
            "rows_lost": float(counts.num_put - update.num_committed - dropped - update.num_open),
            "rollout_idle_share": self.fleet.idle_share(),
            "exposed_sync_s": self.publisher.exposed_s,
            "workers_replaced": float(sum(fleet.num_replaced for fleet in self._fleets)),
        }

    def metrics(self) -> dict[str, float]:
        """Return numbers to log with each step."""
        done, task = self.fleet.statistics(), self.host_queue.statistics().tasks
        num_failed = sum(fleet.statistics().num_failed for fleet in self._fleets)
        helpers = {f"idle_share/{name}": fleet.idle_share() for name, fleet in self.helpers.items()}
        waiting = {f"queue/{name}": float(task[name].num_ready) for name in self.helpers}
        return {
            **helpers,
            **waiting,
            "idle_share/rollout": self.fleet.idle_share(),
            "generated_length": done.num_tokens / max(1, done.num_completions),
            "exposed_sync_s": self.publisher.exposed_s,
            "queue/prompts": float(task["rollout"].num_open),
            "queue/ready": float(task[UPDATE].num_ready),
            "rows/generated": float(done.num_completions),
            "rows/failed": float(num_failed),
            "rows/uninformative": float(self.plan.num_uninformative),
            "rollout/version_lag": float(self.plan.gate.version - done.version),
        }

    def workers(self) -> list[WorkerRecord]:
        """Return what is known of each worker."""
        return [record for fleet in self._fleets for record in fleet.records()]

    @property
    def _fleets(self) -> list[WorkerFleet]:
        return [self.fleet, *self.helpers.values()]

    def worker_statistics(self) -> WorkerStatistics:
        """Return the sum of what rollout workers have done."""
        return self.fleet.statistics()

    def close(self) -> None:
        """End workers, server and queue."""
        self._resources.close()


def _peek(problems: Iterator[Problem]) -> tuple[Problem | None, Iterator[Problem]]:
    first = next(problems, None)

    def again() -> Iterator[Problem]:
        if first is not None:
            yield first
            yield from problems

    return first, again()


def _probe(encode: Callable[[str], Any], problem: Problem | None) -> Tensor:
    """Return tokens whose log-probs tell one set of weights from another."""
    tokens = list(encode(problem.prompt)) + list(encode(problem.answer)) if problem is not None else []
    tokens = tokens or [0]
    return torch.tensor((tokens * 2)[:256] if len(tokens) > 1 else tokens * 2, dtype=torch.int64)
