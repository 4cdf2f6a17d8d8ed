"""One ``fit`` of one rank: what is published where in the loop, and how a replacement comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure
from torch.nn.parallel import DistributedDataParallel

from lightning_flashrl.errors import SnapshotTooLargeError
from lightning_flashrl.strategies.bucket_layout import LayoutReader
from lightning_flashrl.strategies.epoch_loop import FlashTrainingEpochLoop
from lightning_flashrl.strategies.local_state import LocalState
from lightning_flashrl.strategies.logger_state import capture_loggers, restore_loggers
from lightning_flashrl.strategies.position import DataPosition
from lightning_flashrl.strategies.runtime import Published, RecoveryRuntime
from lightning_flashrl.strategies.transfer import Arrival, copy_tree, load_optimizer_tree, optimizer_tree
from lightning_flashrl.types import Phase, ResumeKind


@dataclass(frozen=True, slots=True)
class StateCopy:
    """Replicated state: live tensors, or copies of them."""

    parameters: list[torch.Tensor]
    tree: Any

    def clone(self, reuse: StateCopy | None = None) -> StateCopy:
        """Copy every tensor, into the memory of an earlier copy where that fits."""
        old = reuse.parameters if reuse is not None else []
        with torch.no_grad():
            copies = [
                old[i].copy_(p) if i < len(old) and old[i].shape == p.shape else p.detach().clone()
                for i, p in enumerate(self.parameters)
            ]
        return StateCopy(copies, copy_tree(self.tree))


class FitSession:
    """Ties the loops of one trainer to the recovery runtime.

    Args:
        trainer: whose ``fit`` this is.
        runtime: of this process.
    """

    def __init__(self, trainer: Trainer, runtime: RecoveryRuntime) -> None:
        self.trainer = trainer
        self.runtime = runtime
        self._module = trainer.lightning_module
        self.position = DataPosition(runtime.device)
        self.closure: Closure | None = None
        self.reduced: frozenset[int] | None = None
        """Set by the strategy: parameters whose gradients DDP reduces, by ``id``."""
        self.is_entering_after_commit = False
        self._state: LocalState | None = None
        self._publish_next = False
        self._entered: Published | None = None
        self._restore_hooks: Callable[[], None] | None = None
        self._is_inside_batch = False
        self._layout: LayoutReader | None = None
        self.resumes_at_batch = False
        """Updates happen inside the user's step: a replacement enters at the batch's start, from a copy kept there."""
        self._batch_copy: StateCopy | None = None
        self._validation_copy: StateCopy | None = None
        self._validation_writes: bool | None = None
        self._first_version = runtime.version
        """Updates before this fit (of an earlier fit of the same program)."""
        runtime.replicated = self._replicated
        runtime.count_updates = self._count_updates

    def _count_updates(self) -> int:
        """``trainer.global_step``, which is asked for at every phase of a step, without its detours."""
        loop = self.trainer.fit_loop.epoch_loop
        if self._module.automatic_optimization:
            return loop.automatic_optimization.optim_progress.optimizer.step.total.completed
        return loop.manual_optimization.optim_step_progress.total.completed

    # ------------------------------------------------------------------ what travels from a donor
    def _live(self) -> StateCopy:
        trainer = self.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        tree = {
            "optimizers": optimizer_tree(trainer.optimizers, trainer.lightning_module),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        return StateCopy(list(trainer.lightning_module.parameters()), tree)

    def _replicated(self) -> tuple[list[torch.Tensor], Any]:
        """What a donor gives, as of its last resume point."""
        state = self._live()
        if self._validation_copy is not None:
            state = StateCopy(self._validation_copy.parameters, state.tree)
        elif self.resumes_at_batch and self._is_inside_batch and self._batch_copy is not None:
            state = self._batch_copy
        return state.parameters, state.tree

    def _receive(self, arrival: Arrival) -> None:
        trainer = self.trainer
        tree = arrival.finish(list(trainer.lightning_module.parameters()))
        load_optimizer_tree(trainer.optimizers, tree["optimizers"], trainer.lightning_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and tree["scaler"]:
            scaler.load_state_dict(tree["scaler"])

    # ------------------------------------------------------------------ the epoch loop's questions
    def begin_epoch(
        self, loop: FlashTrainingEpochLoop, fetcher: _DataFetcher
    ) -> tuple[ResumeKind | None, _DataFetcher]:
        """Called when an epoch begins.

        Returns:
            where in it to enter, or ``None`` to begin at its beginning; where its batches come from.
        """
        if self._state is None:
            self._state = LocalState(self.trainer, self.position, self.reduced)
            updates_inside = any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in self.trainer.optimizers)
            self.resumes_at_batch = updates_inside or not self.trainer.lightning_module.automatic_optimization
            self.runtime.updates_inside_batch = self.resumes_at_batch
            model = self.trainer.strategy.model
            self._layout = LayoutReader(model) if isinstance(model, DistributedDataParallel) else None
        if not self.runtime.must_enter:
            return None, fetcher
        published = self.runtime.enter(self._receive)
        self._first_version = published.facts["first_version"]
        if self._layout is not None:
            self._layout.adopt(published.facts["layout"])
        fetcher = self._restore(published)
        fetcher._start_profiler = loop._on_before_fetch
        fetcher._stop_profiler = loop._on_after_fetch
        if published.point.kind is ResumeKind.BATCH_START:
            self.position.note_fetch()
            if self.resumes_at_batch:
                self._copy_batch_start()
        elif published.point.kind is ResumeKind.BATCH_END:
            self.begin_validation(loop._should_check_val_fx(fetcher))
        self._publish_next = published.point.kind is ResumeKind.BATCH_END
        return published.point.kind, fetcher

    def _restore(self, published: Published) -> _DataFetcher:
        assert self._state is not None
        restore_loggers(self.trainer, published.facts.get("loggers", []))
        self.runtime.remove_later_files(published.ordinal)
        self._restore_loaders(published)
        fetcher = self.trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if published.point.kind is not ResumeKind.COMMIT:
            self.position.seek(fetcher, self.position.consumed)
            self._state.restore(published.schema, published.content, published.bulk)  # `seek` moved the random states
            return fetcher
        # The committed batch is taken from the loader once more, for the hooks that get it. What `advance` does before
        # the batch's update is undone by restoring the state a second time.
        self.position.seek(fetcher, self.position.consumed - 1)
        self.position.recall_fetch()
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        progress.current.ready -= 1
        progress.total.ready -= 1
        self._entered, self.is_entering_after_commit = published, True
        self._suppress_batch_start()
        return fetcher

    def _restore_loaders(self, published: Published) -> None:
        """Restore the state, and make those loaders that the set-up of this process did not make, or made otherwise."""
        assert self._state is not None
        fit_loop: Any = self.trainer.fit_loop
        val_loop = fit_loop.epoch_loop.val_loop
        made = fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch
        self._state.restore(published.schema, published.content, published.bulk)
        wanted = fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch
        reloads = self.trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
        lacks_validation = published.facts["has_validation_loaders"] and self.trainer.val_dataloaders is None
        if reloads and wanted[0] != made[0]:
            fit_loop.setup_data_alone(wanted[0])
        if lacks_validation or (reloads and wanted[1] != made[1]):
            val_loop.setup_data_alone(wanted[1])
        if lacks_validation or (reloads and wanted != made):
            self._state.restore(published.schema, published.content, published.bulk)

    def _suppress_batch_start(self) -> None:
        """Hooks of ``on_train_batch_start`` were called by the predecessor; their effects are in the state."""
        trainer, module = self.trainer, self.trainer.lightning_module
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = []  # type: ignore[attr-defined]
        module.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]

        def restore() -> None:
            trainer.callbacks = callbacks  # type: ignore[attr-defined]
            del module.on_train_batch_start

        self._restore_hooks = restore

    def end_entry_after_commit(self) -> dict[str, Any]:
        """The batch is fetched again: take over the state at its commit, return its outputs."""
        assert self._state is not None
        assert self._entered is not None
        assert self._restore_hooks is not None
        self._restore_hooks()
        outputs = self._state.restore(self._entered.schema, self._entered.content, self._entered.bulk)
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        progress.increment_completed()
        self._entered, self.is_entering_after_commit = None, False
        return dict(outputs or {})

    def publish_at_next_batch(self) -> None:
        """Something long or with effects elsewhere happened: let a replacement enter after it."""
        self._publish_next = True

    def begin_batch(self, loop: FlashTrainingEpochLoop) -> None:
        """Called before a batch is fetched."""
        runtime = self.runtime
        runtime.enter_phase(Phase.BATCH_START)
        self._end_validation()
        batch = loop.batch_progress.total.ready
        if self.resumes_at_batch:
            if self._has_no_partial_gradients(loop):
                self._keep_batch_start(batch)
        elif self._publish_next and self._has_no_partial_gradients(loop):
            self._publish_next = False
            self._publish(ResumeKind.BATCH_START, batch)
        self.position.note_fetch()

    def _keep_batch_start(self, batch: int) -> None:
        """All ranks publish, then each keeps a copy of what this batch may update."""
        version = self._first_version + 2 * batch + 1
        self._publish(ResumeKind.BATCH_START, batch, version=version)
        self.runtime.forget_files()
        self.runtime.await_commit(version)
        self._copy_batch_start()
        self.runtime.committed(version)

    def _copy_batch_start(self) -> None:
        self._batch_copy = self._live().clone(reuse=self._batch_copy)
        self._is_inside_batch = True

    def _has_no_partial_gradients(self, loop: FlashTrainingEpochLoop) -> bool:
        return loop.batch_progress.current.ready % self.trainer.accumulate_grad_batches == 0

    def end_batch(self, loop: FlashTrainingEpochLoop, fetcher: _DataFetcher) -> None:
        """Called when a batch is done, before validation and epoch-end hooks."""
        runtime = self.runtime
        runtime.enter_phase(Phase.BATCH_END)
        will_validate = loop._should_check_val_fx(fetcher)
        if not (will_validate or loop._num_ready_batches_reached() or loop.done):
            return
        self._publish_next = True
        assert self._state is not None
        self._state.check_structure()
        if loop._should_accumulate():
            return
        batch = loop.batch_progress.total.ready
        if self.resumes_at_batch:
            # A rank that is lost in what follows its last collective does the batch again, from the others' copies.
            version = self._first_version + 2 * batch
            self._publish(ResumeKind.BATCH_END, batch, version=version)
            runtime.await_commit(version)
            self._is_inside_batch = False
            runtime.committed(version)
        else:
            self._publish(ResumeKind.BATCH_END, batch)
        self.begin_validation(will_validate)

    # ------------------------------------------------------------------ weights that validation exchanges
    def begin_validation(self, will_validate: bool) -> None:
        """Keep the weights if a callback may exchange them during validation (averaged weights do)."""
        if will_validate and self._validation_writes is not False:
            parameters = [parameter.detach().clone() for parameter in self.trainer.lightning_module.parameters()]
            self._validation_copy = StateCopy(parameters, None)

    def note_validation_step(self) -> None:
        """A validation batch runs: has anybody exchanged the weights?"""
        if self._validation_writes is None and self._validation_copy is not None:
            live = self.trainer.lightning_module.parameters()
            pairs = zip(live, self._validation_copy.parameters, strict=True)
            self._validation_writes = not all(torch.equal(parameter, kept) for parameter, kept in pairs)
            if not self._validation_writes:
                self._validation_copy = None

    def _end_validation(self) -> None:
        self._validation_copy = None

    def _publish(self, kind: ResumeKind, batch: int, outputs: Any = None, version: int | None = None) -> None:
        assert self._state is not None
        runtime = self.runtime
        facts: dict[str, Any] = {"loggers": capture_loggers(self.trainer)}
        facts["layout"] = None if self._layout is None else self._layout.read()
        facts["first_version"] = self._first_version
        facts["has_validation_loaders"] = self.trainer.val_dataloaders is not None
        facts["trainer"] = getattr(self.trainer.strategy.launcher, "number", -1)
        known = runtime.version if version is None else version
        while True:
            try:
                runtime.publish(kind, batch, known, self._state.capture(outputs), facts)
            except SnapshotTooLargeError:
                if not self._state.shrink():
                    raise
            else:
                return

    # ------------------------------------------------------------------ the strategy's questions
    def commit(self) -> None:
        """Gradients are complete and clipped: publish, then wait until all ranks have done so."""
        if self.resumes_at_batch:
            return
        outputs = None
        if self.closure is not None and self.closure._result is not None:
            outputs = self.closure._result.asdict()
        version = self.runtime.version + 1
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._publish(ResumeKind.COMMIT, batch, outputs, version)
        self.runtime.forget_files()
        self.runtime.await_commit(version)
        self.runtime.enter_phase(Phase.OPTIMIZER_STEP)

    def committed(self) -> None:
        """The optimizer has stepped."""
        if self.resumes_at_batch:
            return
        self.runtime.committed(self.runtime.version + 1)
