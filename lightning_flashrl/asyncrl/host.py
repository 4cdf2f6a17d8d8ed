"""What a run's training processes share: the queue, the plan of its steps, the workers.

It lives in the process of rank 0, or, where ranks may die and come back, in one of its own
(:mod:`lightning_flashrl.asyncrl.host_process`). That one may die, too: what it must know stands in the queue's journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.settings import StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import CRITIC, GROUP, UPDATE, VALUES, PlanState, StepPlan, StepSampler
from lightning_flashrl.engines.fleet import Succession, Team, WorkerFleet, idle_share, summed
from lightning_flashrl.engines.process import Surroundings
from lightning_flashrl.engines.worker import WorkerStatistics, total
from lightning_flashrl.engines.worker_process import WorkerRecord
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import QueueStatistics, TransferQueue, TransferQueueServer
from lightning_flashrl.weights import StalenessGate, WeightsAddress, keep


class HostAddress(msgspec.Struct, frozen=True):
    """Where a host is, or will be.

    Attributes:
        endpoint: of its queue.
        secret: of its queue.
        journal: file from which the next host goes on when this one dies; empty for none.
    """

    endpoint: str
    secret: str
    journal: str = ""

    @property
    def port(self) -> int:
        """TCP port of the queue's server."""
        return int(self.endpoint.rpartition(":")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """What a host must know. It may be pickled, and needs none of the user's code.

    Attributes:
        steps: what a step is.
        workflow: how rollouts and training overlap.
        max_staleness: in policy versions.
        stages: the run's tasks.
        version: of the policy now.
        limit: prompt groups to be trained in all; ``None`` for no limit.
        filters_uninformative: whether groups with equal rewards are replaced.
        redoes_steps: whether a rank that dies has a successor, which does its part of a step again.
        first_group: number of the first prompt group.
        lease_timeout_s: how long rows are a worker's or rank's without a word of it.
        weights: where weights are published, by the name of the policy.
        teams: the workers.
        log_dir: where their output goes.
        snapshot: what :meth:`StreamHost.snapshot` of an earlier run has returned; ``None`` to begin with nothing.
        lost_s: when the host before was lost, on :func:`lightning_flashrl.clock.now_s`; ``None`` for the first one.
    """

    steps: StepSettings
    workflow: Workflow
    max_staleness: int
    stages: Stages
    version: int
    limit: int | None
    filters_uninformative: bool
    redoes_steps: bool
    first_group: int
    lease_timeout_s: float
    weights: dict[str, WeightsAddress]
    teams: tuple[Team, ...]
    log_dir: Path | None
    snapshot: bytes | None = None
    lost_s: float | None = None


class HostState(msgspec.Struct, frozen=True):
    """What a host must know to go on in another process, beside the rows of its queue.

    Attributes:
        plan: state of the plan.
        wanted: how many workers of each role there shall be.
        workers: what is known of each.
        num_replaced: workers that died and were replaced.
        recovery_ms: see :attr:`HostView.recovery_ms`.
        is_snapshot: whether it comes from a checkpoint, and nobody has gone on from it yet.
        num_inherited: see :attr:`HostView.num_inherited`.
    """

    plan: PlanState
    wanted: dict[str, int]
    workers: list[WorkerRecord]
    num_replaced: int
    recovery_ms: dict[str, list[float]]
    is_snapshot: bool = False
    num_inherited: int = 0


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """How a run stands.

    Attributes:
        pid: of the host.
        queue: what is in the queue.
        version: of the policy that the current step starts from.
        num_open: prompt groups that have begun and are not trained.
        num_begun: prompt groups that have begun.
        room: prompt groups that may begin now.
        num_decided: rows of steps that are done, but not final.
        num_inherited: rows in the queue that had been trained before the checkpoint from which the run goes on.
        num_failed_in_a_row: rows that failed since the last complete one.
        num_uninformative: rows that were replaced because their group had equal rewards.
        num_uninformative_in_a_row: those since a step last took a group.
        workers: what is known of each, also of those that are gone.
        num_replaced: workers that died and were replaced.
        recovery_ms: by role, from the loss of each process until its successor served; the host's is ``"queue"``.
        failure: name and reason of a worker's failure that ends the run.
    """

    pid: int
    queue: QueueStatistics
    version: int
    num_open: int
    num_begun: int
    room: int
    num_decided: int
    num_inherited: int
    num_failed_in_a_row: int
    num_uninformative: int
    num_uninformative_in_a_row: int
    workers: list[WorkerRecord]
    num_replaced: int
    recovery_ms: dict[str, list[float]]
    failure: tuple[str, str] | None

    @property
    def num_finished_groups(self) -> int:
        """Prompt groups that are done with: trained, failed or replaced."""
        return self.num_begun - self.num_open

    @property
    def num_failed(self) -> int:
        """Rows that failed so far, as far as workers have told."""
        return total([worker.statistics for worker in self.workers]).num_failed

    @property
    def last_failure(self) -> str:
        """Why a row failed; empty if none has."""
        return total([worker.statistics for worker in self.workers]).last_failure

    @property
    def roles(self) -> list[str]:
        """Roles of the workers."""
        return list(dict.fromkeys(worker.role for worker in self.workers))

    def statistics(self, role: str = "rollout") -> WorkerStatistics:
        """Return the sum of what the workers of a role have done."""
        return summed([worker for worker in self.workers if worker.role == role])

    def idle_share(self, role: str = "rollout") -> float:
        """Return the share of the time of a role's workers in which they had nothing to do."""
        return idle_share([worker for worker in self.workers if worker.role == role])

    def books(self) -> dict[str, float]:
        """Return what became of all rows so far, and how busy rollouts were.

        Rows are counted by the queue's ledger; those that were left out, by the plan. What neither knows of is lost.
        Of a run that goes on from a checkpoint, what was trained before that does not count.
        """
        update = self.queue.tasks[UPDATE]
        dropped = update.num_dropped + update.num_stale
        return {
            "rows_generated": float(self.queue.tasks["rollout"].num_committed - self.num_inherited),
            "rows_committed": float(update.num_committed + self.num_decided - self.num_inherited),
            "rows_dropped": float(dropped),
            "rows_left": float(update.num_open - self.num_decided),
            "rows_lost": float(self.queue.num_put - update.num_committed - dropped - update.num_open),
            "rows_resumed": float(self.statistics().num_resumed),
            "rollout_idle_share": self.idle_share(),
            "workers_replaced": float(self.num_replaced),
        }

    def metrics(self) -> dict[str, float]:
        """Return numbers to log with each step."""
        done, tasks = self.statistics(), self.queue.tasks
        return {
            **{f"idle_share/{role}": self.idle_share(role) for role in self.roles},
            **{f"queue/{role}": float(tasks[role].num_ready) for role in self.roles if role != "rollout"},
            "generated_length": done.num_tokens / max(1, done.num_completions),
            "queue/prompts": float(tasks["rollout"].num_open),
            "queue/ready": float(tasks[UPDATE].num_ready),
            "rows/generated": float(done.num_completions),
            "rows/failed": float(self.num_failed),
            "rows/uninformative": float(self.num_uninformative),
            "rollout/version_lag": float(self.version - done.version),
        }


def run_name(secret: str) -> str:
    """Return what all hosts of a run, and their workers, are known by."""
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


class StreamHost:
    """A run's queue, plan and workers, in this process.

    Args:
        settings: of the run.
        port: of the queue's server; 0 for any.
        secret: of the queue; a fresh one if none is given.
        keeps_weights: whether the memory of the weights stays when the process that publishes them is gone.
        journal: where the queue and the plan are written down, so that the next host goes on with them.
        keeper_pid: the process that keeps the workers running until the next host is there; ``None`` if they end with
            this one.

    Attributes:
        address: for other processes.
        queue: the queue.
        plan: which rows each step gets.
        server: of the queue.
        surroundings: what its clients must know.
    """

    _before: HostState | None

    def __init__(
        self,
        settings: HostSettings,
        *,
        port: int = 0,
        secret: str | None = None,
        keeps_weights: bool = False,
        journal: Path | None = None,
        keeper_pid: int | None = None,
    ) -> None:
        steps = settings.steps
        gate = StalenessGate(settings.max_staleness, steps.prompts)
        gate.restored(settings.version)
        self.plan = StepPlan(
            gate,
            steps.group_size,
            waits_for_all=settings.workflow is Workflow.SYNC,
            filters_uninformative=settings.filters_uninformative,
            limit=settings.limit,
            redoes_steps=settings.redoes_steps,
            first_group=settings.first_group,
        )
        self._stages = settings.stages
        self._settings = settings
        self._is_over = False
        self._before = None
        self._num_inherited = 0
        self._own_recovery_ms: list[float] = []
        self._fleets: list[WorkerFleet] = []
        with contextlib.ExitStack() as stack:
            tasks = settings.stages.tasks(self.plan)
            self.queue = stack.enter_context(
                TransferQueue(
                    settings.stages.schema,
                    tasks,
                    lease_timeout_s=settings.lease_timeout_s,
                    secret=secret,
                    journal=journal,
                    hear_note=self._hear,
                    snapshot=settings.snapshot,
                )
            )
            if self._before is not None:
                self._settle()
            if journal is not None:
                self.plan.keep = self._keep
                with self.queue.control.lock, self.plan.changed:
                    self._keep()
            self.server = stack.enter_context(TransferQueueServer(self.queue, port, starts=False))
            weights = settings.weights
            if keeps_weights:
                weights = {name: keep(address) for name, address in weights.items()}
            self.surroundings = Surroundings(self.server.endpoint, self.server.secret, weights)
            succession = None if keeper_pid is None else self._succession(keeper_pid)
            for team in settings.teams:
                wanted = self._wanted().get(team.role)
                fleet = WorkerFleet(team, self.surroundings, settings.log_dir, wanted, succession)
                self._fleets.append(stack.enter_context(fleet))
            self._close_books()
            self.address = HostAddress(self.server.endpoint, self.server.secret, str(journal or ""))
            self._resources = stack.pop_all()
        if settings.lost_s is not None:
            self._own_recovery_ms.append(1e3 * (clock.now_s() - settings.lost_s))

    # ------------------------------------------------------------------ another process
    def _hear(self, note: bytes) -> None:
        """Take over from a host that is gone, before its rows come."""
        self._before = msgspec.msgpack.decode(note, type=HostState)
        self.plan.load(self._before.plan)
        self._num_inherited = self._before.num_inherited
        if self._before.is_snapshot:
            self.plan.begin_anew(self._settings.version, self._settings.limit)

    def _succession(self, keeper_pid: int) -> Succession:
        """What makes workers find the next host, and this one theirs."""
        before = [] if self._before is None else self._before.workers
        return Succession(run_name(self.server.secret), keeper_pid, before)

    def _close_books(self) -> None:
        """Of workers of earlier hosts that have not been taken over."""
        if self._before is not None:
            earlier, _ = self._earlier_and_own_workers()
            for worker in earlier:
                worker.state = "ended" if worker.state == "ended" else "lost"
            self._before = msgspec.structs.replace(self._before, workers=earlier)

    def _settle(self) -> None:
        """Bring the plan to where the queue is: it may have come further than the last note."""
        with self.queue.control.lock:
            groups, open_rows = self.queue.control.tagged(GROUP, self._stages.trained)
            self.plan.settle(groups, open_rows)
            for task in self._stages.trained:
                for pool in self.queue.control.ledger.pools(task):
                    assert isinstance(pool.sampler, StepSampler)
                    pool.sampler.settle(groups, open_rows[task])
                self.queue.control.refresh(task)
            if self._before is not None and self._before.is_snapshot:
                committed = self.queue.statistics().tasks[UPDATE].num_committed
                self._num_inherited = committed + self.plan.num_decided(UPDATE)

    def snapshot(self) -> bytes:
        """Return rows and prompts that are under way, for the host of a run that goes on from a checkpoint."""
        with self.queue.control.lock:
            note = msgspec.msgpack.encode(HostState(self.plan.state(), {}, [], 0, {}, is_snapshot=True))
            # The critic's values are of the weights that are trained next.
            return self.queue.snapshot(note, without=(CRITIC, VALUES) if self._stages.has_critic else None)

    def _keep(self) -> None:
        """Write down what the next host must know."""
        state = HostState(
            self.plan.state(),
            self._wanted(),
            self._workers(),
            self._num_replaced(),
            self._recovery_ms(),
            num_inherited=self._num_inherited,
        )
        self.queue.note(msgspec.msgpack.encode(state))

    def _wanted(self) -> dict[str, int]:
        before = {} if self._before is None else self._before.wanted
        return before | {fleet.role: fleet.num_wanted for fleet in self._fleets}

    def _earlier_and_own_workers(self) -> tuple[list[WorkerRecord], list[WorkerRecord]]:
        """Workers of earlier hosts that have not been taken over, and those of this one."""
        own = [record for fleet in self._fleets for record in fleet.records()]
        taken = {(worker.pid, worker.since_s) for worker in own}
        before = [] if self._before is None else self._before.workers
        return [worker for worker in before if (worker.pid, worker.since_s) not in taken], own

    def _workers(self) -> list[WorkerRecord]:
        earlier, own = self._earlier_and_own_workers()
        return [*earlier, *own]

    def _num_replaced(self) -> int:
        before = 0 if self._before is None else self._before.num_replaced
        return before + sum(fleet.num_replaced for fleet in self._fleets)

    def _recovery_ms(self) -> dict[str, list[float]]:
        found = {} if self._before is None else {role: list(some) for role, some in self._before.recovery_ms.items()}
        for role, some in (("queue", self._own_recovery_ms), *((one.role, one.recovery_ms) for one in self._fleets)):
            if some:
                found.setdefault(role, []).extend(some)
        return found

    # ------------------------------------------------------------------ prompts
    def resume(self) -> int:
        """Say that prompts come from somebody else from now on. Returns the number of the next group."""
        with self.queue.control.lock:  # it comes before the plan's own
            return self.plan.resume()

    def wait_for_room(self, timeout_s: float) -> int:
        """Return how many prompt groups may begin now; 0 if none may in time."""
        plan = self.plan
        with plan.changed:
            plan.changed.wait_for(lambda: self._is_over or plan.room(), timeout_s)
            return 0 if self._is_over else plan.room()

    def begin(self, first_group: int, count: int) -> int:
        """Begin prompt groups, whose prompts are put next; see :meth:`StepPlan.begin`.

        Raises:
            StalenessExceededError: there is no room for them.
        """
        with self.queue.control.lock:
            return self.plan.begin(first_group, count)

    def end_prompts(self) -> None:
        """Say that there are no more prompts."""
        with self.queue.control.lock:
            self.plan.end_prompts()
        self._refresh()

    # ------------------------------------------------------------------ steps
    def step_done(self, version: int) -> None:
        """A step is decided: its rows are trained, the next one begins. To say so again changes nothing.

        Args:
            version: of the policy after it.
        """
        with self.queue.control.lock:
            self.plan.step_done(version)
        self._refresh()

    def finish(self, version: int) -> None:
        """No rank will redo a step that starts from an earlier version."""
        with self.queue.control.lock:
            self.plan.finalize(version)
        self._refresh()

    def _refresh(self) -> None:
        for task in self._stages.trained:
            self.queue.control.refresh(task)

    # ------------------------------------------------------------------ how it stands
    @property
    def failure(self) -> tuple[str, str] | None:
        """Name and reason of a worker's failure that ends the run."""
        return next(((fleet.error.name, fleet.error.reason) for fleet in self._fleets if fleet.error is not None), None)

    def view(self) -> HostView:
        """Return how the run stands."""
        plan, statistics = self.plan, self.queue.statistics()
        with plan.changed:
            return HostView(
                pid=os.getpid(),
                queue=statistics,
                version=plan.gate.version,
                num_open=plan.gate.num_open,
                num_begun=plan.num_begun,
                room=plan.room(),
                num_decided=plan.num_decided(UPDATE),
                num_inherited=self._num_inherited,
                num_failed_in_a_row=plan.num_failed_in_a_row,
                num_uninformative=plan.num_uninformative,
                num_uninformative_in_a_row=plan.num_uninformative_in_a_row,
                workers=self._workers(),
                num_replaced=self._num_replaced(),
                recovery_ms=self._recovery_ms(),
                failure=self.failure,
            )

    def scale(self, role: str, num_workers: int) -> None:
        """Add or remove workers.

        Args:
            role: theirs.
            num_workers: how many there shall be; with 0 the run waits until there are some again.

        Raises:
            ConfigurationError: the run has no such role, or a number below 0.
        """
        fleet = next((fleet for fleet in self._fleets if fleet.role == role), None)
        if fleet is None:
            roles = ", ".join(fleet.role for fleet in self._fleets) or "none"
            raise ConfigurationError(f"the run has no {role!r} workers; it has {roles}")
        fleet.scale(num_workers)
        if self.queue.journal is not None:
            with self.queue.control.lock, self.plan.changed:
                self._keep()

    def end_workers(self) -> None:
        """End workers; afterwards :meth:`view` has all that they had to tell."""
        for fleet in self._fleets:
            fleet.close()

    def close(self) -> None:
        """End workers, server and queue."""
        with self.plan.changed:
            self._is_over = True
            self.plan.changed.notify_all()
        self._resources.close()
