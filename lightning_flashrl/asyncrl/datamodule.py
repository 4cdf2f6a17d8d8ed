"""Where rows come from: prompts, rollouts, and the loader that gives the training loop its steps."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_flashrl.asyncrl.host import HostAddress
from lightning_flashrl.asyncrl.host_process import HostHome, HostLeftError
from lightning_flashrl.asyncrl.prompts import PromptSource, Tokenizer, as_problem, text_of
from lightning_flashrl.asyncrl.recording import StepRecord
from lightning_flashrl.asyncrl.session import (
    EndedSession,
    LeadSession,
    Policy,
    Prompts,
    RankSession,
    ReplaySession,
    Rollouts,
    Session,
)
from lightning_flashrl.asyncrl.settings import RolloutSettings, StepSettings, Workflow
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.engines import RolloutEngine, Sampling, TrainerEngine
from lightning_flashrl.engines.rewards import RewardPool
from lightning_flashrl.errors import ConfigurationError, RewardError
from lightning_flashrl.tasks import CharacterTokenizer, Problem, Problems, ProceduralTask, RewardFn


class StepBatch:
    """What a training step gets: a promise of the rows that its session will hand out.

    Attributes:
        session: has them.
    """

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session

    @property
    def session(self) -> Session:
        """The run's session."""
        return self._session()


