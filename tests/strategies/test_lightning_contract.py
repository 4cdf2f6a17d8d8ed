"""What `strategies/` and `communicator/` take from the private parts of Lightning 2.6 and torch.

Lightning promises none of this. When a new version changes it, the test that fails says what depends on it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.loggers import csv_logs as fabric_csv
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.combined_loader import CombinedLoader, _MaxSizeCycle, _ModeIterator
from lightning.pytorch.utilities.data import has_len_all_ranks
from torch._C._distributed_c10d import Backend, HashStore, ProcessGroup, ProcessGroupGloo, Store, Work
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter, _SingleProcessDataLoaderIter
from torchmetrics import Metric

from lightning_flashrl.communicator.holding import HoldingProcessGroup, HoldingWork
from lightning_flashrl.recovery.random_states import capture_rng
from lightning_flashrl.strategies import local_state
from lightning_flashrl.strategies.ddp import FlashDDPStrategy
from lightning_flashrl.strategies.environment import FlashLauncher
from lightning_flashrl.strategies.epoch_loop import (
    FlashAutomaticOptimization,
    FlashEvaluationLoop,
    FlashFitLoop,
    FlashTrainingEpochLoop,
    install_loops,
)


def _body(function: Callable[..., Any]) -> str:
    """The function's statements, formatted alike whatever the source looks like; no docstring, no comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    statements = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    return "\n".join(ast.unparse(statement) for statement in statements)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _assert_order(function: Callable[..., Any], parts: list[str], why: str) -> None:
    """Each part stands in the function's source after the one before it."""
    body, position = _body(function), 0
    for part in parts:
        found = body.find(part, position)
        assert found >= 0, f"{function.__qualname__} has no {part!r} where it is expected. {why}\n{body}"
        position = found + len(part)


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


