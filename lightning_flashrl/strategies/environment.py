"""Who this process is among the ranks, and how a program that nobody launched gets its ranks."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher

import __main__
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies.runtime import RecoveryRuntime
from lightning_flashrl.supervisor.client import RankClient


class FlashEnvironment(ClusterEnvironment):
    """Ranks and sizes as ``flashrun`` gives them; before a launch, those of a job on one node."""

    @property
    def creates_processes_externally(self) -> bool:
        """Whether this process already is a rank."""
        return self.detect()

    @property
    def main_address(self) -> str:
        """Host of the controller."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Port that scripts of other frameworks may use."""
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        """Whether this process runs under ``flashrun``."""
        return RankClient.from_environ() is not None

    def world_size(self) -> int:
        """Ranks of the job."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def set_world_size(self, size: int) -> None:
        """The launcher decides."""

    def global_rank(self) -> int:
        """Rank in the job."""
        return int(os.environ.get("RANK", "0"))

    def set_global_rank(self, rank: int) -> None:
        """The launcher decides."""

    def local_rank(self) -> int:
        """Rank on this node."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        """Number of this node."""
        return int(os.environ.get("GROUP_RANK", "0"))

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the Trainer's arguments with the launcher's.

        Raises:
            ConfigurationError: they differ.
        """
        if not self.detect():
            return
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        if num_devices != local:
            raise ConfigurationError(
                f"Trainer(devices={num_devices}) does not match flashrun --nproc-per-node {local}; make them equal"
            )
        if num_devices * num_nodes != world:
            raise ConfigurationError(
                f"Trainer(devices={num_devices}, num_nodes={num_nodes}) does not match the {world} ranks that flashrun "
                "started; make them equal"
            )


def _take_over_sigterm(trainer: Trainer) -> None:
    """Lightning's SIGTERM handler broadcasts from within the signal, between any two collectives; ours only takes note.

    The ranks agree on the step to stop at when they next commit.
    """
    connector = trainer._signal_connector

    def note(signum: int, _: Any) -> None:
        if trainer.world_size > 1:
            connector.has_noted_sigterm = True  # type: ignore[attr-defined]
        else:
            connector.received_sigterm = True  # nobody to agree with

    connector._sigterm_notifier_fn = note  # type: ignore[method-assign]


def _program_arguments(command: list[str]) -> list[str]:
    """The program's own arguments in the interpreter's command line, even if the program has changed ``sys.argv``.

    >>> _program_arguments(["python", "-W", "error", "train.py", "--lr", "1"])
    ['--lr', '1']
    >>> _program_arguments(["python", "-u", "-m", "train", "--lr", "1"])
    ['--lr', '1']
    """
    words = iter(command[1:])
    for word in words:
        if word in ("-W", "-X"):
            next(words, None)
        elif word == "-m":
            next(words, None)
            break
        elif not word.startswith("-"):
            break
    return list(words)


_num_launchers = 0
_fits_begun = 0


def _is_past(function: Callable[..., Any]) -> bool:
    """In a replacement: whether the lost rank had ended this fit, and begun to train in a later one."""
    global _fits_begun
    client = RankClient.from_environ()
    assert client is not None
    index = _fits_begun
    if "train_dataloaders" in inspect.signature(function).parameters:
        _fits_begun += 1
    if not client.is_newcomer:
        return False
    published = RecoveryRuntime.read_published(client.slot)
    return bool(published) and index < int(published[0].facts["fit"])


def _with_fallback(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """After the loss of everything, ``fit`` resumes from the job's newest checkpoint."""
    checkpoint = os.environ.get("FLASHRL_RESUME_CKPT")
    names = list(inspect.signature(function).parameters)
    if checkpoint is None or "ckpt_path" not in names or "train_dataloaders" not in names:
        return args
    replaced = list(args)
    replaced[names.index("ckpt_path")] = checkpoint
    return tuple(replaced)


class FlashLauncher(_Launcher):
    """Runs the function in a rank; in a program that is no rank, starts ``flashrun`` on the same program.

    Args:
        num_processes: ranks to start.
        num_nodes: nodes of the job.
        options: further arguments of ``flashrun``.
    """

    def __init__(self, num_processes: int, num_nodes: int, options: list[str], environment: ClusterEnvironment) -> None:
        self._num_processes = num_processes
        self._num_nodes = num_nodes
        self._options = options
        self._environment = environment
        self.trainer: Trainer | None = None
        self.number = -1
        """Of this Trainer among those of the program, in the order of their first use; the same in a replacement."""
        self.has_versions = False
        """Whether the versions of the Trainer's loggers are decided in this process."""
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def is_interactive_compatible(self) -> bool:
        """A program is started again from its file, so there must be one."""
        return False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run ``function`` in this rank, or become the parent of the ranks that do."""
        self._environment.validate_settings(self._num_processes, self._num_nodes)
        self.trainer = trainer
        if FlashEnvironment.detect():
            self._take_number()
            if trainer is not None:
                _take_over_sigterm(trainer)
            if _is_past(function):
                return None
            return function(*_with_fallback(function, args), **kwargs)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ConfigurationError(
                "strategy='flash_ddp' was started by torchrun, which restarts every rank after a fault; "
                "put flashrun in the place of torchrun, the arguments are the same"
            )
        if self._num_nodes > 1:
            raise ConfigurationError(
                f"Trainer(num_nodes={self._num_nodes}) needs a launcher on each node; start the program with flashrun"
            )
        raise SystemExit(self._run_ranks())

    def _take_number(self) -> None:
        global _num_launchers
        if self.number < 0:
            self.number = _num_launchers
            _num_launchers += 1

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", str(self._num_processes)]
        command += self._options
        spec = getattr(__main__, "__spec__", None)
        if spec is not None and spec.name != "__main__":
            module = spec.name.removesuffix(".__main__")
            return [*command, "-m", module, *_program_arguments(sys.orig_argv)]
        script = getattr(__main__, "__file__", None)
        if script is None:
            raise ConfigurationError(
                "strategy='flash_ddp' starts the program's file again in each rank, and this interpreter runs none; "
                "in a notebook use strategy='flash_ddp_notebook'"
            )
        return [*command, os.path.abspath(script), *_program_arguments(sys.orig_argv)]

    def _run_ranks(self) -> int:
        """Start ``flashrun`` in this process's place and return its exit code; signals are passed on."""
        self._child = subprocess.Popen(self._command(), env=os.environ | {"FLASHRL_LAUNCHER_PID": str(os.getpid())})
        previous = {
            number: signal.signal(number, lambda signum, _: self.kill(signum))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return self._child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def kill(self, signum: int) -> None:
        """Pass a signal on to ``flashrun``."""
        if self._child is not None:
            self._child.send_signal(signum)
