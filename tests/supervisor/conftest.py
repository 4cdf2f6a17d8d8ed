"""Real jobs under ``flashrun``, and a look at what they leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]
_CACHE_OF_TORCH = "torchinductor_"
"""torch makes this folder in every program that imports its compiler."""
_FLASHRUN = ("-m", "lightning_flashrl.cli.flashrun")
_MARKER = "FLASHRL_TEST_JOB"


@dataclass
class Job:
    """One ``flashrun`` process and its output."""

    process: subprocess.Popen[bytes]
    marker: str
    folder: Path
    tmp: Path = field(init=False)

    def __post_init__(self) -> None:
        self.tmp = self.folder / "tmp"

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def wait(self, timeout_s: float = 40.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end\n{self.out}\n{self.err}")

    def until(self, pattern: str, *, count: int = 1, timeout_s: float = 20.0) -> list[str]:
        deadline = time.monotonic() + timeout_s
        while len(found := re.findall(pattern, self.out + self.err)) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"{pattern!r} did not appear {count} time(s)\n{self.out}\n{self.err}")
            time.sleep(0.01)
        return found

    def pids(self) -> dict[int, str]:
        """Living processes of the job, with their command lines."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes()
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"{_MARKER}={self.marker}".encode() in environ and state != b"Z":
                found[int(entry.name)] = command
        return found

    def finals(self) -> dict[int, int]:
        return {int(rank): int(total) for rank, total in re.findall(r"final (\d+) (\d+)", self.out)}

    def leftovers(self) -> list[str]:
        deadline = time.monotonic() + 3.0
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [f"process {pid}: {command}" for pid, command in left.items()] + [
            f"file {path}" for path in self.tmp.iterdir() if not path.name.startswith(_CACHE_OF_TORCH)
        ]


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``flashrun`` with some arguments; whatever is left of it at the end fails the test."""
    jobs: list[Job] = []

    def start_job(
        *arguments: object, cwd: Path = ROOT, launcher: tuple[object, ...] = _FLASHRUN, **environ: str
    ) -> Job:
        marker = uuid.uuid4().hex
        folder = tmp_path / f"job{len(jobs)}"
        (folder / "tmp").mkdir(parents=True)
        command = [sys.executable, *map(str, launcher), *map(str, arguments)]
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=os.environ | {_MARKER: marker, "TMPDIR": str(folder / "tmp")} | environ,
            )
        jobs.append(Job(process, marker, folder))
        return jobs[-1]

    yield start_job
    problems: list[str] = []
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()
        left = job.leftovers()
        problems += left
        for pid in job.pids():
            os.kill(pid, signal.SIGKILL)
    assert problems == []


@pytest.fixture
def expected_total() -> Callable[[int, int], int]:
    """What ``flash_rank.py`` computes."""

    def total(num_ranks: int, num_steps: int) -> int:
        return sum((rank + 1) * (step + 1) for rank in range(num_ranks) for step in range(num_steps))

    return total