# ---------------------------------------------------------------------- names and parameters
@pytest.mark.parametrize(
    ("function", "parameters", "why"),
    [
        (_TrainingEpochLoop.run, ["self", "data_fetcher"], "FlashTrainingEpochLoop.run replaces it"),
        (_TrainingEpochLoop.on_run_start, ["self", "data_fetcher"], "FlashTrainingEpochLoop.on_run_start extends it"),
        (_TrainingEpochLoop.advance, ["self", "data_fetcher"], "FlashTrainingEpochLoop.run calls it"),
        (_TrainingEpochLoop.on_advance_end, ["self", "data_fetcher"], "FlashTrainingEpochLoop.run calls it"),
        (_TrainingEpochLoop.on_iteration_done, ["self"], "FlashTrainingEpochLoop.run calls it"),
        (_TrainingEpochLoop.reset, ["self"], "FlashTrainingEpochLoop.run calls it"),
        (_TrainingEpochLoop._broadcast_sigterm_tensor, ["self"], "FlashTrainingEpochLoop replaces the broadcast"),
        (_TrainingEpochLoop._should_check_val_fx, ["self", "data_fetcher"], "FitSession asks if validation follows"),
        (_TrainingEpochLoop._num_ready_batches_reached, ["self"], "FitSession asks if the epoch ends"),
        (_TrainingEpochLoop._should_accumulate, ["self"], "FitSession asks if gradients are partial"),
        (_TrainingEpochLoop._on_before_fetch, ["self"], "FitSession gives it to the fetcher, as on_run_start would"),
        (_TrainingEpochLoop._on_after_fetch, ["self"], "FitSession gives it to the fetcher, as on_run_start would"),
        (_FitLoop._load_combined_loader_states, ["self"], "FlashFitLoop notes there how the iterator is made"),
        (_FitLoop.on_advance_end, ["self"], "FlashFitLoop enters the phase EPOCH_END there"),
        (_FitLoop.on_run_end, ["self"], "FlashFitLoop lets all ranks leave together there"),
        (_AutomaticOptimization.run, ["self", "optimizer", "batch_idx", "kwargs"], "FlashAutomaticOptimization.run"),
        (
            _AutomaticOptimization._make_closure,
            ["self", "kwargs", "optimizer", "batch_idx"],
            "FlashAutomaticOptimization keeps the closure for its result",
        ),
        (ClosureResult.asdict, ["self"], "the outputs published at the commit"),
        (Precision._after_closure, ["self", "model", "optimizer"], "FlashDDPStrategy gates updates there"),
        (
            Strategy.optimizer_step,
            ["self", "optimizer", "closure", "model", "kwargs"],
            "FlashDDPStrategy counts updates",
        ),
        (DDPStrategy._setup_model, ["self", "model"], "FlashDDPStrategy wraps a newcomer's model without a broadcast"),
        (DDPStrategy._configure_launcher, ["self"], "FlashDDPStrategy sets its own launcher"),
        (DDPStrategy.setup_distributed, ["self"], "FlashDDPStrategy installs its own process group"),
        (DDPStrategy.determine_ddp_device_ids, ["self"], "FlashDDPStrategy._setup_model"),
        (DDPStrategy.set_world_ranks, ["self"], "FlashDDPStrategy.setup_distributed"),
        (DDPStrategy._get_process_group_backend, ["self"], "FlashDDPStrategy overrides it"),
        (_get_default_process_group_backend_for_device, ["device"], "FlashDDPStrategy._get_process_group_backend"),
        (_SignalConnector._sigterm_notifier_fn, ["self", "signum", "_"], "FlashLauncher replaces it"),
        (_Launcher.kill, ["self", "signum"], "FlashLauncher implements it"),
        (_Launcher.launch, ["self", "function", "args", "kwargs"], "FlashLauncher implements it"),
        (_set_sampler_epoch, ["dataloader", "epoch"], "DataPosition.seek"),
        (_ResultMetric.__init__, ["self", "metadata", "is_tensor"], "LocalState rebuilds logged values"),
        (_ResultCollection.__init__, ["self", "training"], "LocalState rebuilds logged values"),
        (_BaseDataLoaderIter._next_index, ["self"], "DataPosition steps over batches with it"),
        (dist.Backend.register_backend, ["name", "func", "extended_api", "devices"], "make_default"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else None,
)
def test_parameters(function: Callable[..., Any], parameters: list[str], why: str) -> None:
    assert _parameters(function) == parameters, why


@pytest.mark.parametrize(
    ("owner", "names", "why"),
    [
        (_TrainingEpochLoop, ["done", "global_step", "restarting"], "FlashTrainingEpochLoop.run, FitSession"),
        (_FitLoop, ["is_resuming"], "FlashTrainingEpochLoop.on_run_start"),
        (_Launcher, ["is_interactive_compatible"], "FlashLauncher"),
        (_DataFetcher, ["combined_loader"], "DataPosition.seek"),
        (CombinedLoader, ["flattened"], "DataPosition.seek"),
        (DDPStrategy, ["launcher", "is_global_zero", "root_device"], "FlashDDPStrategy"),
    ],
)
def test_properties(owner: type, names: list[str], why: str) -> None:
    for name in names:
        assert isinstance(inspect.getattr_static(owner, name), property), f"{owner.__name__}.{name}: {why}"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FlashTrainingEpochLoop, _TrainingEpochLoop),
        (FlashFitLoop, _FitLoop),
        (FlashAutomaticOptimization, _AutomaticOptimization),
        (FlashDDPStrategy, DDPStrategy),
        (FlashLauncher, _Launcher),
    ],
)
def test_every_private_override_overrides_something(ours: type, theirs: type) -> None:
    for name, function in vars(ours).items():
        if inspect.isfunction(function) and name.startswith("_") and not name.startswith("__"):
            is_used_by_ours = re.search(rf"self\.{name}\b", inspect.getsource(ours)) is not None
            assert hasattr(theirs, name) or is_used_by_ours, (
                f"{theirs.__name__} has no {name} that {ours.__name__} needs"
            )


def test_strategies_hooks_take_what_ours_pass_on() -> None:
    for name in ("training_step", "validation_step", "test_step"):
        assert _parameters(getattr(Strategy, name)) == ["self", "args", "kwargs"], f"FlashDDPStrategy.{name}"
    assert _parameters(Strategy.save_checkpoint) == _parameters(FlashDDPStrategy.save_checkpoint), "save_checkpoint"


