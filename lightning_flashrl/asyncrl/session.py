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

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import CRITIC, UPDATE, Feeder, StepPlan, TakeProblems
from lightning_flashrl.engines.base import RolloutEngine, TrainerEngine
from lightning_flashrl.engines.process import Job, WorkerFleet, WorkerRecord, WorkerSettings
from lightning_flashrl.engines.reference import ReferenceSettings
from lightning_flashrl.engines.reward_task import RewardSettings
from lightning_flashrl.engines.worker import WorkerStatistics, total
from lightning_flashrl.errors import EndOfStream, LeaseTimeoutError, WorkerFailedError, WouldBlock
from lightning_flashrl.streaming import (
    Lease,
    QueueVerbs,
    TransferQueue,
    TransferQueueClient,
    TransferQueueServer,
)
from lightning_flashrl.tasks import RewardFn
from lightning_flashrl.weights import StalenessGate, WeightPublisher

_MAX_FAILED = 64
"""So many rows, and two steps' worth of them, may fail one after the other before a run is given up."""
_MANY_UNINFORMATIVE, _MAX_UNINFORMATIVE = 4, 64
"""So many steps' worth of rows without anything to learn from are warned of, and given up."""
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
        make_engine: makes a worker's engine, in its process; ``None`` if others generate.
        reward: scores; ``None`` if others do.
        num_reward_workers: processes that do so; 0 for the rollout workers themselves.
        encode: a prompt's tokens.
        decode: a completion's text.
        take: gives problems, from ``first_group`` on.
        probe: ``[L]`` tokens by whose log-probs engines prove that they have new weights.
        first_group: number of the first prompt group.
        log_dir: where workers' output goes.
        seed: of the rollouts.
        lease_timeout_s: how long rows are a worker's or rank's without a word of it.
    """

    settings: RolloutSettings
    make_engine: Callable[[], RolloutEngine] | None
    reward: RewardFn | None
    num_reward_workers: int
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[list[int]], str]
    take: TakeProblems
    probe: Tensor
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
        self._version = -1
        self._num_taken: collections.Counter[str] = collections.Counter()  # micro-batches of this step, by task
        self._held: list[Lease] = []

    def micro_batches(self, version: int) -> Iterator[Lease]:
        """Iterate over this rank's micro-batches of the step that starts from a version, whose task they name.

        Raises:
            WorkerFailedError: nobody generates any more.
            LeaseLostError: this rank was without a word for so long that its rows went to others.
        """
        tasks = list(self.stages.trained)
        while tasks:
            lease = self._next(tasks, version)
            if lease is None:
                self._renew()
                continue
            self._hold(lease)
            yield lease
        self._held = [self._queue.renew(lease) for lease in self._held]

    def take(self, task: str, version: int, count: int | None = None, *, timeout_s: float) -> Lease | None:
        """Take rows for one task, if there are any more: this rank's next micro-batch if it is one that trains.

        Args:
            task: of the queue.
            version: that the step starts from.
            count: this many at most, for a task that does not train.
            timeout_s: how long to wait.

        Raises:
            WouldBlock: none are ready in time.
        """
        try:
            if task not in self.stages.trained:
                return self._queue.lease(task, count=count, allow_partial=True, timeout_s=timeout_s)
            lease = self._lease(task, version, timeout_s)
        except EndOfStream:
            return None
        except WouldBlock:
            self._renew()
            raise
        self._hold(lease)
        return lease

    def is_step_over(self, task: str, version: int) -> bool:
        """Whether a step has no more rows for a task that trains; rows that were handed out may come back."""
        try:
            lease = self._lease(task, version, 0.0)
        except WouldBlock:
            return False
        except EndOfStream:
            return True
        self._queue.release(lease)
        self._num_taken[task] -= 1
        return False

    def _hold(self, lease: Lease) -> None:
        """Keep a lease until its step is done, unless it gets values and is committed with them."""
        if self.began_s is None:
            self.began_s, self.waited_s = clock.now_s(), 0.0
        self._renew()
        if lease.task != CRITIC:
            self._held.append(lease)

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
        if version != self._version:  # the rows of the last step are final now, and no longer this rank's
            self._version, self._held = version, []
            self._num_taken.clear()
        lease = self._queue.lease(
            task,
            self.stages.fields(task),
            tokens=self._steps.micro_batch_tokens,
            policy_version=version,
            replica_rank=self._replica_rank,
            micro_batch=self._num_taken[task],
            timeout_s=timeout_s,
        )
        self._num_taken[task] += 1
        return lease

    def commit(self, lease: Lease, data: Mapping[str, Any]) -> None:
        """Write what was computed of a lease's rows, and be done with them."""
        self._queue.commit(lease, data)

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

    def finish(self, version: int) -> None:
        """Say that no rank will redo a step that starts from an earlier version."""

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
        """Let go of the queue, which goes on."""
        self._client.disconnect()


