"""A job under ``flashrun``, watched and struck from outside: through its command line, its files and its processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_flashrl import clock
from lightning_flashrl.report import Recovery, Step, read_recoveries, read_steps
from lightning_flashrl.supervisor.process import die_with_parent

PROGRAM = "lightning_flashrl.cli.demo_train"
_POLITE_S = 3.0
_FORCED_S = 5.0
_EVENT = re.compile(r"\[flashrun\] (.*)")


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A process that is a rank now.

    Attributes:
        pid: its number.
        incarnation: processes that held the rank before it.
    """

    pid: int
    incarnation: int


class Job:
    """One training under ``flashrun``.

    Args:
        folder: for everything the job writes.
        num_ranks: ranks to start.
        steps: optimizer steps to train.
    """

    def __init__(self, folder: Path, num_ranks: int, steps: int) -> None:
        self.folder = folder
        self.num_ranks = num_ranks
        self.steps = steps
        self.began_s = 0.0
        self.returncode: int | None = None
        self.messages: list[str] = []
        """What ``flashrun`` said on stderr."""
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    @property
    def logs(self) -> Path:
        """Where ``flashrun`` keeps the output of all processes and its records."""
        return self.folder / "logs"

    # ------------------------------------------------------------------ life
    def start(self) -> None:
        """Start ``flashrun``; it dies with this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", str(self.num_ranks)]
        command += ["--log-dir", str(self.logs), "--redirects", "3", "-m", PROGRAM]
        command += ["--out", str(self.folder), "--steps", str(self.steps)]
        ours = os.getpid()
        self.began_s = clock.now_s()
        # A session of its own: Ctrl-C reaches this process alone, which then ends the job in its own way.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(ours),
        )
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)

    def poll(self) -> list[str]:
        """Return what ``flashrun`` said since the last call; sets :attr:`returncode` at its end."""
        if self._process is None:
            return []
        self.returncode = self._process.poll()  # before reading: what was said last is read too
        assert self._process.stderr is not None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._process.stderr.fileno(), 1 << 16):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        said = [line.decode(errors="replace") for line in lines]
        events = [found[1] if (found := _EVENT.fullmatch(line)) else line for line in said]
        self.messages += events
        return events

    def stop(self) -> None:
        """End the job, at once if it does not end politely. Afterwards nothing of it is left."""
        process = self._process
        if process is None:
            return
        for number, patience_s in ((signal.SIGINT, _POLITE_S), (signal.SIGINT, _FORCED_S), (signal.SIGKILL, None)):
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
        self.poll()
        if process.stderr is not None:
            process.stderr.close()
        self._process = None

    # ------------------------------------------------------------------ what it left so far
    def read_steps(self) -> list[Step]:
        """Steps done so far."""
        return read_steps(self.folder / "progress.jsonl")

    def read_recoveries(self) -> list[Recovery]:
        """Recoveries ended so far."""
        return read_recoveries(self.logs / "recovery.jsonl")

    def find_ranks(self) -> dict[int, RankProcess]:
        """The processes that are ranks now: children of ``flashrun`` that write to a rank's log."""
        found: dict[int, RankProcess] = {}
        if self._process is None:
            return found
        pattern = re.compile(re.escape(str(self.logs.resolve())) + r"/rank(\d+)/incarnation(\d+)\.log")
        for pid in _children_of(self._process.pid):
            with contextlib.suppress(OSError):
                place = pattern.fullmatch(os.readlink(f"/proc/{pid}/fd/1"))
                if place is not None:
                    rank, incarnation = int(place[1]), int(place[2])
                    if rank not in found or found[rank].incarnation < incarnation:
                        found[rank] = RankProcess(pid, incarnation)
        return found

    def strike(self, rank: int, number: signal.Signals) -> RankProcess | None:
        """Send a signal to the process that is ``rank`` now; ``None`` when there is none."""
        target = self.find_ranks().get(rank)
        if target is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(target.pid)
            try:
                if self.find_ranks().get(rank) == target:  # its number was not given to another process meanwhile
                    signal.pidfd_send_signal(descriptor, number)
                    return target
            finally:
                os.close(descriptor)
        return None


def _children_of(parent: int) -> list[int]:
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                stat = Path("/proc", name, "stat").read_bytes()
                if int(stat.rpartition(b")")[2].split()[1]) == parent:
                    found.append(int(name))
    return found


def describe_failure(job: Job, log_lines: int = 20) -> str:
    """What ``flashrun`` said, and the end of each rank's newest log."""
    parts = ["\n".join(job.messages)]
    for folder in sorted(job.logs.glob("rank*")):
        logs: Mapping[int, Path] = {
            int(path.stem.removeprefix("incarnation")): path for path in folder.glob("incarnation*.log")
        }
        if logs:
            newest = logs[max(logs)]
            tail = newest.read_text(errors="replace").splitlines()[-log_lines:]
            parts.append("\n".join([f"--- {newest}", *tail]))
    return "\n".join(part for part in parts if part)