# ---------------------------------------------------------------------- the loops, step by step
def test_the_epoch_loop_runs_as_the_one_that_replaces_it() -> None:
    assert _body(_TrainingEpochLoop.run) == textwrap.dedent("""\
        self.reset()
        self.on_run_start(data_fetcher)
        while not self.done:
            try:
                self.advance(data_fetcher)
                self.on_advance_end(data_fetcher)
            except StopIteration:
                break
            finally:
                self.on_iteration_done()"""), (
        "FlashTrainingEpochLoop.run must do the same for a rank that begins an epoch"
    )


def test_a_batch_takes_the_steps_that_a_newcomer_enters_between() -> None:
    _assert_order(
        _TrainingEpochLoop.advance,
        [
            "self.trainer.world_size > 1",
            "self._broadcast_sigterm_tensor()",
            "next(data_fetcher)",
            "self.batch_progress.is_last_batch = data_fetcher.done",
            "self.batch_progress.increment_ready()",
            "on_batch_start(batch)",
            "_call_callback_hooks(trainer, 'on_train_batch_start'",
            "_call_lightning_module_hook(trainer, 'on_train_batch_start'",
            "_call_strategy_hook(trainer, 'on_train_batch_start'",
            "self.batch_progress.increment_started()",
            "self.automatic_optimization.run(trainer.optimizers[0], batch_idx, kwargs)",
            "self.batch_progress.increment_processed()",
            "update_lr_schedulers('step', update_plateau_schedulers=False)",
            "_call_callback_hooks(trainer, 'on_train_batch_end', batch_output",
            "_call_lightning_module_hook(trainer, 'on_train_batch_end', batch_output",
            "self.batch_progress.increment_completed()",
            "update_train_step_metrics()",
        ],
        "A newcomer at BATCH_START enters before the batch is fetched; one at COMMIT runs `advance` again with the "
        "hooks on_train_batch_start silenced, and takes over the state inside `automatic_optimization.run`",
    )


def test_silenced_hooks_are_all_that_a_newcomer_at_a_commit_would_run_twice() -> None:
    body = _body(_TrainingEpochLoop.advance)
    between = body[body.index("next(data_fetcher)") : body.index("self.automatic_optimization.run(")]
    hooks = set(re.findall(r"_call_\w+_hooks?\(\w+(?:\.\w+)?, '(\w+)'", between))
    assert hooks == {"batch_to_device", "on_train_batch_start"}, (
        "FitSession._suppress_batch_start silences on_train_batch_start; another hook between fetching a batch and its "
        "update would run a second time in a newcomer"
    )


def test_the_iterator_of_an_epoch_is_made_under_the_condition_that_ours_repeats() -> None:
    _assert_order(
        _TrainingEpochLoop.on_run_start,
        [
            "if self.trainer.current_epoch > 0 and (not self.trainer.fit_loop.is_resuming) and (not self.restarting):",
            "iter(data_fetcher)",
            "data_fetcher.fetched += self.batch_progress.current.ready",
            "data_fetcher._start_profiler = self._on_before_fetch",
            "data_fetcher._stop_profiler = self._on_after_fetch",
        ],
        "FlashTrainingEpochLoop.on_run_start notes the random states before `iter`; FitSession sets the profiler hooks",
    )
    ours = _body(FlashTrainingEpochLoop.on_run_start)
    assert "trainer.current_epoch > 0 and (not trainer.fit_loop.is_resuming) and (not self.restarting)" in ours


def test_after_a_batch_validation_comes_before_anything_is_counted() -> None:
    _assert_order(
        _TrainingEpochLoop.on_advance_end,
        [
            "self._should_check_val_fx(data_fetcher)",
            "self.val_loop.run()",
            "update_lr_schedulers('step', update_plateau_schedulers=True)",
            "self._batches_that_stepped += 1",
            "self._save_loggers_on_train_batch_end()",
        ],
        "A newcomer at BATCH_END enters here",
    )


def test_a_fit_calls_the_doors_in_this_order() -> None:
    _assert_order(
        _FitLoop.run,
        [
            "self.setup_data()",
            "self.reset()",
            "self.on_run_start()",
            "while not self.done:",
            "self.on_advance_start()",
            "self.advance()",
            "self.on_advance_end()",
            "self.on_iteration_done()",
            "self.on_run_end()",
        ],
        "A newcomer runs through setup_data, on_run_start and on_advance_start before it enters in `advance`",
    )
    assert "self.epoch_loop.run(self._data_fetcher)" in _body(_FitLoop.advance), "FlashTrainingEpochLoop.run"


