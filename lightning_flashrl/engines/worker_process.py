"""A worker's process, seen from the fleet that starts it or has found it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lightning_flashrl import clock
from lightning_flashrl.engines.drafts import DraftsAddress
from lightning_flashrl.engines.process import END, Job
from lightning_flashrl.engines.worker import WorkerStatistics
from lightning_flashrl.procfs import all_processes, end_process, is_stopped, read_command_line

_MODULE = Job.__module__
STOPPED_TIMEOUT_S = 2.0
"""A worker that a signal has stopped for so long hangs, whatever it does."""
_HANG_TIMEOUT_S = 30.0
"""So does one that serves and is silent for so long."""


def home_name(run: str, role: str = "") -> str:
    """Return the name of the local socket at which workers of a run find their next fleet, or how these names begin."""
    return f"flashrl-{run}-{role}"


def end_workers(run: str) -> None:
    """Kill the workers of a run that has no fleets any more."""

    def is_one(pid: int) -> bool:
        words = read_command_line(pid)
        return _MODULE in words and any(word.startswith(home_name(run)) for word in words)

    for pid in all_processes():
        with contextlib.suppress(OSError):
            if is_one(pid):
                end_process(pid, is_one)


@dataclass(slots=True)
class WorkerRecord:
    """One worker's process as the job's books have it.

    Attributes:
        role: what it does.
        rank: number of the worker among those of its role; −1 on standby.
        pid: its process.
        since_s: when it was started, on the wall clock.
        state: ``"standby"``, ``"starting"``, ``"serving"``, ``"ended"`` or ``"lost"``.
        statistics: what it has told last.
        alive_s: how long it has served when it told that.
    """

    role: str
    rank: int
    pid: int
    since_s: float
    state: str = "starting"
    statistics: WorkerStatistics = field(default_factory=WorkerStatistics)
    alive_s: float = 0.0


class WorkerProcess:
    """A worker's process, seen from its fleet.

    Args:
        record: what is known of it.
        pidfd: it.
        child: it, if this process started it.
        sock: the way to it; one of an earlier fleet has yet to come.
    """

    def __init__(
        self,
        record: WorkerRecord,
        pidfd: int,
        child: subprocess.Popen[bytes] | None = None,
        sock: socket.socket | None = None,
    ) -> None:
        self.record = record
        self.pidfd = pidfd
        self.sock = sock
        self.heard_s = clock.now_s()
        self.verdict = ""
        self.stopped_s: float | None = None
        self.is_leaving = False
        self.is_over = False
        self.error = ""
        self.drafts: DraftsAddress | None = None
        self._child = child
        self._unread = b""
        self._unsent = b""

    @classmethod
    def start(
        cls, role: str, rank: int, payload_fd: int, log_path: Path | None, keeper_pid: int, home: str
    ) -> WorkerProcess:
        """Start a worker."""
        ours, its = socket.socketpair()
        log: IO[bytes] | None = None if log_path is None else log_path.open("ab")
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(payload_fd), str(its.fileno()), str(keeper_pid), home],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[payload_fd, its.fileno()],
                start_new_session=True,  # Ctrl-C is for who started it
            )
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
            if log is not None:
                log.close()
        ours.setblocking(False)
        return cls(WorkerRecord(role, rank, child.pid, clock.wall_s()), os.pidfd_open(child.pid), child, ours)

    @classmethod
    def find(cls, record: WorkerRecord, home: str) -> WorkerProcess | None:
        """Return a worker of an earlier fleet; ``None`` if it is gone."""
        try:
            pidfd = os.pidfd_open(record.pid)
        except ProcessLookupError:
            return None
        with contextlib.suppress(OSError):  # it is not the process that has had its number since
            if {_MODULE, home}.issubset(read_command_line(record.pid)):
                return cls(record, pidfd)
        os.close(pidfd)
        return None

    def send(self, line: bytes) -> None:
        """Tell it something; what does not fit into the socket now goes with :meth:`flush`."""
        if self.sock is not None:
            self._unsent += line
            self.flush()

    @property
    def has_unsent(self) -> bool:
        """Whether it does not know yet all that it was told."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Go on telling."""
        try:
            while self._unsent and self.sock is not None:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:  # it does not listen yet
            pass
        except OSError:  # it has died, which is seen elsewhere
            self._unsent = b""

    def read(self) -> bool:
        """Take in what it has told; return whether there may be more."""
        if self.sock is None:
            return False
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 65536, 1)
        except OSError:  # nothing now, or for ever
            return False
        self.heard_s = clock.now_s()
        for fd in fds:  # received descriptors are inheritable, unlike others
            os.set_inheritable(fd, False)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            self.error = told.get("error", "")
            self.is_over = told.get("is_over", False)
            if "drafts" in told and fds:
                num_places, max_tokens, mark = told["drafts"]
                self.drafts = DraftsAddress(os.getpid(), fds.pop(), num_places, max_tokens, bytes.fromhex(mark))
            if "statistics" in told:
                self.record.statistics = WorkerStatistics(**told["statistics"])
                self.record.alive_s = told["alive_s"]
                self.record.state = "serving"
        for fd in fds:
            os.close(fd)
        return bool(data)

    def join(self, sock: socket.socket) -> None:
        """It has found this fleet."""
        sock.setblocking(False)
        self.sock, self._unsent = sock, b""
        self.heard_s = clock.now_s()
        if self.is_leaving:
            self.send(END.encode())

    def end(self) -> None:
        """Tell it to end."""
        self.is_leaving = True
        self.send(END.encode())

    def hang(self) -> str:
        """How it hangs; empty if it does not."""
        now_s = clock.now_s()
        silent_s = now_s - self.heard_s
        if self.record.state == "serving" and silent_s > _HANG_TIMEOUT_S:
            return f"was silent for {silent_s:.0f} s and was killed"
        if not is_stopped(self.record.pid):
            self.stopped_s = None
            return ""
        self.stopped_s = now_s if self.stopped_s is None else self.stopped_s
        if now_s - self.stopped_s > STOPPED_TIMEOUT_S:
            return f"was stopped for {now_s - self.stopped_s:.0f} s and was killed"
        return ""

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> None:
        """Close the books of a process that has ended."""
        while self.read():
            pass
        status = 0 if self._child is None else self._child.wait()
        self.record.state = "ended" if self.is_over and status == 0 else "lost"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"left with status {status}" if self._child is not None else "died"
        self.verdict = self.verdict or how
        os.close(self.pidfd)
        if self.sock is not None:
            self.sock.close()
