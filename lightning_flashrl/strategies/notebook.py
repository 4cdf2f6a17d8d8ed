"""``strategy="flash_ddp_notebook"``: ranks are forked from the running interpreter, and their fit comes back to it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from lightning_flashrl.errors import ConfigurationError, FatalError
from lightning_flashrl.recovery.slot import Heartbeat
from lightning_flashrl.strategies.ddp import FlashDDPStrategy
from lightning_flashrl.strategies.environment import FlashEnvironment, FlashLauncher
from lightning_flashrl.supervisor.forked import ForkedJob

_CHECKPOINT_FACTS = ("best_model_path", "best_model_score", "last_model_path")
_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


@dataclass(frozen=True, slots=True)
class FitOutcome:
    """What rank 0 hands to the interpreter when its part of ``fit``, ``validate`` or ``test`` is over.

    Attributes:
        results: what the Trainer's function returned.
        state: the Trainer's.
        weights: state of the LightningModule after a fit, else ``None``.
        metrics: those of the Trainer's logger connector, by attribute.
        loops: progress of the fit's loops.
        checkpoints: paths and scores of each checkpoint callback.
        versions: of each logger.
    """

    results: Any
    state: TrainerState
    weights: dict[str, Any] | None
    metrics: dict[str, dict[str, Any]]
    loops: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    versions: list[Any]

    @classmethod
    def of(cls, trainer: Trainer, results: Any) -> FitOutcome:
        """Collect it. All ranks must call this: metrics may exchange their states."""
        weights = trainer.lightning_module.state_dict()
        return cls(
            results=results,
            state=trainer.state,
            weights=weights if trainer.state.fn == TrainerFn.FITTING else None,
            metrics={name: dict(getattr(trainer._logger_connector, name)) for name in _METRICS},
            loops=trainer.fit_loop.state_dict(),
            checkpoints=[
                {name: getattr(callback, name) for name in _CHECKPOINT_FACTS if hasattr(callback, name)}
                for callback in trainer.checkpoint_callbacks
            ],
            versions=[getattr(logger, "_version", None) for logger in trainer.loggers],
        )

    def give_to(self, trainer: Trainer) -> None:
        """Let the interpreter's Trainer and its LightningModule look as if they had done the work."""
        if self.weights is not None:
            # not strict, because the model may have got or lost layers on its way
            trainer.lightning_module.load_state_dict(self.weights, strict=False)
            trainer.fit_loop.load_state_dict(self.loops)
            trainer.fit_loop.on_iteration_done()
        trainer.state = self.state
        for name, values in self.metrics.items():
            getattr(trainer._logger_connector, name).update(values)
        for callback, facts in zip(trainer.checkpoint_callbacks, self.checkpoints, strict=True):
            for name, value in facts.items():
                setattr(callback, name, value)
        for logger, version in zip(trainer.loggers, self.versions, strict=True):
            if version is not None:
                logger._version = version  # type: ignore[attr-defined]


class _MemoryFile:
    """A file without a name. What a process wrote stays when it dies; the next writer begins anew."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("flashrl-outcome")

    def __enter__(self) -> _MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def save(self, value: Any) -> None:
        with open(self._fd, "r+b", closefd=False) as file:
            file.truncate(0)
            file.seek(0)
            torch.save(value, file)

    def load(self) -> Any:
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            if os.fstat(self._fd).st_size == 0:
                raise FatalError("rank 0 left the program before its work was done, so there is no outcome")
            return torch.load(file, map_location="cpu", weights_only=False)


def _check_forkable() -> None:
    """Raise when a copy of this process could not become a rank."""
    for kind in ("cuda", "npu", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_initialized():
            raise ConfigurationError(
                f"strategy='flash_ddp_notebook' forks its ranks from this process, and {kind.upper()} is initialized "
                f"in it, which no fork survives; restart the kernel, then fit before anything is moved to a device and "
                f"before any function of torch.{kind} is called"
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ConfigurationError(
            "strategy='flash_ddp_notebook' forks its ranks from this process, and torch.distributed is initialized in "
            "it; call torch.distributed.destroy_process_group() first"
        )


def _without_predictions(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``predict`` would return rank 0's share for the whole."""
    names = list(inspect.signature(function).parameters)
    if "return_predictions" not in names:
        return args
    index = names.index("return_predictions")
    if args[index]:
        raise ConfigurationError(
            "predict(return_predictions=True) does not work with strategy='flash_ddp_notebook': each rank has only its "
            "share; write them with a BasePredictionWriter callback and pass return_predictions=False"
        )
    return (*args[:index], False, *args[index + 1 :])