def test_loader_states_are_loaded_just_before_the_first_iterator_is_made() -> None:
    _assert_order(
        _FitLoop.setup_data,
        [
            "self._load_combined_loader_states()",
            "self._data_fetcher.setup(combined_loader)",
            "iter(self._data_fetcher)",
        ],
        "FlashFitLoop._load_combined_loader_states notes the random states from which that iterator is made",
    )
    between = _body(_FitLoop.setup_data)
    between = between[between.index("_load_combined_loader_states()") : between.index("iter(self._data_fetcher)")]
    assert "rand" not in between, "random states must not move between the note and the iterator"


def test_making_validation_loaders_needs_the_others_for_two_things_only() -> None:
    body = _body(_EvaluationLoop.setup_data)
    used = set(re.findall(r"strategy\.(\w+)", body) + re.findall(r"strategy\.(\w+)", _body(has_len_all_ranks)))
    assert used - {"root_device"} == {"barrier", "reduce"}, "FlashEvaluationLoop.setup_data_alone does without them"


def test_samplers_get_their_epoch_before_a_batch_is_fetched() -> None:
    _assert_order(
        _FitLoop.on_advance_start,
        ["self.setup_data()", "_set_sampler_epoch(dl, self.epoch_progress.current.processed)"],
        "DataPosition notes epoch_progress.current.processed as the sampler's epoch",
    )


def test_automatic_optimization_counts_an_update_around_the_hook() -> None:
    _assert_order(
        _AutomaticOptimization.run,
        [
            "self._make_closure(kwargs, optimizer, batch_idx)",
            "closure()",
            "self._optimizer_step(batch_idx, closure)",
            "closure.consume_result()",
            "result.asdict()",
        ],
        "FlashAutomaticOptimization.run returns the published outputs in the place of result.asdict()",
    )
    _assert_order(
        _AutomaticOptimization._optimizer_step,
        ["step.increment_ready()", "'optimizer_step'", "step.increment_completed()"],
        "FitSession.end_entry_after_commit counts the update as completed: the state was published before that",
    )
    assert "self._result = self.closure(" in _body(Closure.__call__), "FitSession.commit reads closure._result"


@pytest.mark.parametrize("plugin", [Precision, MixedPrecision])
def test_updates_are_gated_after_clipping_and_before_the_optimizer(plugin: type[Precision]) -> None:
    _assert_order(
        Precision._after_closure,
        ["'on_before_optimizer_step'", "'on_before_optimizer_step'", "self._clip_gradients("],
        "the gate of FlashDDPStrategy stands behind clipping",
    )
    if plugin is MixedPrecision:
        _assert_order(
            plugin.optimizer_step,
            ["self.scaler.unscale_", "self._after_closure(model, optimizer)", "self.scaler.step", "self.scaler.update"],
            "the gate stands between unscaling and the update; the scaler is part of the donor's state",
        )
    else:
        _assert_order(
            Precision._wrap_closure,
            ["closure()", "self._after_closure(model, optimizer)"],
            "the gate is the last thing in the closure that the optimizer calls",
        )


def test_loops_take_the_flash_classes_and_keep_what_they_hold(trainer: Trainer) -> None:
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    loops: list[Any] = [fit_loop, epoch_loop, epoch_loop.automatic_optimization, epoch_loop.val_loop]
    before = [dict(vars(loop)) for loop in loops]
    session: Any = SimpleNamespace()
    install_loops(session, fit_loop, SimpleNamespace())
    for loop, kept in zip(loops, before, strict=True):
        assert loop.session is session
        assert {name: value for name, value in vars(loop).items() if name != "session"} == kept
    expected = [FlashFitLoop, FlashTrainingEpochLoop, FlashAutomaticOptimization, FlashEvaluationLoop]
    assert [type(loop) for loop in loops] == expected


_LOOP_BASE = {"_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint"}


