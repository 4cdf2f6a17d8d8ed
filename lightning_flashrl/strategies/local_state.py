"""What only this rank knows of a Lightning run, as bytes, and back into a freshly set-up trainer.

Kept: random states, loop counters, logged values not yet reduced, plain attributes of the LightningModule, its
submodules (metrics included), the callbacks and the data module, schedulers, hyperparameters of optimizers, buffers and
frozen parameters that changed, the position in the data. Not kept, because every rank has them: trainable parameters,
optimizer state, the gradient scaler.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

from lightning_flashrl.recovery.bulk import BulkWriter, Snapshot, StoredBulk, Tensors, TensorWatch
from lightning_flashrl.recovery.random_states import capture_rng, restore_rng
from lightning_flashrl.recovery.slot import Region
from lightning_flashrl.recovery.snapshot import Freezer, Refusal

if TYPE_CHECKING:
    from lightning_flashrl.strategies.position import DataPosition

log = logging.getLogger(__name__)

_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_LIGHTNING_INTERNALS = frozenset(
    {"_trainer", "_fabric", "_fabric_optimizers", "_log_hyperparams", "_jit_is_scripting", "_compiler_ctx", "_hparams"}
    | {
        "_hparams_initial",
        "_hparams_name",
        "_device_mesh",
        "_metric_attributes",
        "_should_prevent_trainer_and_dataloaders_deepcopy",
    }
)
_METRIC_INTERNALS = frozenset(
    {"update", "compute", "_update_signature", "_defaults", "_persistent", "_reductions", "_device", "_dtype", "_cache"}
)
_LOOP_REFERENCES = frozenset(
    {"trainer", "_combined_loader", "_data_fetcher", "_data_source", "_warning_cache", "epoch_loop", "val_loop"}
    | {"automatic_optimization", "manual_optimization", "_logger_connector"}
)
_RICH_INTERNALS = frozenset(
    {"progress", "_progress_stopped", "_metric_component"}
    | {f"{stage}_progress_bar_id" for stage in ("train", "val_sanity", "val", "test", "predict")}
)
"""They name bars of a display that a replacement makes anew."""
_LIBRARIES = frozenset(
    {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_flashrl", "torch", "torchmetrics"}
)
"""Their own unpicklable attributes are made anew, and no user could change that."""
_PLAIN = frozenset({bool, int, float, str, type(None)})
_WRAPPER_FLAGS = ("require_forward_param_sync", "require_backward_grad_sync")
_RESULT_FIELDS = ("value", "cumulated_batch_size", "has_reset", "_forward_cache", "_computed", "_update_count")


def _rebuild_result(meta: Any, is_tensor: bool, state: dict[str, Any]) -> _ResultMetric:
    result = _ResultMetric(meta, is_tensor)
    vars(result).update(state)
    return result


def _reduce_result(result: _ResultMetric) -> Any:
    attributes = vars(result)
    return _rebuild_result, (
        result.meta,
        result.is_tensor,
        {k: attributes[k] for k in _RESULT_FIELDS if k in attributes},
    )


def _rebuild_collection(
    training: bool, items: dict[str, Any], batch_size: int | None, index: int | None
) -> _ResultCollection:
    collection = _ResultCollection(training)
    collection.update(items)
    collection.batch_size = batch_size
    collection.dataloader_idx = index
    return collection


def _reduce_collection(collection: _ResultCollection) -> Any:
    state = (collection.training, dict(collection), collection.batch_size, collection.dataloader_idx)
    return _rebuild_collection, state


def _module_trees(callback: Callback, trained: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a callback holds, e.g. averaged weights."""
    for key, value in vars(callback).items():
        if isinstance(value, nn.Module) and value is not trained:
            yield key, value


LARGE_OUTPUT_BYTES = 4 << 20
"""A tensor of the step's outputs from this size on is not kept."""


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.nbytes >= LARGE_OUTPUT_BYTES


