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
from lightning_flashrl.asyncrl.feeder import Feeder, TakeProblems
from lightning_flashrl.asyncrl.host import HostAddress, HostSettings, HostView, StreamHost
from lightning_flashrl.asyncrl.host_calls import HostService, RemoteHost, find_failure
from lightning_flashrl.asyncrl.host_process import HostHome, HostLeftError
from lightning_flashrl.asyncrl.recording import StepRecord
from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import CRITIC
from lightning_flashrl.engines.base import RolloutEngine, TrainerEngine
from lightning_flashrl.engines.fleet import Team
from lightning_flashrl.engines.process import POLICY, REFERENCE_POLICY, WorkerSettings
from lightning_flashrl.engines.reference import ReferenceSettings
from lightning_flashrl.engines.reward_task import RewardSettings
from lightning_flashrl.errors import ConfigurationError, EndOfStream, LeaseTimeoutError, WorkerFailedError, WouldBlock
from lightning_flashrl.streaming import Lease, QueueVerbs
from lightning_flashrl.tasks import RewardFn
from lightning_flashrl.weights import Swap, WeightPublisher, WeightsAddress

_MAX_FAILED = 64
"""So many rows, and two steps' worth of them, may fail one after the other before a run is given up."""
_MANY_UNINFORMATIVE, _MAX_UNINFORMATIVE = 4, 64
"""So many steps' worth of rows without anything to learn from are warned of, and given up."""
_LOOK_S = 0.2
"""How often a rank that waits for rows looks whether everybody is well."""
_PATIENCE_S = 600.0
"""So long a rank looks for the host: when that dies together with rank 0, rank 0's successor makes its model first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is asked.

    Attributes:
        open_at: gives problems from a number on.
        encode: a prompt's tokens.
        first_group: number of the first prompt group.
        seed: of the rollouts.
    """

    open_at: Callable[[int], TakeProblems]
    encode: Callable[[str], Sequence[int]]
    first_group: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is trained.

    Attributes:
        weights: by name; the live ones.
        version: of these weights.
        score: log-probs ``[L - 1]`` of tokens ``[L]`` but the first under the live weights.
        probe: ``[L]`` tokens by whose log-probs engines prove that they have new weights.
        reference: a policy whose weights, as they are now, are the reference's; ``None`` for runs without one.
    """

    weights: Mapping[str, Tensor]
    version: int
    score: Callable[[Tensor], Tensor]
    probe: Tensor
    reference: TrainerEngine | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Who generates and scores.

    Attributes:
        settings: how many workers, and how they sample.
        make_engine: makes a worker's engine, in its process; ``None`` if others generate.
        reward: scores; ``None`` if others do.
        num_reward_workers: processes that do so; 0 for the rollout workers themselves.
        decode: a completion's text.
    """

    settings: RolloutSettings
    make_engine: Callable[[], RolloutEngine] | None
    reward: RewardFn | None
    num_reward_workers: int
    decode: Callable[[list[int]], str]

    def teams(
        self, stages: Stages, swap: Swap, reference: TrainerEngine | None, max_tokens: int, num_standby: int
    ) -> Iterator[Team]:
        """Iterate over the run's workers.

        Args:
            stages: the run's tasks.
            swap: when rollout workers take new weights.
            reference: the reference policy, for runs that have one.
            max_tokens: of a lease and of a forward pass.
            num_standby: workers of each role that are kept ready, unless the settings say so.

        Raises:
            ConfigurationError: a reward or engine that cannot be sent to another process.
        """
        settings = self.settings
        num_standby = num_standby if settings.standby is None else settings.standby
        if self.make_engine is not None:
            rollout = WorkerSettings(
                num_threads=settings.num_threads,
                swap=swap,
                make_engine=self.make_engine,
                reward=None if stages.has_reward else self.reward,
                decode=self.decode,
                num_places=settings.num_slots + settings.num_ahead,
            )
            yield Team.of(rollout, settings.workers, num_standby)
        if self.reward is not None and self.num_reward_workers:
            reward = RewardSettings(
                num_threads=settings.num_threads,
                reward=self.reward,
                decode=self.decode,
                num_processes=self.num_reward_workers,
                timeout_s=settings.reward_timeout_s,
            )
            yield Team.of(reward, 1, num_standby)
        if reference is not None:
            frozen = ReferenceSettings(
                num_threads=settings.num_threads, make_engine=reference.twin_factory(), max_tokens=max_tokens
            )
            yield Team.of(frozen, settings.reference_workers, num_standby)