def test_the_state_of_the_loops_is_known(trainer: Trainer) -> None:
    epoch_loop = trainer.fit_loop.epoch_loop
    known: dict[Any, set[str]] = {
        trainer.fit_loop: {"_combined_loader_states_to_load", "_last_train_dl_reload_epoch", "_restart_stage"}
        | {"epoch_progress", "max_batches", "max_epochs", "min_epochs"},
        epoch_loop: {"_batches_that_stepped", "_restart_stage", "_results", "_skip_next_val", "batch_progress"}
        | {"max_steps", "min_steps", "scheduler_progress"},
        epoch_loop.automatic_optimization: {"_skip_backward", "optim_progress"},
        epoch_loop.manual_optimization: {"_output", "optim_step_progress"},
        epoch_loop.val_loop: {
            "_has_run",
            "_last_val_dl_reload_epoch",
            "_logged_outputs",
            "_max_batches",
            "_module_mode",
        }
        | {"_restart_stage", "_results", "_seen_batches_per_dataloader", "_stage", "_trainer_fn", "batch_progress"}
        | {"inference_mode", "verbose"},
    }
    for loop, names in known.items():
        kept = set(vars(loop)) - local_state._LOOP_REFERENCES
        assert kept == names | _LOOP_BASE, f"LocalState keeps these of {type(loop).__name__}; is the new one state?"
    assert set(vars(trainer._logger_connector)) == {
        *("_callback_metrics", "_current_fx", "_first_loop_iter", "_logged_metrics", "_progress_bar_metrics", "trainer")
    }, "LocalState keeps all of the logger connector but its trainer"
    assert isinstance(epoch_loop.manual_optimization, _ManualOptimization)


def test_progress_trackers_have_the_counters_that_are_read_and_moved(trainer: Trainer) -> None:
    epoch_loop = trainer.fit_loop.epoch_loop
    progress = epoch_loop.batch_progress
    assert progress.current.ready == progress.total.ready == 0, "FitSession._restore steps both back"
    assert trainer.fit_loop.epoch_progress.current.processed == 0, "DataPosition's epoch"
    step = epoch_loop.automatic_optimization.optim_progress.optimizer.step
    step.increment_completed()
    assert (step.total.ready, step.total.completed) == (0, 1), "FitSession.end_entry_after_commit"
    assert epoch_loop._batches_that_stepped == 0, "FlashRecovery logs at this step"


# ---------------------------------------------------------------------- set-up
def test_set_up_of_processes_is_what_ours_repeats() -> None:
    _assert_order(
        DDPStrategy.setup_distributed,
        [
            "reset_seed()",
            "self.set_world_ranks()",
            "self._process_group_backend = self._get_process_group_backend()",
            "_init_dist_connection(",
        ],
        "FlashDDPStrategy.setup_distributed does the same, with its own process group at the end",
    )
    body = _body(DDPStrategy._setup_model)
    assert "DistributedDataParallel(module=model, device_ids=device_ids, **self._ddp_kwargs)" in body, "_setup_model"
    strategy = DDPStrategy()
    for name in ("_ddp_kwargs", "_timeout", "_process_group_backend", "_launcher"):
        assert hasattr(strategy, name), f"FlashDDPStrategy reads or sets {name}"
    assert "self._get_process_group_backend" not in _body(DDPStrategy.setup), "only setup_distributed chooses a backend"


def test_a_fit_is_launched_with_the_arguments_that_a_fallback_replaces() -> None:
    names = _parameters(Trainer._fit_impl)
    assert names[:6] == ["self", "model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path"], (
        "_with_fallback puts the newest checkpoint in the place of ckpt_path"
    )
    passed = "self._fit_impl, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path"
    assert passed in _body(Trainer.fit), "_with_fallback counts on positional arguments"
    for function in (Trainer._validate_impl, Trainer._test_impl, Trainer._predict_impl):
        assert "train_dataloaders" not in _parameters(function), "_with_fallback knows a fit by train_dataloaders"
    assert "launcher.launch(trainer_fn, *args, trainer=trainer, **kwargs)" in _body(call._call_and_handle_interrupt)