class NotebookLauncher(FlashLauncher):
    """Forks a job from the running interpreter and waits for it; in a rank, runs the function.

    Args:
        strategy: whose launcher this is.
        log_dir: where the output of all ranks is kept.
    """

    def __init__(self, strategy: FlashDDPNotebookStrategy, log_dir: str | None) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.num_processes, strategy.num_nodes, [], strategy.cluster_environment)
        self._log_dir = log_dir
        self._job: ForkedJob | None = None
        self._has_fitted = False

    @property
    def is_interactive_compatible(self) -> bool:
        """The interpreter's objects are all that is needed."""
        return True

    @property
    def heartbeats(self) -> dict[int, Heartbeat]:
        """What the ranks do now."""
        job = self._job
        return {} if job is None else job.heartbeats()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run ``function`` in this rank, or in ranks forked from here; then take over what rank 0 has made of it."""
        if FlashEnvironment.detect():
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self._check(trainer)
        args = _without_predictions(function, args)
        with _MemoryFile() as file:

            def program() -> None:
                torch.set_num_threads(1)  # threads of a pool that this process had before the fork do not exist here
                if trainer is None:
                    outcome = self.launch(function, *args, **kwargs)
                else:
                    trainer.strategy.set_world_ranks()  # type: ignore[attr-defined]
                    results = _call_and_handle_interrupt(trainer, function, *args, **kwargs)
                    outcome = FitOutcome.of(trainer, results)
                if self._environment.global_rank() == 0:
                    file.save(outcome)

            self._job = ForkedJob(program, self._num_processes, self._log_dir)
            try:
                self._job.run()
            finally:
                self._job = None
            outcome = file.load()
        if trainer is None:
            return outcome
        self._has_fitted |= trainer.state.fn == TrainerFn.FITTING
        outcome.give_to(trainer)
        return outcome.results

    def _check(self, trainer: Trainer | None) -> None:
        if self._num_nodes > 1:
            raise ConfigurationError(
                f"Trainer(num_nodes={self._num_nodes}) does not work with strategy='flash_ddp_notebook': its ranks are "
                "forked from one interpreter; use strategy='flash_ddp' and start the program with flashrun on each node"
            )
        if self._num_processes < 2:
            raise ConfigurationError(
                "strategy='flash_ddp_notebook' needs at least two ranks, since a survivor gives its state to a "
                f"replacement; set Trainer(devices=2) or more, it is {self._num_processes}"
            )
        if self._has_fitted and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            raise ConfigurationError(
                "this Trainer has fitted before, and its optimizer states ended with its ranks; make a new Trainer and "
                "pass fit(ckpt_path=...) to go on from a checkpoint"
            )
        _check_forkable()

    def kill(self, signum: int) -> None:
        """Let the ranks get a signal."""
        job = self._job
        if job is not None:
            job.stop(signum)


class FlashDDPNotebookStrategy(FlashDDPStrategy):
    """:class:`FlashDDPStrategy` for Jupyter and IPython: ranks are forked from the running interpreter.

    The fit happens in the ranks, which see the interpreter's objects as they were when it began. At its end, also after
    faults, the interpreter gets rank 0's weights, metrics, Trainer state and progress, paths and scores of checkpoints
    and versions of loggers. What a callback or the module kept besides stays in the ranks, as with ``ddp_notebook``.
    What ranks print is shown as the output of the cell. Each computes with one thread.

    Args:
        log_dir: keep the output of all ranks there, and a line for each recovery in ``recovery.jsonl``.
        **kwargs: as for :class:`FlashDDPStrategy`.

    Raises:
        ConfigurationError: an argument is meant for programs that are started from a file.
    """

    def __init__(self, *, log_dir: str | None = None, **kwargs: Any) -> None:
        for name in ("standby", "launcher_options"):
            if name in kwargs:
                raise ConfigurationError(
                    f"{name}= is for strategy='flash_ddp', which starts a program from its file; leave it out here"
                )
        super().__init__(**kwargs)
        self._log_dir = log_dir

    def _configure_launcher(self) -> None:
        self._launcher = NotebookLauncher(self, self._log_dir)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save in a rank, or in the interpreter, where there is nothing to recover."""
        base = FlashDDPStrategy if self.runtime is not None else DDPStrategy
        base.save_checkpoint(self, checkpoint, filepath, storage_options=storage_options)

    def heartbeats(self) -> dict[int, Heartbeat]:
        """What each rank is doing now, by global rank: its process, step and phase. Empty when no fit runs.

        For another thread than the one that waits in ``fit``.
        """
        launcher = self.launcher
        return launcher.heartbeats if isinstance(launcher, NotebookLauncher) else {}

    def rank_pids(self) -> dict[int, int]:
        """The process number of each rank that lives now, by global rank. Empty when no fit runs.

        For another thread than the one that waits in ``fit``: ``os.kill(trainer.strategy.rank_pids()[1], SIGKILL)``.
        """
        return {rank: beat.pid for rank, beat in self.heartbeats().items() if beat.pid}
