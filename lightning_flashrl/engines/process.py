"""Workers as processes of their own, and who watches them.

``python -m lightning_flashrl.engines.process`` reads what it is from a descriptor, makes itself ready, works as soon as
standard input says where, and ends when that does: with whoever started it. What it has done it tells over a pipe, a
line of JSON now and then.

=====================  ================================================  ==========================
who                    waits for                                         unblocked by
=====================  ================================================  ==========================
the fleet's thread     a line of a worker, the end of a worker           the workers · the fleet's end
a worker's watcher     the end of standard input                         whoever started the worker
=====================  ================================================  ==========================
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Self

import cloudpickle
import msgspec

from lightning_flashrl import clock
from lightning_flashrl.engines.base import RolloutEngine
from lightning_flashrl.engines.worker import RolloutWorker, WorkerStatistics, total
from lightning_flashrl.errors import ConfigurationError, QueueUnavailableError, WorkerFailedError
from lightning_flashrl.streaming import QueueVerbs, TransferQueueClient
from lightning_flashrl.tasks import RewardFn
from lightning_flashrl.weights import Swap, WeightReceiver, WeightsAddress

Begin = Callable[..., None]
"""Takes any number of :class:`~lightning_flashrl.engines.worker.WorkerStatistics`."""
POLICY, REFERENCE_POLICY = "policy", "reference"
"""Names under which a run's weights are published."""
_REPORT_S = 0.25
_END_TIMEOUT_S = 5.0
_LOOK_S = 1.0
_HANG_TIMEOUT_S = 30.0
"""A worker that serves and is silent for so long hangs, or was stopped."""
_MAX_DEATHS = 10
"""So many processes of a worker may die, one after the other, before one has done a single row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(abc.ABC):
    """What a worker's process does, and what it must know for that. It is sent there.

    Attributes:
        role: what such workers are called in logs and errors.
        num_threads: of torch.
    """

    role: ClassVar[str]
    num_threads: int = 1

    def prepare(self) -> Any:
        """Do what takes long and needs neither queue nor weights; also in a process that waits on standby.

        Returns:
            What :meth:`run` gets.
        """
        return None

    @abc.abstractmethod
    def run(
        self,
        prepared: Any,
        queue: QueueVerbs,
        weights: Mapping[str, WeightsAddress],
        begin: Begin,
        stop: threading.Event,
    ) -> None:
        """Work, in the worker's process.

        Args:
            prepared: what :meth:`prepare` returned.
            queue: rows come from there and go back there.
            weights: where the run's weights are, by the name of the policy.
            begin: to be called with its statistics when it is ready to serve; there may be several, of its threads.
            stop: set when the worker should end; it gives back what it has then.
        """


class Surroundings(msgspec.Struct, frozen=True):
    """What a run's workers find.

    Attributes:
        endpoint: of the queue.
        secret: of the queue.
        weights: where weights are, by the name of the policy.
    """

    endpoint: str
    secret: str
    weights: dict[str, WeightsAddress]


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
        return cls(job.role, num_workers, num_standby, _pack(job))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(Job):
    """What a rollout worker's process must know.

    Attributes:
        swap: when it takes new weights.
        make_engine: makes the engine, in the worker's process.
        reward: scores; ``None`` if another task does.
        decode: turns tokens into text.
        num_places: prompts that are under way together.
    """

    role: ClassVar[str] = "rollout"
    swap: Swap
    make_engine: Callable[[], RolloutEngine]
    reward: RewardFn | None
    decode: Callable[[list[int]], str]
    num_places: int

    def prepare(self) -> RolloutEngine:
        """Make the engine."""
        return self.make_engine()

    def run(
        self,
        prepared: RolloutEngine,
        queue: QueueVerbs,
        weights: Mapping[str, WeightsAddress],
        begin: Begin,
        stop: threading.Event,
    ) -> None:
        """Generate until the stream ends."""
        engine = prepared
        with WeightReceiver(weights[POLICY], self.swap) as receiver:
            receiver.load(engine)
            worker = RolloutWorker(
                queue, engine, self.reward, self.decode, receiver=receiver, num_places=self.num_places
            )
            begin(worker.statistics)
            worker.run(stop)


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


def summed(records: Sequence[WorkerRecord]) -> WorkerStatistics:
    """Return the sum of what workers have done; ``version`` is the oldest that one has now."""
    found = total([record.statistics for record in records])
    found.version = min((record.statistics.version for record in records if record.state == "serving"), default=0)
    return found


def idle_share(records: Sequence[WorkerRecord]) -> float:
    """Return the share of workers' time in which they had nothing to do; 0 before they serve."""
    alive_s = sum(record.alive_s for record in records)
    return sum(record.statistics.idle_s for record in records) / alive_s if alive_s else 0.0