def test_sigterm_handlers_are_registered_after_the_launch_and_by_attribute() -> None:
    assert "self._sigterm_notifier_fn" in _body(_SignalConnector.register_signal_handlers), "_take_over_sigterm"
    _assert_order(
        Trainer._run,
        [
            "self.strategy.setup_environment()",
            "self.strategy.setup(self)",
            "self._signal_connector.register_signal_handlers()",
        ],
        "_take_over_sigterm replaces the handler before it is registered",
    )
    assert "self._signal_connector.received_sigterm" in inspect.getsource(Trainer.received_sigterm.fget), (
        "FlashTrainingEpochLoop asks trainer.received_sigterm"
    )


def test_the_trainer_has_what_is_read_from_it(trainer: Trainer) -> None:
    for name in ("should_stop", "_logger_connector", "_signal_connector", "callbacks", "loggers", "datamodule"):
        assert hasattr(trainer, name), f"LocalState, FitSession or FlashLauncher reads trainer.{name}"
    source = inspect.getsource(inspect.getmodule(_FitLoop))
    for name in ("_train_start_time", "_last_val_time"):
        assert f"trainer.{name} =" in source, f"LocalState keeps trainer.{name}: time-based validation"
    assert hasattr(trainer._accelerator_connector, "_precision_plugin_flag"), "NPUAccelerator.setup"


# ---------------------------------------------------------------------- data
def test_fetchers_count_as_data_position_does() -> None:
    fetcher = _DataFetcher()
    assert {"fetched", "done", "length", "iterator", "_start_profiler", "_stop_profiler"} <= set(vars(fetcher))
    loader = CombinedLoader(DataLoader(range(6), batch_size=2), "max_size_cycle")
    fetcher.setup(loader)
    iter(fetcher)
    assert (fetcher.fetched, fetcher.done, fetcher.length) == (0, False, 3)
    for expected in ((1, False), (2, False), (3, True)):
        next(fetcher)
        assert (fetcher.fetched, fetcher.done) == expected, "DataPosition._skip_samples sets both"
    assert issubclass(_PrefetchDataFetcher, _DataFetcher)


def test_combined_loaders_have_the_iterator_that_is_stepped() -> None:
    loader = CombinedLoader(DataLoader(range(6), batch_size=2), "max_size_cycle")
    assert (loader._mode, loader._iterator) == ("max_size_cycle", None), "DataPosition._skip_samples"
    iter(loader)
    iterator = loader._iterator
    assert isinstance(iterator, _MaxSizeCycle)
    assert isinstance(iterator, _ModeIterator)
    assert iterator._idx == 0
    (inner,) = iterator.iterators
    assert isinstance(inner, _SingleProcessDataLoaderIter)
    inner._next_index()
    inner._num_yielded += 1
    iterator._idx += 1
    batch, index, _ = next(loader)
    assert (batch.tolist(), index) == ([2, 3], 1), "one batch was stepped over"


def test_plain_loaders_draw_an_index_per_batch_and_nothing_else() -> None:
    assert _body(_BaseDataLoaderIter._next_index) == "return next(self._sampler_iter)", "DataPosition._skip_samples"
    _assert_order(
        _SingleProcessDataLoaderIter._next_data,
        ["index = self._next_index()", "self._dataset_fetcher.fetch(index)"],
        "stepping the sampler is stepping the loader",
    )


