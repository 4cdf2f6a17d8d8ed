"""One ``fit`` of one rank: what is published where in the loop, and how a replacement comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure
from torch.distributed.distributed_c10d import Backend
from torch.nn.parallel import DistributedDataParallel

from lightning_flashrl.recovery.slot import Region
from lightning_flashrl.strategies.bucket_layout import adopt_layout, read_layout
from lightning_flashrl.strategies.epoch_loop import FlashTrainingEpochLoop
from lightning_flashrl.strategies.local_state import LocalState
from lightning_flashrl.strategies.logger_state import capture_loggers, restore_loggers
from lightning_flashrl.strategies.position import DataPosition
from lightning_flashrl.strategies.runtime import Published, RecoveryRuntime
from lightning_flashrl.strategies.transfer import load_optimizer_tree, optimizer_tree, receive_state
from lightning_flashrl.types import Phase, ResumeKind

_LAYOUT_IS_SETTLED = 3
"""Updates after which DDP's buckets have been rebuilt if they ever are."""


class FitSession:
    """Ties the loops of one trainer to the recovery runtime.

    Args:
        trainer: whose ``fit`` this is.
        runtime: of this process.
    """

    def __init__(self, trainer: Trainer, runtime: RecoveryRuntime) -> None:
        self.trainer = trainer
        self.runtime = runtime
        self.position = DataPosition(runtime.device)
        self.closure: Closure | None = None
        self.is_entering_after_commit = False
        self._state: LocalState | None = None
        self._publish_next = False
        self._entered: Published | None = None
        self._restore_hooks: Callable[[], None] | None = None
        self._layout, self._ready_order = "", ""
        runtime.replicated = self._replicated

    # ------------------------------------------------------------------ what travels from a donor
    def _replicated(self) -> tuple[list[torch.Tensor], Any]:
        trainer = self.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        tree = {
            "optimizers": optimizer_tree(trainer.optimizers),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        return list(trainer.lightning_module.parameters()), tree

    def _receive(self, native: Backend, donor: int) -> int:
        trainer = self.trainer
        parameters = list(trainer.lightning_module.parameters())
        version, tree = receive_state(native, donor, parameters, self.runtime.device)
        load_optimizer_tree(trainer.optimizers, tree["optimizers"])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and tree["scaler"]:
            scaler.load_state_dict(tree["scaler"])
        return version

    def note_layout(self) -> None:
        """After a forward pass: learn the gradient buckets, which DDP settles in its second one."""
        model = self.trainer.strategy.model
        if not self._layout and self.runtime.version <= _LAYOUT_IS_SETTLED and isinstance(model, DistributedDataParallel):
            self._layout, self._ready_order = read_layout(model)

    # ------------------------------------------------------------------ the epoch loop's questions
    def begin_epoch(self, loop: FlashTrainingEpochLoop, fetcher: _DataFetcher) -> ResumeKind | None:
        """Called when an epoch begins. Returns where in it to enter, or ``None`` to begin at its beginning."""
        if self._state is None:
            self._state = LocalState(self.trainer, self.position)
        if not self.runtime.must_enter:
            return None
        published = self.runtime.enter(self._receive)
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            self._layout, self._ready_order = published.facts["layout"]
            adopt_layout(model, self._layout, self._ready_order)
        fetcher._start_profiler = loop._on_before_fetch
        fetcher._stop_profiler = loop._on_after_fetch
        self._restore(published, fetcher)
        return published.point.kind

    def _restore(self, published: Published, fetcher: _DataFetcher) -> None:
        assert self._state is not None
        restore_loggers(self.trainer, published.facts.get("loggers", []))
        self.runtime.remove_later_files()
        self._state.restore(published.schema, published.content)
        if published.point.kind is not ResumeKind.COMMIT:
            self.position.seek(fetcher, self.position.consumed)
            self._state.restore(published.schema, published.content)  # `seek` moved the random states
            return
        # The committed batch is taken from the loader once more, for the hooks that get it. What `advance` does before
        # the batch's update is undone by restoring the state a second time.
        self.position.seek(fetcher, self.position.consumed - 1)
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        progress.current.ready -= 1
        progress.total.ready -= 1
        self._entered, self.is_entering_after_commit = published, True
        self._suppress_batch_start()

    def _suppress_batch_start(self) -> None:
        """Hooks of ``on_train_batch_start`` were called by the predecessor; their effects are in the state."""
        trainer, module = self.trainer, self.trainer.lightning_module
        callbacks = trainer.callbacks
        trainer.callbacks = []
        module.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]

        def restore() -> None:
            trainer.callbacks = callbacks
            del module.on_train_batch_start

        self._restore_hooks = restore

    def end_entry_after_commit(self) -> dict[str, Any]:
        """The batch is fetched again: take over the state at its commit, return its outputs."""
        assert self._state is not None
        assert self._entered is not None
        assert self._restore_hooks is not None
        self._restore_hooks()
        outputs = self._state.restore(self._entered.schema, self._entered.content)
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        progress.increment_completed()
        self._entered, self.is_entering_after_commit = None, False
        return dict(outputs or {})

    def publish_at_next_batch(self) -> None:
        """Something long or with effects elsewhere happened: let a replacement enter after it."""
        self._publish_next = True

    def begin_batch(self, loop: FlashTrainingEpochLoop) -> None:
        """Called before a batch is fetched."""
        self.runtime.enter_phase(Phase.BATCH_START)
        if self._publish_next and self._has_no_partial_gradients(loop):
            self._publish_next = False
            self._publish(ResumeKind.BATCH_START, loop.batch_progress.total.ready)
        self.position.consumed += 1

    def _has_no_partial_gradients(self, loop: FlashTrainingEpochLoop) -> bool:
        return loop.batch_progress.current.ready % self.trainer.accumulate_grad_batches == 0

    def end_batch(self, loop: FlashTrainingEpochLoop, fetcher: _DataFetcher) -> None:
        """Called when a batch is done, before validation and epoch-end hooks."""
        self.runtime.enter_phase(Phase.BATCH_END)
        long_ahead = loop._should_check_val_fx(fetcher) or loop._num_ready_batches_reached() or loop.done
        if long_ahead and not loop._should_accumulate():
            self._publish(ResumeKind.BATCH_END, loop.batch_progress.total.ready)
        if long_ahead:
            self._publish_next = True

    def _publish(self, kind: ResumeKind, batch: int, outputs: Any = None, version: int | None = None) -> None:
        assert self._state is not None
        runtime = self.runtime
        facts = {"loggers": capture_loggers(self.trainer), "layout": (self._layout, self._ready_order)}
        runtime.publish(kind, batch, runtime.version if version is None else version, self._state.capture(outputs), facts)

    # ------------------------------------------------------------------ the strategy's questions
    def commit(self) -> None:
        """Gradients are complete and clipped: publish, then wait until all ranks have done so."""
        self.note_layout()
        outputs = None
        if self.closure is not None and self.closure._result is not None:
            outputs = self.closure._result.asdict()
        version = self.runtime.version + 1
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._publish(ResumeKind.COMMIT, batch, outputs, version)
        self.runtime.slot.clear(Region.FILES)
        self.runtime.await_commit(version)
        self.runtime.enter_phase(Phase.OPTIMIZER_STEP)

    def committed(self) -> None:
        """The optimizer has stepped."""
        self.runtime.committed(self.runtime.version + 1)