class Session:
    """What every rank has of the streams.

    Args:
        queue: the queue, or a client of it.
        steps: what a step is.
        replica_rank: which data-parallel replica this is.
        stages: the run's tasks.
        record: where micro-batches are written down; ``None`` for nowhere.

    Attributes:
        waited_s: time without a micro-batch since the first one came, and since :meth:`take_waited_s`.
        began_s: when the first one came, on :func:`lightning_flashrl.clock.now_s`: rollout workers had started then.
        held: around each wait for rows. A rank that waits for what a lost rank should do has come to where the recovery
            may begin.
    """

    held: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def __init__(
        self,
        queue: QueueVerbs,
        steps: StepSettings,
        replica_rank: int,
        stages: Stages,
        record: StepRecord | None = None,
    ) -> None:
        self._record = record
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
        tasks, trained = list(self.stages.trained), []
        while tasks:
            lease = self._next(tasks, version)
            if lease is None:
                self._renew()
                continue
            self._hold(lease)
            trained.append(lease)
            yield lease
        self._held = [self._queue.renew(lease) for lease in self._held]
        if self._record is not None:
            self._record.write(version, trained)

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

    def take_waited_s(self) -> float:
        """Return how long this rank has waited for micro-batches since the last call."""
        waited_s, self.waited_s = self.waited_s, 0.0
        return waited_s

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
        with self.held():
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
        record: where micro-batches are written down; ``None`` for nowhere.
        home: of the host, where ranks may die.

    Raises:
        HostLeftError: all steps are trained.
    """

    def __init__(
        self,
        address: HostAddress,
        steps: StepSettings,
        replica_rank: int,
        stages: Stages,
        record: StepRecord | None = None,
        home: HostHome | None = None,
    ) -> None:
        if home is None:
            self._client = RemoteHost(address).queue
        else:
            home.check_not_over()
            host = RemoteHost(address, home.check_not_over, connect_timeout_s=_PATIENCE_S)
            self._client = host.queue
            self._client.reconnect_timeout_s = _PATIENCE_S
            try:
                home.keep_weights(host)
            except HostLeftError:
                self._client.disconnect()
                raise
        self._home = home
        super().__init__(self._client, steps, replica_rank, stages, record)

    def check(self) -> None:
        """Say what went wrong with workers. Rank 0 may be lost, and not look.

        Raises:
            WorkerFailedError: a worker raised an error, or too many died.
        """
        failure = find_failure(self._client)
        if failure is not None:
            raise WorkerFailedError(*failure)

    def close(self) -> None:
        """Let go of the queue, which goes on."""
        self._client.disconnect()
        if self._home is not None:
            self._home.let_go()


class EndedSession(Session):
    """The session of a rank that was replaced when all steps were trained, and the host had left.

    Args:
        stages: the run's tasks.
    """

    def __init__(self, stages: Stages) -> None:
        self.waited_s = 0.0
        self.began_s = None
        self.stages = stages

    def micro_batches(self, version: int) -> Iterator[Lease]:
        """Iterate over nothing."""
        return iter(())


class ReplaySession(Session):
    """The session of a rank that trains what a record holds.

    Args:
        record: of an earlier run.
        stages: the run's tasks.
    """

    def __init__(self, record: StepRecord, stages: Stages) -> None:
        record.check()
        self.waited_s = 0.0
        self.began_s = clock.now_s()
        self.stages = stages
        self._read = record

    def has(self, version: int) -> bool:
        """Whether the record holds a step that starts from a version."""
        return self._read.has(version)

    def micro_batches(self, version: int) -> Iterator[Lease]:
        """Iterate over what this rank trained in the step that starts from a version; nothing after the last one."""
        return self._read.read(version) if self.has(version) else iter(())

    def commit(self, lease: Lease, data: Mapping[str, Any]) -> None:
        """Do nothing: what was computed of the rows stands in the record, too."""


class LeadSession(Session):
    """The session of rank 0, from where prompts come, and new weights.

    Args:
        steps: what a step is.
        workflow: how rollouts and training overlap.
        max_staleness: in policy versions.
        stages: the run's tasks.
        policy: what is trained.
        rollouts: who generates and scores.
        prompts: what is asked.
        limit: prompt groups to be trained in all; ``None`` for no limit.
        filters_uninformative: whether groups with equal rewards are replaced.
        home: of a host in a process of its own, for ranks that may die and have successors, which do their parts of a
            step again; ``None`` for a host in this process.
        log_dir: where workers' output goes; ``None`` leaves it in the terminal.
        lease_timeout_s: how long rows are a worker's or rank's without a word of it.
        record: where micro-batches are written down; ``None`` for nowhere.
        snapshot: of the session from whose checkpoint this one goes on; ``None`` to begin with nothing.

    Attributes:
        address: for the other ranks.
        publisher: of the weights.
        queue: the queue.
    """

    def __init__(
        self,
        steps: StepSettings,
        workflow: Workflow,
        max_staleness: int,
        *,
        stages: Stages,
        policy: Policy,
        rollouts: Rollouts,
        prompts: Prompts,
        limit: int | None = None,
        filters_uninformative: bool = False,
        home: HostHome | None = None,
        log_dir: Path | None = None,
        lease_timeout_s: float,
        record: StepRecord | None = None,
        snapshot: bytes | None = None,
    ) -> None:
        self._policy = policy
        self._has_warned = False
        with contextlib.ExitStack() as stack:
            teams = tuple(
                rollouts.teams(
                    stages,
                    workflow.swap,
                    policy.reference,
                    steps.micro_batch_tokens,
                    num_standby=int(home is not None),
                )
            )

            def settings() -> HostSettings:
                return HostSettings(
                    steps=steps,
                    workflow=workflow,
                    max_staleness=0 if workflow.is_on_policy else max_staleness,
                    stages=stages,
                    version=policy.version,
                    limit=limit,
                    filters_uninformative=filters_uninformative,
                    redoes_steps=home is not None,
                    first_group=prompts.first_group,
                    lease_timeout_s=lease_timeout_s,
                    weights=self._weights,
                    teams=teams,
                    log_dir=log_dir,
                    snapshot=snapshot,
                )

            self._host: StreamHost | RemoteHost
            if home is None:
                self._weights = self._publish_first(stack)
                self._host = _serve(StreamHost(settings()))
                stack.callback(self._host.close)
            else:
                found = self._take_over(home, stack)
                home.settings = settings
                self._host = found or home.start(settings)
                stack.callback(home.close)
                stack.callback(self._host.close)
                stack.callback(home.note_over)
            stack.callback(self._host.end_workers)
            self._published = self.publisher.version
            self.queue = self._host.queue
            self.address = self._host.address
            super().__init__(self.queue, steps, 0, stages, record)
            self._feeder = Feeder(
                self.queue, self._host, prompts.open_at, prompts.encode, group_size=steps.group_size, seed=prompts.seed
            )
            stack.callback(self._feeder.close)
            self._resources = stack.pop_all()

    def _take_over(self, home: HostHome, stack: contextlib.ExitStack) -> RemoteHost | None:
        """Go on with what a predecessor has left: its weights, wherever they are, and its host, which is returned."""
        found = home.find()
        stack.callback(home.let_go)
        weights = None
        if found is not None:
            try:
                weights = home.keep(found.surroundings.weights)
            except ConfigurationError:  # it has died meanwhile
                found.queue.disconnect()
                found = None
        weights = weights or home.find_weights()
        if weights is None:
            self._weights = self._publish_first(stack)
        else:
            self._weights = weights
            self.publisher = stack.enter_context(WeightPublisher.attach(weights[POLICY]))
        return found

    def _publish_first(self, stack: contextlib.ExitStack) -> dict[str, WeightsAddress]:
        """Publish the weights that training begins with. Those of a reference are kept beside those that change."""
        policy = self._policy
        self.publisher = stack.enter_context(WeightPublisher(policy.weights))
        self.publisher.publish(policy.weights, policy.version, policy.probe, policy.score(policy.probe))
        self.publisher.wait()
        weights = {POLICY: self.publisher.address}
        if (reference := policy.reference) is not None:
            publisher = stack.enter_context(WeightPublisher(reference.weights()))
            publisher.publish(reference.weights(), policy.version, policy.probe, reference.score(policy.probe))
            publisher.wait()
            weights[REFERENCE_POLICY] = publisher.address
        return weights

    def micro_batches(self, version: int) -> Iterator[Lease]:
        """Iterate over the step's micro-batches; see :meth:`Session.micro_batches`."""
        if version > self._published:  # a predecessor died before it had published them
            self.step_done(self._policy.weights, version)
        return super().micro_batches(version)

    def view(self) -> HostView:
        """Return how the run stands."""
        return self._host.view()

    def books(self) -> dict[str, float]:
        """Return what became of all rows so far, and how busy everybody was."""
        return {**self.view().books(), "exposed_sync_s": self.publisher.exposed_s}

    def metrics(self) -> dict[str, float]:
        """Return numbers to log with each step."""
        return {**self.view().metrics(), "exposed_sync_s": self.publisher.exposed_s}

    def before_update(self) -> None:
        """Wait until the last version's weights are copied."""
        self.publisher.wait()

    def step_done(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Publish the new weights, and let the next step and its prompts begin."""
        if version > self._published:  # else a predecessor has published them
            self._published = version
            self.publisher.publish(weights, version, self._policy.probe, self._policy.score(self._policy.probe))
        self._host.step_done(version)

    def finish(self, version: int) -> None:
        """Commit the rows of steps that no rank will redo."""
        self._host.finish(version)

    def snapshot(self) -> bytes:
        """Return rows and prompts that are under way, for a checkpoint."""
        return self._host.snapshot()

    def scale(self, role: str, num_workers: int) -> None:
        """Add or remove workers; see :meth:`StreamHost.scale`."""
        self._host.scale(role, num_workers)

    def check(self) -> None:
        """Say what went wrong with prompts or workers.

        Raises:
            WorkerFailedError: a worker raised an error, too many died, or nothing that they do succeeds.
            Exception: what the dataset of prompts or the tokenizer raised.
        """
        view = self.view()
        num_failed = view.num_failed_in_a_row
        if num_failed >= max(_MAX_FAILED, 2 * self._steps.rows) and (why := view.last_failure):
            raise WorkerFailedError("the run", f"gets no completions: the last {num_failed} have all failed. {why}")
        self._check_informative(view.num_uninformative_in_a_row)
        if self._feeder.error is not None:
            raise self._feeder.error
        if view.failure is not None:
            raise WorkerFailedError(*view.failure)

    def _check_informative(self, num: int) -> None:
        """Training without an end in sight is said, and ended at last."""
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

    def close(self) -> None:
        """End workers, server and queue."""
        self._resources.close()


def _serve(host: StreamHost) -> StreamHost:
    HostService(host)
    return host