class _Process:
    """A worker's process, seen from who started it."""

    def __init__(self, role: str, rank: int, payload_fd: int, log_path: Path | None) -> None:
        report_fd, write_fd = os.pipe()
        log: IO[bytes] | None = None if log_path is None else log_path.open("ab")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(payload_fd), str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[payload_fd, write_fd],
                start_new_session=True,  # Ctrl-C is for who started it
            )
        except BaseException:
            os.close(report_fd)
            raise
        finally:
            os.close(write_fd)
            if log is not None:
                log.close()
        self.record = WorkerRecord(role, rank, self._process.pid, clock.wall_s())
        self.report_fd = report_fd
        self.heard_s = clock.now_s()
        self.verdict = ""
        self.is_leaving = False
        self.error = ""
        self._unread = b""

    def tell(self, surroundings: bytes) -> None:
        """Let it serve."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: seen at the end of its reports
            self._process.stdin.write(surroundings)
            self._process.stdin.flush()

    def read(self) -> bool:
        """Take in what it has told; return whether there may be more."""
        data = os.read(self.report_fd, 65536)
        self.heard_s = clock.now_s()
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            self.error = told.get("error", "")
            if "statistics" in told:
                self.record.statistics = WorkerStatistics(**told["statistics"])
                self.record.alive_s = told["alive_s"]
                self.record.state = "serving"
        return bool(data)

    def wait(self) -> int:
        """Wait for the end of a process that is ending."""
        os.close(self.report_fd)
        self._close_input()
        try:
            status = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self.record.state = "ended" if status == 0 else "lost"
        return status

    def end(self) -> None:
        """Tell it to end."""
        self.is_leaving = True
        self._close_input()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def _close_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


class WorkerFleet:
    """Workers of one role on this host. A worker that dies or hangs is replaced; one that raises ends the run.

    Args:
        team: the workers.
        surroundings: what they find.
        log_dir: where their output goes, ``<role>-<rank>.log`` or ``<role>-standby.log``; ``None`` leaves it where this
            process's goes.
        num_workers: how many there are, if not as many as the team has.

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
    ) -> None:
        self._team = team
        self._payload_fd = os.memfd_create(f"flashrl-{team.role}")
        os.write(self._payload_fd, team.payload)
        self._surroundings = msgspec.json.encode(surroundings) + b"\n"
        self.role = team.role
        self._log_dir = log_dir
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        self.num_replaced = 0
        self.recovery_ms: list[float] = []
        self._lost_s: dict[int, float] = {}  # ranks whose workers have died, until a successor serves
        self.error: WorkerFailedError | None = None
        self._fruitless: collections.Counter[int] = collections.Counter()  # rank → deaths in a row
        self._lock = threading.Lock()
        self._processes: dict[int, _Process] = {}
        self._standby: list[_Process] = []  # of these
        self._num_standby_deaths = 0
        self._past: list[WorkerRecord] = []
        self._selector = selectors.DefaultSelector()
        self._wake_fd, self._waker_fd = os.pipe()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._is_over = False
        self._ranks: set[int] = set()  # of workers that shall be there
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
        self._thread.join(2 * _END_TIMEOUT_S)
        for process in self._processes.values():  # those that did not hear
            process.kill()
        self._thread.join()
        self._selector.close()
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
    def _start(self, rank: int) -> None:
        process = self._standby.pop(0) if self._standby else self._spawn(rank, str(rank))
        process.record.rank, process.record.state = rank, "starting"
        process.tell(self._surroundings)

    def _spawn(self, rank: int, name: str) -> _Process:
        path = None if self._log_dir is None else self._log_dir / f"{self.role}-{name}.log"
        process = _Process(self.role, rank, self._payload_fd, path)
        self._processes[process.report_fd] = process
        self._selector.register(process.report_fd, selectors.EVENT_READ)
        return process

    def _watch(self) -> None:
        while self._processes or not self._is_over:
            for key, _ in self._selector.select(_LOOK_S):
                if key.fd == self._wake_fd:
                    os.read(self._wake_fd, 4096)
                    continue
                process = self._processes[key.fd]
                if not process.read():
                    self._selector.unregister(key.fd)
                    self._ended(process)
                elif process.record.state == "serving" and process.record.rank in self._lost_s:
                    self.recovery_ms.append(1e3 * (clock.now_s() - self._lost_s.pop(process.record.rank)))
            self._look()

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
                silent_s = clock.now_s() - process.heard_s
                if process.record.state == "serving" and silent_s > _HANG_TIMEOUT_S and not process.verdict:
                    process.verdict = f"was silent for {silent_s:.0f} s and was killed"
                    process.kill()

    def _ended(self, process: _Process) -> None:
        status = process.wait()
        with self._lock:
            del self._processes[process.report_fd]
            self._past.append(process.record)
            if process in self._standby:
                self._standby.remove(process)
                self._num_standby_deaths += 1
                return
            if self._is_over or process.is_leaving:
                return
            if status == 0:  # the stream has ended
                self._ranks.discard(process.record.rank)
                return
            name = f"{self.role} worker {process.record.rank}"
            if process.error:
                self.error = WorkerFailedError(name, f"raised:\n{process.error}")
                return
            how = process.verdict or (
                f"was killed by {signal.Signals(-status).name}" if status < 0 else f"left with status {status}"
            )
            rank = process.record.rank
            self._fruitless[rank] = 0 if process.record.statistics.num_completions else self._fruitless[rank] + 1
            if self._fruitless[rank] > _MAX_DEATHS:
                self.error = WorkerFailedError(
                    name,
                    f"{how}; {self._fruitless[rank]} of its processes in a row have died before they had done a single "
                    "row; look at their output, and at the memory of the machine",
                )
                return
            self.num_replaced += 1
            self._lost_s.setdefault(rank, clock.now_s())
            self._start(rank)


