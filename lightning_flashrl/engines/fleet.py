"""Who starts the workers of a role, watches them and replaces them.

A fleet may be the successor of one whose process is gone: where a process above both keeps the workers running, they
look for the next fleet, and it takes them over as they are.

=====================  ================================================  ==============================
who                    waits for                                         unblocked by
=====================  ================================================  ==============================
the fleet's thread     a line of a worker, the end of a worker           the workers · the fleet's end
=====================  ================================================  ==============================
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.engines.drafts import MAX_BOOKS, Books, DraftsAddress
from lightning_flashrl.engines.process import END, END_TIMEOUT_S, Job, Surroundings, pack
from lightning_flashrl.engines.worker import WorkerStatistics, total
from lightning_flashrl.engines.worker_process import WorkerProcess, WorkerRecord, home_name
from lightning_flashrl.errors import ConfigurationError, WorkerFailedError
from lightning_flashrl.messaging.local import listen_locally, peer_pid

_LOOK_S = 1.0
_MAX_DEATHS = 10
"""So many processes of a worker may die, one after the other, before one has done a single row."""


@dataclass(frozen=True, slots=True)
class Team:
    """Workers of one role, not yet at work. It may be sent to another process, which need not have the user's code.

    Attributes:
        role: what they do.
        num_workers: how many there are.
        num_standby: how many more are made ready, to take the place of one that dies.
        payload: the job, packed for their processes.
    """

    role: str
    num_workers: int
    num_standby: int
    payload: bytes

    @classmethod
    def of(cls, job: Job, num_workers: int, num_standby: int = 0) -> Team:
        """Pack a job.

        Raises:
            ConfigurationError: no workers, or a reward or engine that cannot be sent to another process.
        """
        if num_workers < 1:
            raise ConfigurationError(f"{num_workers} {job.role} workers; use 1 or more")
        return cls(job.role, num_workers, num_standby, pack(job))


def summed(records: Sequence[WorkerRecord]) -> WorkerStatistics:
    """Return the sum of what workers have done; ``version`` is the oldest that one has now."""
    found = total([record.statistics for record in records])
    found.version = min((record.statistics.version for record in records if record.state == "serving"), default=0)
    return found


def idle_share(records: Sequence[WorkerRecord]) -> float:
    """Return the share of workers' time in which they had nothing to do; 0 before they serve."""
    alive_s = sum(record.alive_s for record in records)
    return sum(record.statistics.idle_s for record in records) / alive_s if alive_s else 0.0


@dataclass(frozen=True, slots=True)
class Succession:
    """How workers outlive the process of their fleet.

    Attributes:
        name: of the run, the same for all fleets that follow each other, and for no others.
        keeper_pid: the process that lets the next fleet begin. It becomes the parent of workers whose fleet is gone.
        before: workers of the fleet before this one.
    """

    name: str
    keeper_pid: int
    before: Sequence[WorkerRecord] = ()


