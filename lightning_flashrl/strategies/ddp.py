"""``strategy="flash_ddp"``: DistributedDataParallel whose ranks may die."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_flashrl.communicator import make_transport
from lightning_flashrl.strategies.environment import FlashEnvironment, FlashLauncher
from lightning_flashrl.strategies.epoch_loop import install_loops
from lightning_flashrl.strategies.logger_state import keep_versions
from lightning_flashrl.strategies.runtime import RecoveryRuntime
from lightning_flashrl.strategies.session import FitSession
from lightning_flashrl.supervisor import runner
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.types import Phase

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class FlashDDPStrategy(DDPStrategy):
    """Data-parallel training that goes on, exactly, when ranks die.

    A LightningModule that trains under ``ddp`` trains under ``flash_ddp``. Survivors of a fault stay inside ``fit``;
    the dead rank's replacement takes parameters and optimizer state from a survivor, its own random states, counters
    and data position from shared memory that outlived it, and the interrupted step is completed.

    Args:
        standby: processes kept imported ahead of need by a program that starts its own ranks (``python train.py``).
        launcher_options: further ``flashrun`` arguments for such a program, e.g. ``["--log-dir", "logs"]``.
        timeout: of one collective; a lost rank is noticed long before.
        **kwargs: as for :class:`lightning.pytorch.strategies.DDPStrategy`.

    Source: FlashRecovery, arXiv 2509.03047.
    """

    def __init__(
        self,
        *,
        standby: int = 1,
        launcher_options: list[str] | None = None,
        timeout: timedelta | None = _COLLECTIVE_TIMEOUT,
        cluster_environment: ClusterEnvironment | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(cluster_environment=cluster_environment or FlashEnvironment(), timeout=timeout, **kwargs)
        self._launcher_options = ["--standby", str(standby), *(launcher_options or [])]
        self.runtime: RecoveryRuntime | None = None
        self.session: FitSession | None = None

    @property
    def num_recoveries(self) -> int:
        """Recoveries of this job so far."""
        return 0 if self.runtime is None else self.runtime.communicator.quorum_id

    # ------------------------------------------------------------------ processes and groups
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = FlashLauncher(
            self.num_processes, self.num_nodes, self._launcher_options, self.cluster_environment
        )

    def setup_distributed(self) -> None:
        """Connect to the supervisor and install the process groups that hold."""
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        self.runtime = _runtime_of_process(self._process_group_backend, self.root_device, self._timeout)
        launcher = self.launcher
        if isinstance(launcher, FlashLauncher) and launcher.trainer is not None and not launcher.has_versions:
            keep_versions(launcher.trainer, self.runtime, launcher.number)
            launcher.has_versions = True

    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Put the loops with doors in the place of the trainer's own, then set up as DDP does."""
        runtime = self.runtime
        assert runtime is not None
        if trainer.state.fn == TrainerFn.FITTING:
            self.session = FitSession(trainer, runtime)
            install_loops(self.session, trainer.fit_loop, trainer.lightning_module)
            super().setup(trainer)
        else:
            with runtime.communicator.unrecorded():  # rank 0 gives its parameters to all
                super().setup(trainer)
        runtime.enter_phase(Phase.SETUP)
        if trainer.state.fn == TrainerFn.FITTING:
            self._gate_updates()

    def _gate_updates(self) -> None:
        """Let every update wait, after clipping, until all ranks are ready for it."""
        plugin, session = self.precision_plugin, self.session
        assert session is not None
        after_closure = type(plugin)._after_closure

        def gated(model: LightningModule, optimizer: Any) -> None:
            after_closure(plugin, model, optimizer)
            session.commit()

        plugin._after_closure = gated  # type: ignore[method-assign]

    # ------------------------------------------------------------------ the model
    def _setup_model(self, model: Module) -> DistributedDataParallel:
        runtime = self.runtime
        assert runtime is not None
        if self.session is not None:
            self.session.reduced = frozenset(
                id(parameter) for parameter in model.parameters() if parameter.requires_grad
            )
        device_ids = self.determine_ddp_device_ids()
        communicator = runtime.communicator
        if runtime.must_enter:
            communicator.skip_unrecorded()
            return DistributedDataParallel(model, device_ids=device_ids, init_sync=False, **self._ddp_kwargs)
        with communicator.unrecorded():
            return DistributedDataParallel(model, device_ids=device_ids, **self._ddp_kwargs)

    # ------------------------------------------------------------------ steps
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the closure and the update, and count the update."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.session is not None
        self.session.committed()
        return output

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        assert self.runtime is not None
        self.runtime.enter_phase(phase)
        yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of a training batch."""
        with self._phase(Phase.FORWARD):
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Backward pass, in which gradients are reduced."""
        with self._phase(Phase.BACKWARD):
            assert self.runtime is not None
            self.runtime.is_in_backward = True
            try:
                return super().backward(*args, **kwargs)
            finally:
                self.runtime.is_in_backward = False

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """A validation batch, of the sanity check or of training."""
        assert self.lightning_module is not None
        is_sanity_check = self.lightning_module.trainer.sanity_checking
        if self.session is not None and not is_sanity_check:
            self.session.note_validation_step()
        with self._phase(Phase.SANITY_CHECK if is_sanity_check else Phase.VALIDATION):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """A test batch."""
        with self._phase(Phase.VALIDATION):
            return super().test_step(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save; the file is noted first, so that a replacement of the writer does not leave two."""
        assert self.runtime is not None
        with self._phase(Phase.CHECKPOINT):
            if self.is_global_zero:
                self.runtime.note_file(str(filepath))
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            if self.is_global_zero:
                self.runtime.client.note_checkpoint(str(filepath))


_runtime: RecoveryRuntime | None = None
_is_started = False


def _runtime_of_process(backend: str, device: torch.device, timeout: timedelta | None) -> RecoveryRuntime:
    """The process's one runtime; a second ``fit``, ``validate`` or ``test`` uses it again."""
    global _runtime
    global _is_started
    if _runtime is None:
        client = RankClient.from_environ()
        assert client is not None
        seconds = (timeout or _COLLECTIVE_TIMEOUT).total_seconds()
        _runtime = RecoveryRuntime(client, make_transport(backend, device), device, seconds)
    if not _is_started:
        _is_started = True
        _runtime.start()
    return _runtime


def _arrive_early() -> None:
    """In a newcomer, before its program runs: begin with what its predecessor's resume points already tell."""
    global _runtime
    client = RankClient.from_environ()
    if client is None or not client.is_newcomer or _runtime is not None:
        return
    published = RecoveryRuntime.read_published(client.slot)
    if not published:
        return
    backend, device_type, timeout_s = published[0].facts["transport"]
    if device_type == "cpu":  # the program chooses a device, and settings of its library, first
        device = torch.device("cpu")
        _runtime = RecoveryRuntime(client, make_transport(backend, device), device, timeout_s)
        _runtime.arrive()


runner.before_program.append(_arrive_early)
