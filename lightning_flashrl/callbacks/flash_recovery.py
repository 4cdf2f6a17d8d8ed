"""The user's say in recoveries: how many faults are borne, what happens when nothing is left, who is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies.ddp import FlashDDPStrategy
from lightning_flashrl.strategies.runtime import RecoveryRuntime
from lightning_flashrl.supervisor.protocol import QuorumChange, RecoveryRecord


class FlashRecovery(Callback):
    """Policy and reports of in-place recovery.

    ``strategy="flash_ddp"`` recovers with or without this callback; with it, one says how many faults are too many and
    hears of each recovery. Any callback of the Trainer may define

    - ``on_recovery_start(trainer, pl_module, change)``: called on a thread of its own while the program waits;
      ``change.lost`` tells who was lost and why;
    - ``on_recovery_end(trainer, pl_module, record)``: called by the program after its next batch; ``record`` is the
      recovery report (who, why, donor, milliseconds of each stage). Ranks hear of it at different batches, so it must
      not call collectives.

    Each report is also a line of ``recovery.jsonl`` in the Trainer's log directory and, as ``recovery/<stage>_ms``,
    goes to its loggers. A CSVLogger is left out: its columns stay those of a run without faults.

    Args:
        max_faults: end the job with :class:`~lightning_flashrl.errors.RecoveryBudgetExhaustedError` when more than this
            many ranks were lost within ``window_s``.
        window_s: seconds that ``max_faults`` looks back.
        fallback: ``"last"`` restarts the job from its newest checkpoint when no donor is left; ``None`` ends it with
            :class:`~lightning_flashrl.errors.NoDonorError`, which names that checkpoint.
        hang_timeout_s: seconds without progress after which a rank that waits for nobody is taken for hung; by default
            it follows from the measured step time.

    Raises:
        ConfigurationError: a value makes no sense, or the Trainer's strategy is not ``flash_ddp``.
    """

    def __init__(
        self,
        *,
        max_faults: int | None = None,
        window_s: float | None = None,
        fallback: str | None = None,
        hang_timeout_s: float | None = None,
    ) -> None:
        if max_faults is not None and max_faults < 0:
            raise ConfigurationError(
                f"FlashRecovery(max_faults={max_faults}) must not be negative; 0 bears no fault at all"
            )
        for name, value in (("window_s", window_s), ("hang_timeout_s", hang_timeout_s)):
            if value is not None and value <= 0:
                raise ConfigurationError(f"FlashRecovery({name}={value}) must be a positive number of seconds")
        if fallback not in (None, "last"):
            raise ConfigurationError(f"FlashRecovery(fallback={fallback!r}) is not known; use 'last' or None")
        self.max_faults = max_faults
        self.window_s = window_s
        self.fallback = fallback
        self.hang_timeout_s = hang_timeout_s
        self._directory = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the policy to the controller."""
        runtime = self._runtime(trainer)
        self._directory = Path(trainer.log_dir or trainer.default_root_dir)  # asks rank 0, so all ranks must
        runtime.client.set_policy(
            max_faults=self.max_faults,
            window_s=self.window_s,
            fallback=self.fallback,
            hang_timeout_s=self.hang_timeout_s,
        )
        runtime.on_recovery_start = lambda change: self._announce(trainer, change)

    @staticmethod
    def _runtime(trainer: Trainer) -> RecoveryRuntime:
        strategy = trainer.strategy
        if not isinstance(strategy, FlashDDPStrategy) or strategy.runtime is None:
            raise ConfigurationError(
                f"FlashRecovery needs Trainer(strategy='flash_ddp'), this Trainer has {type(strategy).__name__}"
            )
        return strategy.runtime

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the job bears."""
        ranks = trainer.world_size
        rank_zero_info(
            f"FlashRecovery: this job goes on after the loss of any {ranks - 1} of {ranks} ranks; "
            f"0 of {trainer.num_nodes} nodes"
        )

    @staticmethod
    def _announce(trainer: Trainer, change: QuorumChange) -> None:
        for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
            hook = getattr(callback, "on_recovery_start", None)
            if callable(hook):
                hook(trainer, trainer.lightning_module, change)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report recoveries that ended since the last batch."""
        self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what is left."""
        self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for record in self._runtime(trainer).take_records():
            for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
                hook = getattr(callback, "on_recovery_end", None)
                if callable(hook):
                    hook(trainer, pl_module, record)
            if trainer.is_global_zero:
                self._write(trainer, record)

    def _write(self, trainer: Trainer, record: RecoveryRecord) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "recovery.jsonl").open("a") as file:
            file.write(json.dumps(msgspec.to_builtins(msgspec.structs.asdict(record), str_keys=True)) + "\n")
        stages = {f"recovery/{stage}_ms": value for stage, value in record.timings_ms.items()}
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_metrics(stages, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
