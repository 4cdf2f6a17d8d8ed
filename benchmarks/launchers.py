"""The benchmark job under each system: how its processes are started, replaced and ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import peers

JOBS = Path(__file__).resolve().parent / "jobs"
CHECKPOINT_EVERY = 10
_OURS = re.compile("RANK|WORLD_SIZE|LOCAL_|GROUP_|MASTER_|FLASHRL_|TORCHELASTIC_|TORCHFT_|PET_")
_STOP_WAIT_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class JobSize:
    """What is run.

    Attributes:
        folder: of the job's events and output; exists.
        num_ranks: how many take part.
        num_steps: optimizer steps.
    """

    folder: Path
    num_ranks: int
    num_steps: int


class Launcher(ABC):
    """One job under one system."""

    name: str
    """Key in the results."""
    title: str
    """For the table."""
    is_replaced_by_system = True
    """Whether the system itself starts the replacement of a lost rank."""

    def __init__(self, size: JobSize) -> None:
        self.size = size
        self.processes: list[subprocess.Popen[bytes]] = []
        self._num_logs = 0

    @staticmethod
    def problem() -> str | None:
        """Why this system cannot be measured here."""
        return None

    @abstractmethod
    def start(self) -> None:
        """Start the job."""

    def replace(self, rank: int) -> None:  # noqa: B027 - most systems do it themselves
        """A rank is gone: start another, if that is not the system's own task."""

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        """End what still runs, politely first: launchers take their ranks with them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline_s = time.monotonic() + _STOP_WAIT_S
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(number)
            while self.is_running() and time.monotonic() < deadline_s:
                time.sleep(0.05)

    def output(self) -> str:
        """All that the processes printed."""
        return "".join(p.read_text(errors="replace") for p in sorted(self.size.folder.glob("output*.txt")))

    def _spawn(self, command: list[str], **environ: str) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not _OURS.match(name)}
        kept |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
        kept |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "RUST_BACKTRACE": "0", "CUDA_VISIBLE_DEVICES": "", **environ}
        self._num_logs += 1
        with open(self.size.folder / f"output{self._num_logs}.txt", "wb") as output:
            return subprocess.Popen(command, env=kept, stdout=output, stderr=subprocess.STDOUT, cwd=self.size.folder)

    def _lightning_job(self, strategy: str, *further: str) -> list[str]:
        size = self.size
        command = [str(JOBS / "lightning_job.py"), "--folder", str(size.folder), "--strategy", strategy]
        return [*command, "--steps", str(size.num_steps), *further]


class Flash(Launcher):
    """``flashrun`` with a process on standby."""

    name, title = "flash_standby", "flash_ddp, standby"
    standby = 1
    job_options: tuple[str, ...] = ()

    def start(self) -> None:
        command = [sys.executable, "-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", str(self.size.num_ranks)]
        command += ["--standby", str(self.standby), "--log-dir", str(self.size.folder / "logs")]
        self.processes = [self._spawn([*command, *self._lightning_job("flash_ddp", *self.job_options)])]


class FlashCold(Flash):
    """``flashrun`` that starts the replacement from nothing."""

    name, title = "flash_cold", "flash_ddp, cold"
    standby = 0


class StockDDP(Launcher):
    """``torchrun`` with Lightning's own ``ddp``; nothing is kept."""

    name, title = "ddp", "ddp"
    options: tuple[str, ...] = ()
    job_options: tuple[str, ...] = ()
    environ: Mapping[str, str] = MappingProxyType({})

    def start(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.size.num_ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        command += ["--local-addr", "127.0.0.1", *self.options, *self._lightning_job("ddp", *self.job_options)]
        self.processes = [self._spawn(command, **self.environ)]


class Torchrun(StockDDP):
    """``torchrun`` that starts all ranks again, from Lightning's newest checkpoint.

    With torch's default the new ranks may read rendezvous keys of the dead ones and fail or hang (pytorch issues 135712
    and 167288); the variable avoids that.
    """

    name, title = "torchrun", f"torchrun + checkpoint every {CHECKPOINT_EVERY}"
    options = ("--max-restarts", "3")
    job_options = ("--checkpoint-every", str(CHECKPOINT_EVERY))
    environ = MappingProxyType({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


class Torchft(Launcher):
    """torchft, one replica group a rank, its hook repaired; the lost group is started again at once."""

    name, title = "torchft", "torchft 0.2.0, hook repaired"
    is_replaced_by_system = False
    options: tuple[str, ...] = ()
    problem = staticmethod(peers.TORCHFT.problem)

    def start(self) -> None:
        port = free_port()
        lighthouse = [str(peers.TORCHFT.python.with_name("torchft_lighthouse")), "--bind", f"127.0.0.1:{port}"]
        self._lighthouse = self._spawn([*lighthouse, "--min_replicas", "1"])
        self._environ = {"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
        time.sleep(0.5)
        self.processes = [self._start_group(group) for group in range(self.size.num_ranks)]

    def _start_group(self, group: int) -> subprocess.Popen[bytes]:
        command = [str(peers.TORCHFT.python), str(JOBS / "torchft_replica.py"), "--folder", str(self.size.folder)]
        command += ["--group", str(group), "--groups", str(self.size.num_ranks), "--steps", str(self.size.num_steps)]
        return self._spawn([*command, *self.options], **self._environ)

    def replace(self, rank: int) -> None:
        self.processes[rank].wait()
        self.processes.append(self._start_group(rank))

    def stop(self) -> None:
        super().stop()
        self._lighthouse.kill()
        self._lighthouse.wait()


class TorchftStock(Torchft):
    """torchft as published."""

    name, title = "torchft_stock", "torchft 0.2.0, stock"
    options = ("--stock",)


class InProcess(Launcher):
    """nvidia-resiliency-ext's in-process restart: survivors go on as a smaller world."""

    name, title = "nvrx", "NVRx 0.4.1 in-process"
    is_replaced_by_system = False
    problem = staticmethod(peers.INPROCESS.problem)

    def start(self) -> None:
        self._port = free_port()
        self.processes = [self._start_rank(rank) for rank in range(self.size.num_ranks)]

    def _start_rank(self, rank: int) -> subprocess.Popen[bytes]:
        command = [str(peers.INPROCESS.python), str(JOBS / "inprocess_rank.py"), "--folder", str(self.size.folder)]
        command += ["--port", str(self._port), "--steps", str(self.size.num_steps)]
        world_size = str(self.size.num_ranks)
        environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port), "PYTHONWARNINGS": "ignore"}
        return self._spawn([*command, "--checkpoint-every", str(CHECKPOINT_EVERY)], **environ)
