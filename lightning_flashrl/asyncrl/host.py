"""What a run's training processes share: the queue, the plan of its steps, the workers.

It lives in the process of rank 0, or, where ranks may die and come back, in one of its own
(:mod:`lightning_flashrl.asyncrl.host_process`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lightning_flashrl.asyncrl.settings import StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import UPDATE, StepPlan
from lightning_flashrl.engines.process import Surroundings, Team, WorkerFleet, WorkerRecord, idle_share, summed
from lightning_flashrl.engines.worker import WorkerStatistics, total
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import QueueStatistics, TransferQueue, TransferQueueServer
from lightning_flashrl.weights import StalenessGate, WeightsAddress, keep


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


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """How a run stands.

    Attributes:
        queue: what is in the queue.
        version: of the policy that the current step starts from.
        num_open: prompt groups that have begun and are not trained.
        num_begun: prompt groups that have begun.
        room: prompt groups that may begin now.
        is_last: no more groups will begin.
        num_decided: rows of steps that are done, but not final.
        num_dropped: rows that failed or were replaced.
        num_failed_in_a_row: rows that failed since the last complete one.
        num_uninformative: rows that were replaced because their group had equal rewards.
        num_uninformative_in_a_row: those since a step last took a group.
        workers: what is known of each, also of those that are gone.
        num_replaced: workers that died and were replaced.
        failure: name and reason of a worker's failure that ends the run.
    """

    queue: QueueStatistics
    version: int
    num_open: int
    num_begun: int
    room: int
    is_last: bool
    num_decided: int
    num_dropped: int
    num_failed_in_a_row: int
    num_uninformative: int
    num_uninformative_in_a_row: int
    workers: list[WorkerRecord]
    num_replaced: int
    failure: tuple[str, str] | None

    @property
    def is_over(self) -> bool:
        """Whether all rows have been trained and no more come."""
        return self.is_last and not self.num_open

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
        """
        update = self.queue.tasks[UPDATE]
        dropped = self.num_dropped + update.num_stale - self.num_uninformative
        return {
            "rows_generated": float(self.queue.tasks["rollout"].num_committed),
            "rows_committed": float(update.num_committed + self.num_decided),
            "rows_dropped": float(dropped),
            "rows_left": float(update.num_open - self.num_decided),
            "rows_lost": float(self.queue.num_put - update.num_committed - dropped - update.num_open),
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


class StreamHost:
    """A run's queue, plan and workers, in this process.

    Args:
        settings: of the run.
        port: of the queue's server; 0 for any.
        secret: of the queue; a fresh one if none is given.
        keeps_weights: whether the memory of the weights stays when the process that publishes them is gone.

    Attributes:
        queue: the queue.
        plan: which rows each step gets.
        server: of the queue.
        surroundings: what its clients must know.
    """

    def __init__(
        self, settings: HostSettings, *, port: int = 0, secret: str | None = None, keeps_weights: bool = False
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
        self._is_over = False
        with contextlib.ExitStack() as stack:
            tasks = settings.stages.tasks(self.plan)
            self.queue = stack.enter_context(
                TransferQueue(settings.stages.schema, tasks, lease_timeout_s=settings.lease_timeout_s, secret=secret)
            )
            self.server = stack.enter_context(TransferQueueServer(self.queue, port))
            weights = settings.weights
            if keeps_weights:
                weights = {name: keep(address) for name, address in weights.items()}
            self.surroundings = Surroundings(self.server.endpoint, self.server.secret, weights)
            self._fleets = [
                stack.enter_context(WorkerFleet(team, self.surroundings, settings.log_dir)) for team in settings.teams
            ]
            self._resources = stack.pop_all()

    # ------------------------------------------------------------------ prompts
    def resume(self) -> int:
        """Say that prompts come from somebody else from now on. Returns the number of the next group."""
        return self.plan.resume()

    def wait_for_room(self, timeout_s: float) -> int:
        """Return how many prompt groups may begin now; 0 if none may in time."""
        plan = self.plan
        with plan.changed:
            plan.changed.wait_for(lambda: self._is_over or plan.room(), timeout_s)
            return 0 if self._is_over else plan.room()

    def begin(self, count: int) -> tuple[int, int]:
        """Begin prompt groups, whose prompts are put next.

        Returns:
            The first one's number, and the policy version that may generate them at the earliest.

        Raises:
            StalenessExceededError: there is no room for them.
        """
        return self.plan.begin(count)

    def end_prompts(self) -> None:
        """Say that there are no more prompts."""
        self.plan.end_prompts()
        self._refresh()

    # ------------------------------------------------------------------ steps
    def step_done(self, version: int) -> None:
        """A step is decided: its rows are trained, the next one begins. To say so again changes nothing.

        Args:
            version: of the policy after it.
        """
        self.plan.step_done(version)
        self._refresh()

    def finish(self, version: int) -> None:
        """No rank will redo a step that starts from an earlier version."""
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
                queue=statistics,
                version=plan.gate.version,
                num_open=plan.gate.num_open,
                num_begun=plan.num_begun,
                room=plan.room(),
                is_last=plan.is_last,
                num_decided=plan.num_decided(UPDATE),
                num_dropped=plan.num_failed + plan.num_uninformative,
                num_failed_in_a_row=plan.num_failed_in_a_row,
                num_uninformative=plan.num_uninformative,
                num_uninformative_in_a_row=plan.num_uninformative_in_a_row,
                workers=[record for fleet in self._fleets for record in fleet.records()],
                num_replaced=sum(fleet.num_replaced for fleet in self._fleets),
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