@pytest.mark.parametrize(
    "sampler",
    [
        SequentialSampler(range(8)),
        RandomSampler(range(8)),
        DistributedSampler(range(8), num_replicas=2, rank=0),
        BatchSampler(RandomSampler(range(8)), 2, drop_last=False),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_leave_the_global_generators_alone_once_begun(sampler: Any) -> None:
    iterator = iter(sampler)
    next(iterator)
    states = capture_rng()
    assert len(list(iterator)) + 1 == len(sampler)
    assert capture_rng() == states, "DataPosition steps over indices of _SEEDED_SAMPLERS and restores no random states"


def test_loaders_keep_workers_that_live_on_in_their_iterator() -> None:
    assert DataLoader(range(4))._iterator is None, "DataPosition lets go of the workers of a newcomer's own set-up"
    _assert_order(
        DataLoader.__iter__,
        ["self.persistent_workers", "if self._iterator is None", "self._iterator._reset(self)"],
        "DataPosition makes workers anew by taking the iterator away",
    )


# ---------------------------------------------------------------------- logged values and loggers
def test_logged_values_have_the_fields_that_are_kept() -> None:
    collection = _ResultCollection(training=True)
    collection.log("training_step", "loss", torch.tensor(1.5), on_step=True, on_epoch=True, batch_size=4)
    assert set(vars(collection)) == {"training", "batch", "batch_size", "dataloader_idx"}, "_reduce_collection"
    result = collection["training_step.loss"]
    own = set(vars(result)) - set(vars(_EmptyMetric()))
    assert own <= {"is_tensor", "meta", "value", "cumulated_batch_size", "has_reset"}, "_RESULT_FIELDS"
    for name in local_state._RESULT_FIELDS:
        assert name in vars(result), f"_RESULT_FIELDS names {name}"
    again = local_state._rebuild_result(*local_state._reduce_result(result)[1])
    assert torch.equal(again.compute(), result.compute())


class _EmptyMetric(Metric):
    def update(self) -> None:
        raise NotImplementedError

    def compute(self) -> torch.Tensor:
        raise NotImplementedError


def test_metrics_have_the_internals_that_are_left_out() -> None:
    missing = local_state._METRIC_INTERNALS - set(vars(_EmptyMetric()))
    assert not missing, f"_METRIC_INTERNALS names what a Metric no longer has: {missing}"


def test_csv_logger_has_the_fields_that_are_put_back(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    assert (logger._version, logger._experiment) == (None, None), "logger_state reads both"
    writer = logger.experiment
    assert logger._experiment is writer
    assert (writer.metrics, writer.metrics_keys) == ([], [])
    assert writer.metrics_file_path == str(tmp_path / "lightning_logs" / "version_0" / "metrics.csv")


def test_wandb_logger_keeps_what_it_begins_a_run_with(tmp_path: Any) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, name="run")
    assert logger._wandb_init["name"] == "run", "_adopt_versions lets a replacement go on with the run"
    assert logger._experiment is None, "_capture reads the run's id there"


def test_a_csv_writer_removes_an_earlier_log_and_rewrites_for_new_columns() -> None:
    writer = fabric_csv._ExperimentWriter
    assert "rm_file(self.metrics_file_path)" in _body(writer._check_log_dir_exists), "_adopt_versions saves it before"
    _assert_order(
        writer.save,
        [
            "self._record_new_keys()",
            "self._rewrite_with_new_header(self.metrics_keys)",
            "writer.writerows(self.metrics)",
        ],
        "_content_at undoes a rewrite of the header",
    )
    assert "csv.DictWriter(file, fieldnames=fieldnames)" in _body(writer._rewrite_with_new_header), "_content_at"


# ---------------------------------------------------------------------- torch: gradient buckets
@pytest.fixture
def _alone() -> Any:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_ddp_tells_its_buckets_and_the_order_of_gradients() -> None:
    layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(3)]
    ddp = DistributedDataParallel(torch.nn.Sequential(*layers), init_sync=False)
    assert ddp.logger is not None
    seen = []
    for _ in range(3):
        ddp(torch.ones(1, 4)).sum().backward()
        ddp.logger.set_runtime_stats_and_log()
        told = ddp._get_ddp_logging_data()
        names = ("iteration", "rebuilt_per_bucket_param_indices", "prev_iteration_grad_ready_order_indices")
        seen.append([told.get(name) for name in names])
    why = "LayoutReader takes passes, buckets and order of arrival from these keys"
    assert [passes for passes, _, _ in seen] == [1, 2, 3], why
    assert not seen[0][1], why
    assert seen[0][2], why
    assert seen[0][2].replace(",", " ").split() == ["2", "1", "0"], why
    assert sorted(seen[1][1].replace(",", " ").split()) == ["0", "1", "2"], why
    assert seen[2][1] == seen[1][1], "Layout.is_settled: buckets are rebuilt once"
    calls = ("prepare_for_forward", "prepare_for_backward", "_rebuild_buckets", "_delay_all_reduce")
    for name in (*calls, "_autograd_hook", "_get_local_used_map"):
        assert hasattr(ddp.reducer, name), f"bucket_layout calls reducer.{name}"
    for name in ("find_unused_parameters", "static_graph", "process_group", "module"):
        assert hasattr(ddp, name), f"bucket_layout reads ddp.{name}"
    flag = "self._static_graph_delay_allreduce_enqueued"
    assert flag in inspect.getsource(DistributedDataParallel), f"bucket_layout sets {flag}"
    for name in local_state._WRAPPER_FLAGS:
        assert hasattr(ddp, name), f"LocalState keeps ddp.{name}"
    assert "init_sync" in _parameters(DistributedDataParallel.__init__), (
        "a newcomer wraps its model without a broadcast"
    )


# ---------------------------------------------------------------------- torch: process groups
def test_torch_keeps_its_groups_where_make_default_looks() -> None:
    assert isinstance(dist.distributed_c10d._world.pg_map, dict), "make_default corrects the backend's name there"
    assert isinstance(dist.Backend._plugins, dict), "make_default registers again"


def test_torch_makes_all_its_groups_where_make_default_stands_in() -> None:
    c10d = dist.distributed_c10d
    names = _parameters(c10d._new_process_group_helper)
    assert names[:4] == ["group_size", "group_rank", "global_ranks_in_group", "backend"], "make_holding_group"
    for function in (c10d.init_process_group, c10d._new_group_with_tag):
        body = _body(inspect.unwrap(function))
        assert "_new_process_group_helper(" in body, f"{function.__name__} makes groups that do not hold"
    assert "_new_group_with_tag(" in _body(inspect.unwrap(c10d.new_group)), "new_group makes groups that do not hold"


def test_a_backends_creator_is_told_the_members() -> None:
    options = dist.distributed_c10d._DistributedBackendOptions()
    for name in ("global_ranks_in_group", "group_rank", "group_id"):
        assert hasattr(options, name), f"make_default's creator reads {name}"


def test_gloo_takes_a_device_and_a_time_out() -> None:
    options = ProcessGroupGloo._Options()
    for name in ("_devices", "_threads", "_timeout"):
        assert hasattr(options, name), f"GlooTransport.connect sets {name}"
    for name in ("create_device", "create_default_device", "_set_default_timeout"):
        assert hasattr(ProcessGroupGloo, name), f"GlooTransport calls {name}"
    assert issubclass(ProcessGroupGloo, Backend)


_PUBLIC_COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "recv",
]