class LocalState:
    """Freezes and thaws the rank-local state of one ``fit``.

    Args:
        trainer: set up, at the entry of its first epoch.
        position: where in the training data the rank is.
        reduced: parameters whose gradients DDP reduces, by ``id``; ``None`` where all are.
    """

    def __init__(self, trainer: Trainer, position: DataPosition, reduced: frozenset[int] | None = None) -> None:
        self._trainer = trainer
        self._position = position
        self._reduced = reduced
        self._module: LightningModule = trainer.lightning_module
        self._device: torch.device = trainer.strategy.root_device
        self._parameters = dict(self._module.named_parameters())
        self._freezer = Freezer(on_refused=self._report_refused)
        self._freezer._dispatch[_ResultMetric] = _reduce_result
        self._freezer._dispatch[_ResultCollection] = _reduce_collection
        self._places: dict[str, tuple[Tensors, str]] = {}
        """Of buffers, frozen parameters and all that modules of callbacks hold."""
        self._frozen: dict[str, nn.Parameter] = {}
        self._uncounted: set[str] = set()
        self._named_params: dict[int, tuple[list[nn.Parameter], list[str | nn.Parameter]]] = {}
        self._told_of_outputs = False
        self._unpicklable: list[Refusal] = []
        self._structure = self._names_of_parts()
        self._name_objects()
        self._watch = TensorWatch(self._places, self._uncounted)
        self._bulk = BulkWriter()

    def _report_refused(self, refusal: Refusal) -> None:
        owner = type(refusal.owner).__name__
        if refusal.is_too_large:
            rank_zero_warn(
                f"flash_ddp: attribute {refusal.attribute!r} of {owner} {refusal.reason}; a replacement of this rank "
                "will not have it. Keep it smaller, or in a buffer, a module or optimizer state"
            )
        elif refusal.has_state and type(refusal.owner).__module__.partition(".")[0] not in _LIBRARIES:
            self._unpicklable.append(refusal)
        else:
            log.debug("not kept for a replacement: %s.%s %s", owner, refusal.attribute, refusal.reason)

    def _warn_of_unpicklable(self) -> None:
        names = sorted({f"{type(refusal.owner).__name__}.{refusal.attribute}" for refusal in self._unpicklable})
        self._unpicklable.clear()
        rank_zero_warn(
            f"flash_ddp: these attributes cannot be pickled: {', '.join(names)}; a replacement of this rank has those "
            "that its own start makes. Where they change in training, keep what they are made from in other attributes"
        )

    def _name_objects(self) -> None:
        trainer, freezer = self._trainer, self._freezer
        freezer.skip_types(DataLoader, Dataset, Sampler, CombinedLoader, _DataFetcher, LRScheduler, Logger, nn.Module)
        freezer.name(trainer, "trainer")
        freezer.name(trainer.strategy, "strategy")
        for index, optimizer in enumerate(trainer.optimizers):
            freezer.name(optimizer, ("optimizer", index))
        for name, parameter in self._parameters.items():
            freezer.name(parameter, ("parameter", name))
        self._watch_tree(self._module, "module")
        loops = {
            "fit": trainer.fit_loop,
            "epoch": trainer.fit_loop.epoch_loop,
            "automatic": trainer.fit_loop.epoch_loop.automatic_optimization,
            "manual": trainer.fit_loop.epoch_loop.manual_optimization,
            "validation": trainer.fit_loop.epoch_loop.val_loop,
        }
        for name, loop in loops.items():
            freezer.watch(loop, ("loop", name), _LOOP_REFERENCES)
        freezer.watch(trainer._logger_connector, "logger_connector", {"trainer"})
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            freezer.watch(trainer.datamodule, "datamodule", {"trainer", *_LIGHTNING_INTERNALS})  # type: ignore[attr-defined]
        for index, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
            of_display = _RICH_INTERNALS if isinstance(callback, RichProgressBar) else frozenset()
            freezer.watch(callback, ("callback", index), {"_fs", *of_display})
            for key, tree in _module_trees(callback, self._module):
                self._watch_tree(tree, f"callback{index}.{key}")

    def _watch_tree(self, root: nn.Module, prefix: str) -> None:
        for name, module in root.named_modules(prefix=prefix):
            excluded = _MODULE_INTERNALS
            if isinstance(module, LightningModule):
                excluded = excluded | _LIGHTNING_INTERNALS
            if isinstance(module, Metric):
                excluded = excluded | _METRIC_INTERNALS
            self._freezer.watch(module, ("submodule", name), excluded)
            if hasattr(module, "track_running_stats"):  # normalisation kernels write without leaving a trace
                self._uncounted.update(f"{name}.{key}" for key in module._buffers)
            for key in module._buffers:
                self._places[f"{name}.{key}"] = (module._buffers, key)
            for key, parameter in module._parameters.items():
                if parameter is not None and (root is not self._module or not parameter.requires_grad):
                    self._places[f"{name}.{key}"] = (cast(Tensors, module._parameters), key)
                    if root is self._module:
                        self._frozen[f"{name}.{key}"] = parameter
        for name, buffer in root.named_buffers(prefix=prefix):
            self._freezer.name(buffer, ("buffer", name))
        if root is not self._module:
            for name, parameter in root.named_parameters(prefix=prefix):
                self._freezer.name(parameter, ("parameter", name))

    def capture(self, outputs: Any = None) -> Snapshot:
        """Return the state of this moment, to be written before anything changes.

        Args:
            outputs: of the training step, for the hooks that a replacement has still to call.
        """
        trainer = self._trainer
        written = self._watch.look()
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:  # trained from now on: a donor has it, one update ahead
                written.pop(name, None)
                self._check_reduced(name, parameter)
        small = {name for name, found in written.items() if found.tensor.nbytes <= TensorWatch.SMALL_BYTES}
        extra = {
            "rng": capture_rng(self._device),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "groups": [
                [{**group, "params": self._name_params(group["params"])} for group in optimizer.param_groups]
                for optimizer in trainer.optimizers
            ],
            "requires_grad": [parameter.requires_grad for parameter in self._parameters.values()],
            "buffers": {name: written.pop(name).tensor.detach() for name in sorted(small)},
            "data": self._position.capture(),
            "flags": {name: value for name, value in vars(trainer).items() if type(value) in _PLAIN},
            "wrapper": {name: getattr(trainer.model, name) for name in _WRAPPER_FLAGS if hasattr(trainer.model, name)},
            "outputs": self._bounded(outputs),
            "gradients": self._gradients(),
        }
        frozen = self._freezer.freeze(extra)
        if self._unpicklable:
            self._warn_of_unpicklable()
        contents, bulk_bytes = self._bulk.lay_out(written, frozen.buffers)

        def pieces(region: Region) -> Iterator[tuple[int, memoryview]]:
            return self._bulk.pieces(region, contents, written, frozen.buffers)

        return Snapshot(frozen.schema, frozen.content, contents, bulk_bytes, pieces)

    def _gradients(self) -> dict[str, torch.Tensor] | None:
        """What manual optimisation may have accumulated and not yet used."""
        if self._module.automatic_optimization:
            return None
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        return {name: grad for name, grad in gradients.items() if grad is not None}

    def _names_of_parts(self) -> set[str]:
        module = self._module
        return {name for name, _ in module.named_modules()} | {name for name, _ in module.named_parameters()}

    def check_structure(self) -> None:
        """Warn, once, of submodules and parameters that were added or removed since training began."""
        names = self._names_of_parts()
        changed = sorted(names ^ self._structure)
        if not changed:
            return
        self._structure = names
        shown = ", ".join(changed[:5]) + (" …" if len(changed) > 5 else "")
        rank_zero_warn(
            f"flash_ddp: {shown}: added to the model, or removed from it, in training; a replacement has the parts "
            "that its own start makes, so a rank that is lost now may not come back, or not exactly. Make them in "
            "`__init__` or `configure_model`"
        )

    def _check_reduced(self, name: str, parameter: nn.Parameter) -> None:
        if self._reduced is None or id(parameter) in self._reduced:
            return
        self._reduced |= {id(parameter)}
        rank_zero_warn(
            f"flash_ddp: {name.partition('.')[2]!r} was frozen when DDP wrapped the model and is trained now: DDP does "
            "not reduce its gradient, so it differs between ranks, and a replacement gets that of its donor. Let it "
            "require gradients until `on_train_start`, with `find_unused_parameters=True`, and freeze it there"
        )

    def _name_params(self, params: list[nn.Parameter]) -> list[str | nn.Parameter]:
        """Names of a parameter group's members; they seldom change."""
        known, names = self._named_params.get(id(params), ([], []))
        if len(known) != len(params) or not all(map(operator.is_, known, params)):
            of = {id(parameter): name for name, parameter in self._parameters.items()}
            names = [of.get(id(parameter), parameter) for parameter in params]
            self._named_params[id(params)] = (list(params), names)
        return names

    def _bounded(self, outputs: Any) -> Any:
        """The step's outputs without tensors that are too large for the slot."""
        if not isinstance(outputs, dict):
            return outputs
        kept = {key: value for key, value in outputs.items() if not _is_large(value)}
        if len(kept) < len(outputs) and not self._told_of_outputs:
            self._told_of_outputs = True
            left_out = sorted(str(key) for key in outputs.keys() - kept.keys())
            rank_zero_warn(
                f"flash_ddp: training_step returns tensors of over {LARGE_OUTPUT_BYTES} bytes as {left_out}; hooks "
                "of a replacement that enters after this step's update get the outputs without them. Return less, or "
                "use the tensors inside training_step"
            )
        return kept

    def shrink(self) -> bool:
        """Leave out the largest attribute from now on, with a warning; false if nothing large is left."""
        return self._freezer.refuse_largest()

    def restore(self, schema: bytes, content: bytes, bulk: StoredBulk) -> Any:
        """Set this rank's state to a captured one; the data position is left to the caller.

        Returns:
            the training step's outputs given to :meth:`capture`.
        """
        trainer = self._trainer
        results = trainer.fit_loop.epoch_loop._results
        extra = self._freezer.thaw(schema, content, bulk.buffers())
        trainer.fit_loop.epoch_loop._results.batch = results.batch
        for config, state in zip(trainer.lr_scheduler_configs, extra["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        for optimizer, groups in zip(trainer.optimizers, extra["groups"], strict=True):
            for group in groups:
                group["params"] = [self._parameters[p] if isinstance(p, str) else p for p in group["params"]]
            while len(optimizer.param_groups) < len(groups):
                optimizer.add_param_group(groups[len(optimizer.param_groups)])
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.update(kept)
        for parameter, requires_grad in zip(self._parameters.values(), extra["requires_grad"], strict=True):
            parameter.requires_grad_(requires_grad)
        if extra["gradients"] is not None:
            for name, parameter in self._parameters.items():
                parameter.grad = extra["gradients"].get(name)
        with torch.no_grad():
            for name, value in extra["buffers"].items():
                self._live(name, value.dtype, tuple(value.shape)).copy_(value)
        for name, place in bulk.contents.places.items():
            bulk.fill(name, self._live(name, getattr(torch, place.dtype), place.shape))
        vars(trainer).update(extra["flags"])
        for name, value in extra["wrapper"].items():
            setattr(trainer.model, name, value)
        self._position.restore(extra["data"])
        restore_rng(extra["rng"], self._device)
        return extra["outputs"]

    def _live(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The live tensor of that name; one of another type or shape, or none, gives way to a new one."""
        owner, key = self._places[name]
        tensor = owner.get(key)
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
            if isinstance(tensor, nn.Parameter):
                tensor.data = torch.empty(shape, dtype=dtype, device=tensor.device)
            else:
                device = self._device if tensor is None else tensor.device
                tensor = owner[key] = torch.empty(shape, dtype=dtype, device=device)
        return tensor
