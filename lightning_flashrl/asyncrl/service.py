"""The service interface: five verbs with which a training loop outside Lightning does asynchronous RL.

::

    put_prompts_data ─▶ queue ─▶ rollout workers ─▶ queue ─▶ get_experience_data ─ trains ─▶ weight_sync_notify
                          ▲  put_experience_data: fields that others compute, such as rewards        │
                          └──────────────────── new weights, the next step's room ◀─────────────────┘

:class:`RLService` is the side of the trainer's first process, :class:`RLClient` that of all others. Both are thin:
what happens stands in :mod:`~lightning_flashrl.asyncrl.session`.

Source: the names are those of AsyncFlow, arXiv 2507.01663, section 5, which publishes no signatures.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.host import HostAddress
from lightning_flashrl.asyncrl.prompts import Backlog, Tokenizer, as_problem, text_of
from lightning_flashrl.asyncrl.session import (
    LeadSession,
    Policy,
    Prompts,
    RankSession,
    Rollouts,
    Session,
)
from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import UPDATE
from lightning_flashrl.engines import RolloutEngine, TrainerEngine
from lightning_flashrl.errors import ConfigurationError, WouldBlock
from lightning_flashrl.streaming import Lease
from lightning_flashrl.tasks import RewardFn
from lightning_flashrl.weights import WeightsAddress

_LOOK_S = 0.2
"""How often who waits for rows looks whether everybody is well."""
_LONG_S = 5.0
"""After so long, whoever waits for prompts that nobody has put is told."""


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """How another process reaches a service; it may be pickled.

    Attributes:
        session: of the queue.
        weights: of the newest weights, for :class:`~lightning_flashrl.weights.WeightReceiver`.
        steps: what a step is.
        stages: the tasks.
        version: policy version when the address was asked for.
    """

    session: HostAddress
    weights: WeightsAddress
    steps: StepSettings
    stages: Stages
    version: int


class _Verbs:
    """What trainer and others have in common."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._version = 0

    def _open(self) -> Session:
        if self._session is None:
            raise ConfigurationError("the service has no engines; call init_engines() first, and close() last")
        return self._session

    @property
    def version(self) -> int:
        """Policy version that the current step starts from."""
        return self._version

    def get_experience_data(
        self, task: str = UPDATE, count: int | None = None, *, timeout_s: float | None = None
    ) -> Lease | None:
        """Take rows that are ready for a task.

        Args:
            task: ``"update"`` for the next micro-batch of the current step, or another one of the queue's tasks.
            count: this many rows at most, for tasks other than those that train.
            timeout_s: how long to wait; ``None`` for no limit.

        Returns:
            The rows under a lease; ``None`` if the current step has no more, or if no more rows come.

        Raises:
            ConfigurationError: a task that there is not, or no count where one is needed.
            WouldBlock: nothing was ready in time.
            WorkerFailedError: a worker raised an error, or too many died.

        Warns:
            UserWarning: it has waited for long, and there are no more prompts under way than have been waited for.
        """
        session = self._open()
        if task in session.stages.trained and count is not None:
            raise ConfigurationError(f"task {task!r} hands out micro-batches of a step; leave count={count} out")
        if task not in session.stages.trained and count is None:
            raise ConfigurationError(f"task {task!r} is asked for a number of rows; give count=...")
        begin_s = clock.now_s()
        deadline_s = math.inf if timeout_s is None else begin_s + timeout_s
        while True:
            wait_s = max(0.0, min(_LOOK_S, deadline_s - clock.now_s()))
            try:
                return session.take(task, self._version, count, timeout_s=wait_s)
            except WouldBlock:
                session.check()
                self._check_prompts(clock.now_s() - begin_s)
                if clock.now_s() >= deadline_s:
                    raise

    def _check_prompts(self, waited_s: float) -> None:
        """Say what whoever waits may have forgotten."""

    def put_experience_data(self, lease: Lease, data: Mapping[str, Any]) -> None:
        """Write what was computed of leased rows, and be done with them.

        Args:
            lease: of :meth:`get_experience_data`.
            data: columns by field, as :meth:`TransferQueue.put` takes them.

        Raises:
            SchemaMismatchError: data of another kind than the fields.
            LeaseLostError: the lease has run out; the rows went to somebody else.
        """
        self._open().commit(lease, data)

    def close(self) -> None:
        """Let go of everything."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RLClient(_Verbs):
    """The service's verbs in another process: a data-parallel rank of the trainer, or one that writes fields.

    Args:
        address: of the service, as :attr:`RLService.address` is now.
        replica_rank: which data-parallel replica this is.

    Raises:
        QueueUnavailableError: the service does not answer.
    """

    def __init__(self, address: ServiceAddress, replica_rank: int = 0) -> None:
        super().__init__()
        self.address = address
        self._version = address.version
        self._session = RankSession(address.session, address.steps, replica_rank, address.stages)

    def weight_sync_notify(self, version: int) -> None:
        """The step is done: the rows that this process took for it are trained.

        Args:
            version: of the policy after it, which :meth:`RLService.weight_sync_notify` returned.
        """
        self._open().step_done({}, version)
        self._version = version


class RLService(_Verbs):
    """Queue, weights and rollout workers for a training loop of one's own.

    Args:
        tokenizer: of the model.
        reward: a function of prompt, completion and row; ``None`` if whoever asks for the task ``"reward"`` scores.
        workflow: how rollouts and training overlap.
        max_staleness: how many versions older than the trained policy a row may be.
        steps: what a step is.
        rollout: who generates, and how.
        seed: of the rollouts.
        log_dir: where workers' output goes; ``None`` leaves it in the terminal.
        lease_timeout_s: how long rows are somebody's without a word of them.

    Raises:
        ConfigurationError: a setting that cannot be.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reward: RewardFn | None = None,
        *,
        workflow: Workflow | str = Workflow.ASYNC,
        max_staleness: int = 1,
        steps: StepSettings | None = None,
        rollout: RolloutSettings | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        lease_timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        if workflow not in list(Workflow):
            raise ConfigurationError(f"workflow={workflow!r}; use one of {', '.join(Workflow)}")
        if max_staleness < 0:
            raise ConfigurationError(f"weights.max_staleness={max_staleness}; use 0 or more")
        self.steps = steps or StepSettings()
        self.rollout = rollout or RolloutSettings()
        self.workflow = Workflow(workflow)
        self.max_staleness = max_staleness
        self._tokenizer = tokenizer
        self._reward = reward
        self._seed = seed
        self._log_dir = None if log_dir is None else Path(log_dir)
        self._lease_timeout_s = lease_timeout_s
        self._backlog = Backlog()
        self._weights: Mapping[str, Tensor] = {}
        self._has_warned = False

    @property
    def session(self) -> LeadSession:
        """Queue, publisher and workers.

        Raises:
            ConfigurationError: there are none yet.
        """
        session = self._open()
        assert isinstance(session, LeadSession)
        return session

    def init_engines(
        self,
        weights: Mapping[str, Tensor],
        score: Callable[[Tensor], Tensor],
        rollout_engine: Callable[[], RolloutEngine] | None,
        *,
        version: int = 0,
        probe: Sequence[int] | Tensor = (0, 1),
        reference: TrainerEngine | None = None,
        has_critic: bool = False,
    ) -> ServiceAddress:
        """Begin: publish the weights, and start workers that generate with them.

        Args:
            weights: by name, as engines load them: the live ones. :meth:`weight_sync_notify` publishes them again.
            score: log-probs ``[L - 1]`` of tokens ``[L]`` but the first, under the live weights at temperature 1.
            rollout_engine: makes a worker's engine, in its process; ``None`` if others take the task ``"rollout"``.
            version: of the weights.
            probe: 2 to 256 tokens whose log-probs prove that an engine has new weights; better the more differ.
            reference: a policy whose log-probs workers write under ``ref_logprobs``.
            has_critic: whether rows get ``values``, which somebody writes for the task ``"critic"``.

        Returns:
            How other processes reach the service.

        Raises:
            ConfigurationError: it has been called before, or a probe that is none.
        """
        if self._session is not None:
            raise ConfigurationError("the service has its engines; call init_engines() once")
        num_reward_workers = self.rollout.reward_workers
        if num_reward_workers is None or self._reward is None:
            num_reward_workers = int(self._reward is not None)
        stages = Stages(
            has_reward=self._reward is None or num_reward_workers > 0,
            has_reference=reference is not None,
            has_critic=has_critic,
        )
        self._weights, self._version = weights, version
        session = LeadSession(
            self.steps,
            self.workflow,
            self.max_staleness,
            stages=stages,
            policy=Policy(
                weights=weights,
                version=version,
                score=score,
                probe=torch.as_tensor(probe, dtype=torch.int64),
                reference=reference,
            ),
            rollouts=Rollouts(
                settings=self.rollout,
                make_engine=rollout_engine,
                reward=self._reward,
                num_reward_workers=num_reward_workers,
                decode=text_of(self._tokenizer),
            ),
            prompts=Prompts(
                open_at=lambda _: self._backlog.take, encode=self._tokenizer.encode, first_group=0, seed=self._seed
            ),
            log_dir=self._log_dir,
            lease_timeout_s=self._lease_timeout_s,
        )
        self._session = session
        return self.address

    @property
    def address(self) -> ServiceAddress:
        """How other processes reach the service.

        Raises:
            ConfigurationError: it has no engines yet.
        """
        session = self.session
        return ServiceAddress(
            session.address, session.publisher.address, self.steps, session.stages, version=self._version
        )

    def put_prompts_data(self, prompts: Iterable[Any], *, is_last: bool = False) -> int:
        """Give prompts. They begin, ``group_size`` completions each, as the staleness bound has room for them.

        Args:
            prompts: problems, mappings with ``prompt``, or texts.
            is_last: no more will come: the last step may be smaller.

        Returns:
            Prompts that have not begun yet.

        Raises:
            SchemaMismatchError: an item without a prompt.
            QueueClosedError: the last prompts have come already.
        """
        self._backlog.put([as_problem(item) for item in prompts])
        if is_last:
            self._backlog.close()
        return len(self._backlog)

    def weight_sync_notify(self, *, waits: bool = True) -> int:
        """The weights have been updated: publish them, and let the next step begin.

        Args:
            waits: return when they are copied. If not, the caller makes sure that they stay as they are until
                ``session.before_update()`` has returned.

        Returns:
            Their version.

        Raises:
            ConfigurationError: the step has rows that nobody has taken.
        """
        session = self.session
        for task in session.stages.trained:
            if not session.is_step_over(task, self._version):
                raise ConfigurationError(
                    f"the step that starts from version {self._version} has more rows for task {task!r}; call "
                    "get_experience_data until it returns None, then weight_sync_notify"
                )
        self._version += 1
        session.step_done(self._weights, self._version)
        if waits:
            session.before_update()
        return self._version

    def _check_prompts(self, waited_s: float) -> None:
        if self._has_warned or waited_s < _LONG_S or len(self._backlog):
            return
        view = self.session.view()
        if view.room and view.num_open < self.steps.prompts:
            self._has_warned = True
            warnings.warn(
                f"a step of {self.steps.prompts} prompts waits, and there are {view.num_open}; put_prompts_data(...) "
                "gives more, and put_prompts_data([], is_last=True) says that there are none",
                stacklevel=4,
            )

    def close(self) -> None:
        """End workers and queue."""
        self._backlog.discard()
        super().close()