def _methods_called_on_the_group(function: Callable[..., Any]) -> set[str]:
    body = _body(inspect.unwrap(function))
    called = set(re.findall(r"\b(?:group|pg)\.(\w+)\(", body)) - {"rank", "size"}
    for other in re.findall(r"\b(isend|irecv|all_gather_single|reduce_scatter_single)\(", body):
        if other != function.__name__:
            called |= _methods_called_on_the_group(getattr(dist, other))
    return called


@pytest.mark.parametrize("name", _PUBLIC_COLLECTIVES)
def test_every_method_that_torch_calls_on_a_group_is_ours(name: str) -> None:
    called = _methods_called_on_the_group(getattr(dist, name))
    assert called, f"dist.{name} calls no method of a group: how does it reach the backend now?"
    for method in called:
        assert method in vars(HoldingProcessGroup), f"dist.{name} calls group.{method}, which would not hold"


def test_torch_has_the_virtual_methods_that_are_overridden() -> None:
    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/PyProcessGroup.hpp"
    called_from_native_code = set(re.findall(r"\w+", header.read_text()))
    own_helpers = {"alone", "on_finished", "first_incomplete", "truncate"}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):  # later names of old methods
        own_helpers |= {"all_to_all_single", "all_gather_single", "reduce_scatter_single"}
    for ours, theirs in ((HoldingProcessGroup, ProcessGroup), (HoldingWork, Work)):
        for name in set(vars(ours)) - own_helpers:
            is_known = hasattr(theirs, name) or name in called_from_native_code
            assert name.startswith("_") or is_known, f"{ours.__name__}.{name} overrides nothing of torch any more"
    for name in ("set", "get", "wait", "set_timeout", "check", "delete_key"):
        assert hasattr(Store, name), f"KeyValueStore or GroupStore overrides {name}"