class _StepLoader:
    """One :class:`StepBatch` for each step of an epoch."""

    def __init__(self, data: StreamingDataModule) -> None:
        self._data = data
        self._step = 0

    def __len__(self) -> int:
        if self._data.steps_per_epoch is None:
            raise TypeError("nobody knows how many steps an epoch of this dataset has")
        return self._data.steps_per_epoch

    def __iter__(self) -> Iterator[StepBatch]:
        size = self._data.steps_per_epoch
        if size is not None and self._step >= size:  # an epoch that was not asked for its end
            self._step = 0
        while not self._data.is_over and (size is None or self._step < size):
            self._step += 1
            yield StepBatch(self._data.session)
        self._step = 0

    def state_dict(self) -> dict[str, int]:
        """Return how far the epoch has come."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self._step = state_dict["step"]


class StreamingDataModule(L.LightningDataModule):
    """Prompts, rollouts and the queue between them and the training loop, for :class:`AsyncRL`.

    An epoch is one pass over a dataset of prompts, or ``steps_per_epoch`` steps of a task that never ends.

    Args:
        task: makes problems and scores answers; or give ``prompts`` and ``reward``.
        prompts: a map-style or iterable dataset of problems, mappings with ``prompt``, or texts; ``None`` takes those
            of the task.
        validation: held-out problems, map-style; ``None`` takes 256 of the task.
        reward: a function of prompt, completion and row; ``None`` takes the task's.
        tokenizer: of the model; ``None`` takes one whose tokens are the characters of the task.
        workflow: how rollouts and training overlap.
        max_staleness: how many versions older than the trained policy a row may be; 0 for on-policy.
        steps: what a step is.
        rollout: who generates, and how.
        rollout_engine: makes a worker's engine, in the worker's process; ``None`` asks the trainer engine for one.
        steps_per_epoch: of a task that never ends; ``None`` for ``max_steps`` of the Trainer.
        seed: of the order of prompts and of the rollouts.
        log_dir: where rollout workers' output goes; ``None`` leaves it in the terminal.
        lease_timeout_s: how long rows are a worker's or rank's without a word of it.
        record: a folder in which each step's rows are written down, to be trained again bit for bit.
        replay: such a folder, of an earlier run: its steps are trained, without rollouts. Everything else must be as in
            that run: initial weights, algorithm, optimizer, number of ranks.

    Attributes:
        is_over: a step has found that there are no more prompts. All ranks find that in the same step.

    Raises:
        ConfigurationError: no prompts, reward or tokenizer, or a setting that cannot be.
    """

    def __init__(
        self,
        task: ProceduralTask | None = None,
        *,
        prompts: Any = None,
        validation: Any = None,
        reward: RewardFn | None = None,
        tokenizer: Tokenizer | None = None,
        workflow: Workflow | str = Workflow.ASYNC,
        max_staleness: int = 1,
        steps: StepSettings | None = None,
        rollout: RolloutSettings | None = None,
        rollout_engine: Callable[[], RolloutEngine] | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        lease_timeout_s: float = 600.0,
        record: str | Path | None = None,
        replay: str | Path | None = None,
    ) -> None:
        super().__init__()
        if record is not None and replay is not None:
            raise ConfigurationError(f"record={str(record)!r} and replay={str(replay)!r}; give one of the two")
        if workflow not in list(Workflow):
            raise ConfigurationError(f"workflow={workflow!r}; use one of {', '.join(Workflow)}")
        if max_staleness < 0:
            raise ConfigurationError(f"weights.max_staleness={max_staleness}; use 0 or more")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ConfigurationError(f"steps_per_epoch={steps_per_epoch}; use 1 or more")
        self.task = task
        self.workflow = Workflow(workflow)
        self.max_staleness = 0 if self.workflow.is_on_policy else max_staleness
        self.steps = steps or StepSettings()
        self.rollout = rollout or RolloutSettings()
        self.seed = seed
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.reward: RewardFn = _given(reward, None if task is None else task.reward, "reward")
        self.tokenizer: Any = _given(
            tokenizer, None if task is None else CharacterTokenizer(task.alphabet), "tokenizer"
        )
        self.decode: Any = text_of(self.tokenizer)
        self.source = PromptSource(_given(prompts, task, "prompts"), seed=seed)
        self.validation = validation
        if validation is None and task is not None:
            self.validation = Problems(task, 256, "validation")
        self._rollout_engine = rollout_engine
        num_reward_workers = self.rollout.reward_workers
        self._num_reward_workers = int(reward is not None) if num_reward_workers is None else num_reward_workers
        self._steps_per_epoch = steps_per_epoch
        self._lease_timeout_s = lease_timeout_s
        self._record = None if record is None else Path(record)
        self._replay = None if replay is None else Path(replay)
        self.is_over = False
        self._session: Session | None = None
        self._pool: RewardPool | None = None  # of validation
        self._first_group = 0
        self._under_way: bytes | None = None  # of the checkpoint that training goes on from

    # ------------------------------------------------------------------ loaders
    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch; ``None`` if nobody knows."""
        if self._steps_per_epoch is not None:
            return self._steps_per_epoch
        if self.source.pass_size is not None:
            return max(1, self.source.pass_size // self.steps.prompts)
        if self.source.is_endless and self.trainer is not None and self.trainer.max_steps > 0:
            return self.trainer.max_steps
        return None

    def train_dataloader(self) -> Iterable[StepBatch]:
        """Return one promise of rows for each step."""
        return _StepLoader(self)

    def val_dataloader(self) -> Any:
        """Return held-out problems, a list at a time."""
        if self.validation is None:
            return []
        return DataLoader(_AsProblems(self.validation), batch_size=128, collate_fn=list)

    # ------------------------------------------------------------------ the session
    def sampling(self, *, is_greedy: bool = False) -> Sampling:
        """Return how completions are drawn.

        Args:
            is_greedy: take the likeliest token instead.
        """
        settings = self.rollout
        sampling = settings.sampling(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        if not is_greedy:
            return sampling
        return Sampling(
            max_new_tokens=sampling.max_new_tokens,
            temperature=0.0,
            eos_token_id=sampling.eos_token_id,
            pad_token_id=sampling.pad_token_id,
        )

    def score(self, problems: Sequence[Problem], answers: Sequence[str | None]) -> list[float | RewardError]:
        """Score answers outside the stream, as in validation, where rewards are computed: here, or in workers.

        Args:
            problems: what was asked.
            answers: what was answered, ``None`` for nothing, which is worth 0.

        Returns:
            Each answer's reward, or why it has none.
        """
        told = [
            (problem.prompt, answer, {"answer": problem.answer, **problem.data})
            for problem, answer in zip(problems, answers, strict=True)
            if answer is not None
        ]
        rewards = iter(self._in_workers(told) if self._num_reward_workers else [self._reward_of(*one) for one in told])
        return [0.0 if answer is None else next(rewards) for answer in answers]

    def _reward_of(self, prompt: str, completion: str, row: dict[str, Any]) -> float | RewardError:
        try:
            reward = float(self.reward(prompt, completion, row))
        except Exception as error:  # noqa: BLE001 - the user's own function: it costs its row
            return RewardError("raised", row, f"{type(error).__name__}: {error}")
        return reward if math.isfinite(reward) else RewardError("no number", row, f"it is {reward}")

    def _in_workers(self, told: Sequence[tuple[str, str, dict[str, Any]]]) -> list[float | RewardError]:
        if self._pool is None:
            timeout_s = self.rollout.reward_timeout_s
            self._pool = RewardPool(self.reward, num_workers=self._num_reward_workers, timeout_s=timeout_s)
        futures = [self._pool.submit(*one) for one in told]
        rewards: list[float | RewardError] = []
        for future in futures:
            try:
                rewards.append(future.result())
            except RewardError as error:
                rewards.append(error)
        return rewards

    def stages(self, *, has_reference: bool, has_critic: bool) -> Stages:
        """Return the tasks of a run.

        Args:
            has_reference: whether rows need log-probs of a reference policy.
            has_critic: whether rows need values.
        """
        has_reward = self._num_reward_workers > 0
        return Stages(has_reward=has_reward, has_reference=has_reference, has_critic=has_critic)

    def host(
        self,
        engine: TrainerEngine,
        version: int,
        stages: Stages,
        reference: TrainerEngine | None,
        *,
        limit: int | None,
        filters_uninformative: bool,
        home: HostHome | None,
    ) -> LeadSession:
        """Begin the session on rank 0.

        Args:
            engine: the trainer engine.
            version: of its weights.
            stages: the run's tasks.
            reference: the reference policy, for runs that have one.
            limit: prompt groups to be trained in all; ``None`` for no limit.
            filters_uninformative: whether groups with equal rewards are replaced.
            home: of a host in a process of its own, for ranks that may die and have successors.
        """
        make_engine = self._rollout_engine or engine.rollout_factory(
            self.sampling(), num_slots=self.rollout.num_slots, max_length=self.rollout.max_length
        )
        problems = self.source.starting_at(self._first_group)
        first = next(problems, None)
        problems = itertools.chain([] if first is None else [first], problems)

        def open_at(group: int) -> Callable[[int], list[Problem]]:
            opened = problems if group == self._first_group else self.source.starting_at(group)
            return lambda count: list(itertools.islice(opened, count))

        session = LeadSession(
            self.steps,
            self.workflow,
            self.max_staleness,
            stages=stages,
            policy=Policy(
                weights=engine.weights(),
                version=version,
                score=engine.score,
                probe=_probe(self.tokenizer.encode, first),
                reference=reference,
            ),
            rollouts=Rollouts(
                settings=self.rollout,
                make_engine=make_engine,
                reward=self.reward,
                num_reward_workers=self._num_reward_workers,
                decode=self.decode,
            ),
            prompts=Prompts(
                open_at=open_at, encode=self.tokenizer.encode, first_group=self._first_group, seed=self.seed
            ),
            limit=limit,
            filters_uninformative=filters_uninformative,
            home=home,
            log_dir=self.log_dir,
            lease_timeout_s=self._lease_timeout_s,
            record=self._step_record(),
            snapshot=self._under_way,
        )
        self._session, self._under_way = session, None
        self.is_over = False
        return session

    def join(self, address: HostAddress, replica_rank: int, stages: Stages, home: HostHome | None) -> None:
        """Join the session on another rank; see :meth:`host`."""
        try:
            self._session = RankSession(address, self.steps, replica_rank, stages, self._step_record(), home)
        except HostLeftError:
            self._session = EndedSession(stages)
        self.is_over = False

    def _step_record(self) -> StepRecord | None:
        if self._record is None or self.trainer is None:
            return None
        record = StepRecord(self._record, self.trainer.global_rank, self.trainer.world_size)
        record.begin()
        return record

    @property
    def is_replay(self) -> bool:
        """Whether an earlier run's steps are trained."""
        return self._replay is not None

    def open_replay(self, stages: Stages) -> None:
        """Begin to train an earlier run's steps.

        Raises:
            ConfigurationError: there is no record of such a run.
        """
        assert self._replay is not None
        assert self.trainer is not None
        record = StepRecord(self._replay, self.trainer.global_rank, self.trainer.world_size)
        self._session = ReplaySession(record, stages)
        self.is_over = False

    def session(self) -> Session:
        """Return the run's session.

        Raises:
            ConfigurationError: there is none.
        """
        if self._session is None:
            raise ConfigurationError("StreamingDataModule has no session; train an AsyncRL module with it")
        return self._session

    def scale(self, role: str, num_workers: int) -> None:
        """Add or remove workers while the run goes on; on rank 0.

        Args:
            role: ``"rollout"``, ``"reward"`` or ``"reference"``.
            num_workers: how many there shall be. With 0 the run waits, until there are some again.

        Raises:
            ConfigurationError: there is no session here, the run has no such role, or a number below 0.
        """
        session = self.session()
        if not isinstance(session, LeadSession):
            raise ConfigurationError("workers are added and removed by rank 0; call scale() there, or `flashrl scale`")
        session.scale(role, num_workers)

    @property
    def current_session(self) -> Session | None:
        """The run's session, if there is one."""
        return self._session

    def close_session(self) -> None:
        """End rollouts and let go of the queue."""
        session, self._session = self._session, None
        if session is not None:
            if isinstance(session, LeadSession):
                self._first_group += session.view().num_finished_groups
            session.close()

    # ------------------------------------------------------------------ Lightning's hooks
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Neither promises of rows nor problems live on a device."""
        return batch

    def teardown(self, stage: str) -> None:
        """End what is still running."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """End what is still running."""
        with contextlib.suppress(Exception):
            self._close()

    def _close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        self.close_session()

    def state_dict(self) -> dict[str, Any]:
        """Return how far the prompts were gone through, and what is under way: prompts, rows, who is done with them."""
        if not isinstance(self._session, LeadSession):
            return {"first_group": self._first_group}
        finished = self._session.view().num_finished_groups
        under_way = torch.frombuffer(bytearray(self._session.snapshot()), dtype=torch.uint8)
        return {"first_group": self._first_group + finished, "under_way": under_way}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._first_group = state_dict["first_group"]
        under_way = state_dict.get("under_way")
        self._under_way = None if under_way is None else under_way.numpy().tobytes()


def _probe(encode: Callable[[str], Sequence[int]], problem: Problem | None) -> Tensor:
    """Return tokens whose log-probs tell one set of weights from another."""
    tokens = [*encode(problem.prompt), *encode(problem.answer)] if problem is not None else []
    return torch.tensor(((tokens or [0]) * 2)[:256], dtype=torch.int64)


class _AsProblems(Dataset[Problem]):
    """A map-style dataset's items as problems."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Problem:
        return as_problem(self._dataset[index])


def _given(value: Any, otherwise: Any, name: str) -> Any:
    value = otherwise if value is None else value
    if value is None:
        raise ConfigurationError(f"StreamingDataModule has no {name}; give {name}=..., or a task")
    return value