class HostSession(Session):
    """The session of rank 0, which hosts the streams.

    Args:
        steps: what a step is.
        workflow: how rollouts and training overlap.
        max_staleness: in policy versions.
        limit: prompt groups to be trained in all; ``None`` for no limit.
        filters_uninformative: whether groups with equal rewards are replaced.
        redoes_steps: whether a rank that dies has a successor, which does its part of a step again.
        weights: of the policy; the live ones.
        version: of these weights.
        score: log-probs of a sequence under the live weights.
        rollouts: who generates.
        stages: the run's tasks.
        reference: a policy whose weights, as they are now, are the reference's; for runs that have one.

    Attributes:
        address: for the other ranks.
        plan: which rows each step gets.
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
        redoes_steps: bool = False,
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
            redoes_steps=redoes_steps,
        )
        self._score = score
        self._has_warned = False
        with contextlib.ExitStack() as stack:
            queue = stack.enter_context(
                TransferQueue(stages.schema, stages.tasks(self.plan), lease_timeout_s=rollouts.lease_timeout_s)
            )
            super().__init__(queue, steps, 0, stages)
            self.host_queue = queue
            server = stack.enter_context(TransferQueueServer(queue))
            self.address = SessionAddress(server.endpoint, server.secret)
            self.publisher = stack.enter_context(WeightPublisher(weights))
            self._probe = rollouts.probe
            self.publisher.publish(weights, version, self._probe, score(self._probe))
            self.publisher.wait()
            self._fleets: dict[str, WorkerFleet] = {}
            if rollouts.make_engine is not None:
                self._start_rollouts(stack, rollouts, rollouts.make_engine, workflow)
            if rollouts.reward is not None and rollouts.num_reward_workers:
                self._start_rewards(stack, rollouts, rollouts.reward)
            if reference is not None:
                self._start_reference(stack, rollouts, reference, version)
            self.feeder = Feeder(
                queue,
                self.plan,
                rollouts.take,
                rollouts.encode,
                first_group=rollouts.first_group,
                seed=rollouts.seed,
            )
            stack.callback(self.feeder.close)
            self._resources = stack.pop_all()

    def _start_rollouts(
        self,
        stack: contextlib.ExitStack,
        rollouts: Rollouts,
        make_engine: Callable[[], RolloutEngine],
        workflow: Workflow,
    ) -> None:
        settings = rollouts.settings
        job = WorkerSettings(
            endpoint=self.address.endpoint,
            secret=self.address.secret,
            num_threads=settings.num_threads,
            weights=self.publisher.address,
            swap=workflow.swap,
            make_engine=make_engine,
            reward=None if self.stages.has_reward else rollouts.reward,
            decode=rollouts.decode,
            num_places=settings.num_slots + settings.num_ahead,
        )
        self._start(stack, job, settings.workers, rollouts.log_dir)

    def _start_rewards(self, stack: contextlib.ExitStack, rollouts: Rollouts, reward: RewardFn) -> None:
        job = RewardSettings(
            endpoint=self.address.endpoint,
            secret=self.address.secret,
            num_threads=rollouts.settings.num_threads,
            reward=reward,
            decode=rollouts.decode,
            num_processes=rollouts.num_reward_workers,
            timeout_s=rollouts.settings.reward_timeout_s,
        )
        self._start(stack, job, 1, rollouts.log_dir)

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
        self._start(stack, job, rollouts.settings.reference_workers, rollouts.log_dir)

    def _start(self, stack: contextlib.ExitStack, job: Job, num_workers: int, log_dir: Path | None) -> None:
        self._fleets[job.role] = stack.enter_context(WorkerFleet(job, num_workers, log_dir))

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
        self.plan.step_done(version)
        self._refresh()

    def finish(self, version: int) -> None:
        """Commit the rows of steps that no rank will redo."""
        self.plan.finalize(version)
        self._refresh()

    def _refresh(self) -> None:
        for task in self.stages.trained:
            self.host_queue.control.refresh(task)

    def check(self) -> None:
        """Say what went wrong with prompts or workers.

        Raises:
            WorkerFailedError: a worker raised an error, too many died, or nothing that they do succeeds.
            Exception: what the dataset of prompts or the tokenizer raised.
        """
        num_failed = self.plan.num_failed_in_a_row
        if num_failed >= max(_MAX_FAILED, 2 * self._steps.rows) and (why := self.last_failure):
            raise WorkerFailedError("the run", f"gets no completions: the last {num_failed} have all failed. {why}")
        self._check_informative()
        if self.feeder.error is not None:
            raise self.feeder.error
        for fleet in self._fleets.values():
            fleet.check()

    def _check_informative(self) -> None:
        """Training without an end in sight is said, and ended at last."""
        num = self.plan.num_uninformative_in_a_row
        said = (
            f"algorithm.filters_uninformative leaves out prompt groups with equal rewards, and the last {num} rows "
            "were all in such groups"
        )
        if num >= _MAX_UNINFORMATIVE * self._steps.rows:
            raise WorkerFailedError(
                "the run",
                f"gets nothing to learn from: {said}; give prompts that the model answers sometimes, or turn it off",
            )
        if num >= _MANY_UNINFORMATIVE * self._steps.rows and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"the step waits: {said}", stacklevel=2)

    def books(self) -> dict[str, float]:
        """Return what became of all rows so far, and how busy everybody was.

        Rows are counted by the queue's ledger; those that were left out, by the plan. What neither knows of is lost.
        """
        counts = self.host_queue.statistics()
        update = counts.tasks[UPDATE]
        with self.plan.changed:
            dropped = self.plan.num_failed + self.plan.num_uninformative
        dropped += update.num_stale - self.plan.num_uninformative
        num_decided = self.plan.num_decided(UPDATE)
        return {
            "rows_generated": float(counts.tasks["rollout"].num_committed),
            "rows_committed": float(update.num_committed + num_decided),
            "rows_dropped": float(dropped),
            "rows_left": float(update.num_open - num_decided),
            "rows_lost": float(counts.num_put - update.num_committed - dropped - update.num_open),
            "rollout_idle_share": self._idle_share("rollout"),
            "exposed_sync_s": self.publisher.exposed_s,
            "workers_replaced": float(sum(fleet.num_replaced for fleet in self._fleets.values())),
        }

    def metrics(self) -> dict[str, float]:
        """Return numbers to log with each step."""
        done, task = self.worker_statistics("rollout"), self.host_queue.statistics().tasks
        return {
            **{f"idle_share/{role}": fleet.idle_share() for role, fleet in self._fleets.items()},
            **{f"queue/{role}": float(task[role].num_ready) for role in self._fleets if role != "rollout"},
            "generated_length": done.num_tokens / max(1, done.num_completions),
            "exposed_sync_s": self.publisher.exposed_s,
            "queue/prompts": float(task["rollout"].num_open),
            "queue/ready": float(task[UPDATE].num_ready),
            "rows/generated": float(done.num_completions),
            "rows/failed": float(self.num_failed),
            "rows/uninformative": float(self.plan.num_uninformative),
            "rollout/version_lag": float(self.plan.gate.version - done.version),
        }

    @property
    def num_failed(self) -> int:
        """Rows that failed so far, as far as workers have told."""
        return sum(self.worker_statistics(role).num_failed for role in self._fleets)

    @property
    def last_failure(self) -> str:
        """Why a row failed; empty if none has."""
        return total([self.worker_statistics(role) for role in self._fleets]).last_failure

    def workers(self) -> list[WorkerRecord]:
        """Return what is known of each worker."""
        return [record for fleet in self._fleets.values() for record in fleet.records()]

    def worker_statistics(self, role: str = "rollout") -> WorkerStatistics:
        """Return the sum of what the workers of a role have done."""
        return self._fleets[role].statistics() if role in self._fleets else WorkerStatistics()

    def _idle_share(self, role: str) -> float:
        return self._fleets[role].idle_share() if role in self._fleets else 0.0

    def close(self) -> None:
        """End workers, server and queue."""
        self._resources.close()
