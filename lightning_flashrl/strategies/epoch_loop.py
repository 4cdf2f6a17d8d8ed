"""Lightning's training loops with doors: a replacement may enter at a resume point.

The only file that overrides Lightning's private loops; `tests/strategies/test_lightning_contract.py` fails when their
shape changes. A survivor runs through them as if nothing was overridden: it never unwinds.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lightning_flashrl.types import Phase, ResumeKind

if TYPE_CHECKING:
    from lightning_flashrl.strategies.session import FitSession


class FlashAutomaticOptimization(_AutomaticOptimization):
    """Runs a batch; for a replacement that enters after the batch was committed, only returns its outputs."""

    session: FitSession

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        """Compute and apply the batch's update, unless it is committed already."""
        if self.session.is_entering_after_commit:
            return self.session.end_entry_after_commit()
        return super().run(optimizer, batch_idx, kwargs)

    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> Closure:
        self.session.closure = super()._make_closure(kwargs, optimizer, batch_idx)
        return self.session.closure


class FlashTrainingEpochLoop(_TrainingEpochLoop):
    """An epoch that a replacement can enter in the middle."""

    session: FitSession

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Lightning's loop over batches, entered at its beginning or at a resume point."""
        session = self.session
        kind, data_fetcher = session.begin_epoch(self, data_fetcher)
        if kind is None:
            self.reset()
            self.on_run_start(data_fetcher)
            session.publish_at_next_batch()
        while kind is not None or not self.done:
            try:
                if kind is not ResumeKind.BATCH_END:
                    if kind is None:
                        session.begin_batch(self)
                    self.advance(data_fetcher)
                    session.end_batch(self, data_fetcher)
                kind = None
                self.on_advance_end(data_fetcher)
            except StopIteration:
                break
            finally:
                self.on_iteration_done()

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Remember the random states from which the epoch's iterator is made."""
        trainer = self.trainer
        if trainer.current_epoch > 0 and not trainer.fit_loop.is_resuming and not self.restarting:
            self.session.position.begin_iterator(
                trainer.fit_loop.epoch_progress.current.processed, data_fetcher.combined_loader.flattened
            )
        self.session.position.offset = self.batch_progress.current.ready
        super().on_run_start(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        connector = self.trainer._signal_connector
        if self.session.runtime.stop_version is not None:
            connector.received_sigterm = True
            raise SIGTERMException
        if getattr(connector, "has_noted_sigterm", False):
            self.session.runtime.request_stop()


class FlashEvaluationLoop(_EvaluationLoop):
    """A validation of which a replacement's workers can be given the state."""

    session: FitSession

    def setup_data(self) -> None:
        """Make the loaders, and follow what their workers do."""
        before = self._combined_loader
        if before is None or self._should_reload_val_dl:
            self.session.position.begin_loaders("validation")
        super().setup_data()
        if self._combined_loader is not None and self._combined_loader is not before:
            self.session.position.follow_validation(self._combined_loader.flattened)

    def setup_data_alone(self, epoch: float) -> None:
        """Make the loaders of ``epoch`` in a replacement; the others made theirs in training."""
        self._combined_loader = None
        self.session.position.recall_setup("validation")
        with _alone(self.trainer.strategy, self.trainer.fit_loop, epoch):
            self.setup_data()

    def reset(self) -> None:
        """Let workers catch up before the iterator is made."""
        epoch: int = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        self.session.position.begin_validation(epoch)
        super().reset()


class FlashFitLoop(_FitLoop):
    """A fit whose ranks leave together, so that the last of them can still be replaced."""

    session: FitSession

    def setup_data(self) -> None:
        """Make the loaders, if there are none or this epoch has its own."""
        if self._combined_loader is None or self._should_reload_train_dl:
            self.session.position.begin_loaders("train")
        super().setup_data()

    def setup_data_alone(self, epoch: float) -> None:
        """Make the loaders of ``epoch`` in a replacement; the others made theirs in training."""
        self._combined_loader = None
        self.session.position.recall_setup("train")
        with _alone(self.trainer.strategy, self, epoch):
            self.setup_data()

    def _load_combined_loader_states(self) -> None:
        super()._load_combined_loader_states()
        assert self._combined_loader is not None
        epoch = self.epoch_progress.current.processed  # type: ignore[attr-defined]
        self.session.position.begin_iterator(epoch, self._combined_loader.flattened)

    def on_advance_end(self) -> None:
        """The epoch's own hooks follow."""
        self.session.runtime.enter_phase(Phase.EPOCH_END)
        super().on_advance_end()

    def on_run_end(self) -> None:
        """Leave only when the fit of every rank is over."""
        self.session.runtime.enter_phase(Phase.FIT_END)
        super().on_run_end()
        self.session.runtime.finish_fit()


@contextlib.contextmanager
def _alone(strategy: Any, fit_loop: _FitLoop, epoch: float) -> Iterator[None]:
    """Within this context it is the beginning of ``epoch``, and collectives that the others passed are left out."""
    completed = fit_loop.epoch_progress.current.completed
    fit_loop.epoch_progress.current.completed = int(max(epoch, 0))
    strategy.barrier = lambda *_, **__: None
    strategy.reduce = lambda length, *_, **__: length  # asked whether some rank has samples
    try:
        yield
    finally:
        fit_loop.epoch_progress.current.completed = completed
        del strategy.barrier, strategy.reduce


def install_loops(session: FitSession, fit_loop: _FitLoop, module: LightningModule) -> None:
    """Let the trainer's own loop objects take the flash classes; what they hold stays."""
    fit_loop.__class__ = FlashFitLoop
    fit_loop.epoch_loop.__class__ = FlashTrainingEpochLoop
    fit_loop.epoch_loop.automatic_optimization.__class__ = FlashAutomaticOptimization
    fit_loop.epoch_loop.val_loop.__class__ = FlashEvaluationLoop
    epoch_loop = fit_loop.epoch_loop
    loops: tuple[Any, ...] = (fit_loop, epoch_loop, epoch_loop.automatic_optimization, epoch_loop.val_loop)
    for loop in loops:
        loop.session = session