class WorkerFleet:
    """Workers of one role on this host. A worker that dies or hangs is replaced; one that raises ends the run.

    Args:
        team: the workers.
        surroundings: what they find.
        log_dir: where their output goes, ``<role>-<rank>.log`` or ``<role>-standby.log``; ``None`` leaves it where this
            process's goes.
        num_workers: how many there are, if not as many as the team has.
        succession: how workers outlive this process; ``None`` if they end with it.

    Attributes:
        role: what they do.
        num_replaced: workers that died and were replaced.
        recovery_ms: from the end of each that died until its successor served.
        error: that a worker raised an error, or that too many died.
    """

    def __init__(
        self,
        team: Team,
        surroundings: Surroundings,
        log_dir: Path | None = None,
        num_workers: int | None = None,
        succession: Succession | None = None,
    ) -> None:
        self._team = team
        self._payload_fd = os.memfd_create(f"flashrl-{team.role}")
        os.write(self._payload_fd, team.payload)
        self._surroundings = msgspec.json.encode(surroundings) + b"\n"
        self.role = team.role
        self._home = "" if succession is None else home_name(succession.name, team.role)
        self._keeper_pid = 0 if succession is None else succession.keeper_pid
        self._log_dir = log_dir
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        self.num_replaced = 0
        self.recovery_ms: list[float] = []
        self._lost_s: dict[int, float] = {}  # ranks whose workers have died, until a successor serves
        self.error: WorkerFailedError | None = None
        self._fruitless: collections.Counter[int] = collections.Counter()  # rank → deaths in a row
        self._lock = threading.Lock()
        self._processes: dict[int, WorkerProcess] = {}  # by their numbers
        self._standby: list[WorkerProcess] = []  # of these
        self._num_standby_deaths = 0  # in a row
        self._left: collections.deque[DraftsAddress] = collections.deque()  # by workers that are gone
        self._past: list[WorkerRecord] = []
        self._selector = selectors.DefaultSelector()
        self._wake_fd, self._waker_fd = os.pipe()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._is_over = False
        self._ranks: set[int] = set()  # of workers that shall be there
        self._listener: socket.socket | None = None
        if succession is not None:
            self._listener = listen_locally(self._home)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._take_over([record for record in succession.before if record.role == self.role])
        self.scale(team.num_workers if num_workers is None else num_workers)
        self._thread = threading.Thread(target=self._watch, name="flashrl-fleet", daemon=True)
        self._thread.start()

    def records(self) -> list[WorkerRecord]:
        """Return what is known of each worker, also of those that are gone."""
        with self._lock:
            return [*self._past, *(process.record for process in self._processes.values())]

    def scale(self, num_workers: int) -> None:
        """Start or end workers until there are so many. One that ends gives back what it has.

        Raises:
            ConfigurationError: a number below 0.
        """
        if num_workers < 0:
            raise ConfigurationError(f"{num_workers} {self.role} workers; use 0 or more")
        with self._lock:
            if self._is_over:
                return
            leaving = {rank for rank in self._ranks if rank >= num_workers}
            self._ranks -= leaving
            for process in self._processes.values():
                if process.record.rank in leaving and not process.is_leaving:
                    process.end()
            for rank in sorted(set(range(num_workers)) - self._ranks):
                self._ranks.add(rank)
                self._start(rank)
        self._wake()

    @property
    def num_wanted(self) -> int:
        """How many workers there shall be."""
        return len(self._ranks)

    def _wake(self) -> None:
        os.write(self._waker_fd, b".")

    def close(self) -> None:
        """End all workers and wait for that."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            for process in self._processes.values():
                process.end()
        self._wake()
        self._thread.join(2 * END_TIMEOUT_S)
        for process in list(self._processes.values()):  # those that did not hear
            process.kill()
        self._thread.join()
        self._selector.close()
        if self._listener is not None:
            self._listener.close()
        for drafts in self._left:
            os.close(drafts.fd)
        os.close(self._payload_fd)
        os.close(self._wake_fd)
        os.close(self._waker_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the thread
    def _take_over(self, records: Sequence[WorkerRecord]) -> None:
        """Go on with workers of the fleet before; they will find this one."""
        for record in records:
            if record.state not in ("starting", "serving"):
                continue
            self._ranks.add(record.rank)
            process = WorkerProcess.find(record, self._home)
            if process is None:
                self._ranks.discard(record.rank)
                self._lose(record.rank)
            else:
                self._watch_for_end(process)

    def _start(self, rank: int) -> None:
        if self._standby:
            process = self._standby.pop(0)
            self._num_standby_deaths = 0
        else:
            process = self._spawn(rank, str(rank))
        process.record.rank, process.record.state = rank, "starting"
        process.send(self._surroundings + self._books())

    def _spawn(self, rank: int, name: str) -> WorkerProcess:
        path = None if self._log_dir is None else self._log_dir / f"{self.role}-{name}.log"
        process = WorkerProcess.start(self.role, rank, self._payload_fd, path, self._keeper_pid, self._home)
        self._watch_for_end(process)
        self._listen_to(process)
        return process

    def _watch_for_end(self, process: WorkerProcess) -> None:
        self._processes[process.record.pid] = process
        self._selector.register(process.pidfd, selectors.EVENT_READ, process)

    def _listen_to(self, process: WorkerProcess) -> None:
        assert process.sock is not None
        self._selector.register(process.sock, selectors.EVENT_READ, process)

    def _watch(self) -> None:
        while self._processes or not self._is_over:
            self._listen_for_room()
            for key, events in self._selector.select(_LOOK_S):
                process: WorkerProcess | None = key.data
                if key.fd == self._wake_fd:
                    os.read(self._wake_fd, 4096)
                elif process is None:
                    self._let_in()
                elif self._processes.get(process.record.pid) is not process:
                    continue  # its end came just before
                elif key.fd == process.pidfd:
                    self._ended(process)
                else:
                    if events & selectors.EVENT_WRITE:
                        with self._lock:
                            process.flush()
                    if events & selectors.EVENT_READ:
                        self._hear(process)
            self._look()

    def _listen_for_room(self) -> None:
        """Be woken when a worker takes in more of what it was told."""
        with self._lock:
            for key in list(self._selector.get_map().values()):
                if isinstance(process := key.data, WorkerProcess) and key.fileobj is process.sock:
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.has_unsent else 0)
                    if events != key.events:
                        self._selector.modify(process.sock, events, process)

    def _hear(self, process: WorkerProcess) -> None:
        had_drafts = process.drafts is not None
        if not process.read():
            assert process.sock is not None
            self._selector.unregister(process.sock)
        elif process.record.state == "serving" and process.record.rank in self._lost_s:
            self.recovery_ms.append(1e3 * (clock.now_s() - self._lost_s.pop(process.record.rank)))
        if process.drafts is not None and not had_drafts:
            with self._lock:
                books = self._books()
                for other in self._processes.values():
                    if other.drafts is not None and not other.is_leaving:
                        other.send(books)

    def _let_in(self) -> None:
        """A worker of an earlier fleet has found this one."""
        assert self._listener is not None
        sock, _ = self._listener.accept()
        with self._lock:
            process = self._processes.get(peer_pid(sock))
            if process is not None and process.sock is None:
                process.join(sock)
                process.send(self._surroundings)  # for one that has not begun yet: the weights are elsewhere now
                self._listen_to(process)
                return
        with contextlib.suppress(OSError):
            sock.sendall(END.encode())  # one that has been replaced already
        sock.close()

    def _look(self) -> None:
        """Kill workers that hang: they say each quarter of a second what they have done. See to those on standby."""
        with self._lock:
            all_serve = all(process.record.state != "starting" for process in self._processes.values())
            lacks = len(self._standby) < self._team.num_standby and self._num_standby_deaths <= _MAX_DEATHS
            if lacks and all_serve and not self._is_over:
                process = self._spawn(-1, "standby")
                process.record.state = "standby"
                self._standby.append(process)
            for process in self._processes.values():
                if not process.verdict and (verdict := process.hang()):
                    process.verdict = verdict
                    process.kill()

    def _ended(self, process: WorkerProcess) -> None:
        self._selector.unregister(process.pidfd)
        if process.sock is not None:
            with contextlib.suppress(KeyError):  # it may have closed it first
                self._selector.unregister(process.sock)
        process.bury()
        with self._lock:
            del self._processes[process.record.pid]
            self._past.append(process.record)
            if process.drafts is not None:
                self._left.append(process.drafts)
                if len(self._left) > MAX_BOOKS:
                    os.close(self._left.popleft().fd)
            if process in self._standby:
                self._standby.remove(process)
                self._num_standby_deaths += 1
                return
            if self._is_over or process.is_leaving:
                return
            if process.record.state == "ended":  # the stream has ended
                self._ranks.discard(process.record.rank)
                return
            name = f"{self.role} worker {process.record.rank}"
            if process.error:
                self.error = WorkerFailedError(name, f"raised:\n{process.error}")
                return
            rank = process.record.rank
            self._fruitless[rank] = 0 if process.record.statistics.num_completions else self._fruitless[rank] + 1
            if self._fruitless[rank] > _MAX_DEATHS:
                self.error = WorkerFailedError(
                    name,
                    f"{process.verdict}; {self._fruitless[rank]} of its processes in a row have died before they had "
                    "done a single row; look at their output, and at the memory of the machine",
                )
                return
            self._lose(rank)
            self._start(rank)

    def _books(self) -> bytes:
        there = [process.drafts for process in self._processes.values() if process.drafts is not None]
        return msgspec.json.encode(Books([*self._left, *there])) + b"\n"

    def _lose(self, rank: int) -> None:
        self.num_replaced += 1
        self._lost_s.setdefault(rank, clock.now_s())