def _pack(job: Job) -> bytes:
    """Search path first, so that what is pickled by name is found."""
    try:
        body = cloudpickle.dumps(job)
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ConfigurationError(
            f"the reward or the engine of a {job.role} worker cannot be sent to another process ({error}); give "
            "functions and classes that hold no open files, locks or processes"
        ) from error
    return msgspec.msgpack.encode(([path or os.getcwd() for path in sys.path], body))


# --------------------------------------------------------------------------- the worker's process
class _Reporter:
    """Tells now and then what the worker has done."""

    def __init__(self, fd: int, statistics: Sequence[WorkerStatistics]) -> None:
        self._fd = fd
        self._statistics = statistics
        self._begin_s = clock.now_s()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flashrl-reporter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.tell()
        while not self._over.wait(_REPORT_S):
            self.tell()

    def tell(self) -> None:
        alive_s = (clock.now_s() - self._begin_s) * len(self._statistics)
        _tell(self._fd, {"statistics": dataclasses.asdict(total(self._statistics)), "alive_s": alive_s})

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self.tell()


def _tell(fd: int, told: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # who started it is gone
        os.write(fd, json.dumps(told).encode() + b"\n")


def _watch_input(stop: threading.Event) -> None:
    """Standard input ends with whoever started this process: stop, and soon whatever it is doing."""
    while os.read(0, 4096):
        pass
    stop.set()
    clock.sleep(_END_TIMEOUT_S)
    os._exit(1)


def _serve(job: Job, prepared: Any, place: Surroundings, report_fd: int, stop: threading.Event) -> None:
    reporters: list[_Reporter] = []
    with TransferQueueClient(place.endpoint, place.secret, reconnect_timeout_s=0) as queue:  # it ends with its host
        try:
            begin = lambda *statistics: reporters.append(_Reporter(report_fd, statistics))  # noqa: E731
            job.run(prepared, queue, place.weights, begin, stop)
        finally:
            for reporter in reporters:
                reporter.stop()


def main() -> None:
    """Be a worker until the stream or standard input ends."""
    payload_fd, report_fd = map(int, sys.argv[1:])
    paths, body = msgspec.msgpack.decode(
        os.pread(payload_fd, os.fstat(payload_fd).st_size, 0), type=tuple[list[str], bytes]
    )
    os.close(payload_fd)
    sys.path[:] = paths
    stop = threading.Event()
    try:
        job = pickle.loads(body)
        import torch

        torch.set_num_threads(job.num_threads)
        prepared = job.prepare()
        told = sys.stdin.buffer.readline()  # comes later to a process on standby
        if not told:
            os._exit(0)
        place = msgspec.json.decode(told, type=Surroundings)
        threading.Thread(target=_watch_input, args=(stop,), daemon=True).start()
        _serve(job, prepared, place, report_fd, stop)
    except QueueUnavailableError:
        if not stop.is_set():
            _tell(report_fd, {"error": traceback.format_exc()})
            sys.exit(1)
    except (Exception, SystemExit):  # noqa: BLE001 - told to whoever started this process; also a user's exit()
        _tell(report_fd, {"error": traceback.format_exc()})
        sys.exit(1)
    # What a user's engine has left running does not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
