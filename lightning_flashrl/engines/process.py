"""Workers as processes of their own.

``python -m lightning_flashrl.engines.process`` reads what it is from a descriptor, makes itself ready, and works as
soon as its fleet (:mod:`lightning_flashrl.engines.fleet`) says where, over a socket. What it has done it tells there, a
line of JSON now and then. When the fleet's process is gone, the worker ends, or, where there will be another one, goes
on and looks for that.

=====================  ================================================  ==============================
who                    waits for                                         unblocked by
=====================  ================================================  ==============================
a worker's main thread where to serve                                    its fleet, or the end of that
a worker's listener    the order to end; the next fleet                  its fleet; the keeper's end
=====================  ================================================  ==============================
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import os
import pickle
import select
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cloudpickle
import msgspec

from lightning_flashrl import clock
from lightning_flashrl.engines.base import RolloutEngine
from lightning_flashrl.engines.drafts import Books, Draftable, Drafts
from lightning_flashrl.engines.worker import RolloutWorker, WorkerStatistics, total
from lightning_flashrl.errors import ConfigurationError, QueueUnavailableError
from lightning_flashrl.messaging.local import connect_locally
from lightning_flashrl.streaming import QueueVerbs, TransferQueueClient
from lightning_flashrl.tasks import RewardFn
from lightning_flashrl.weights import Swap, WeightReceiver, WeightsAddress, keep

Begin = Callable[..., None]
"""Takes any number of :class:`~lightning_flashrl.engines.worker.WorkerStatistics`, and drafts if there are any."""
POLICY, REFERENCE_POLICY = "policy", "reference"
"""Names under which a run's weights are published."""
END = "end\n"
"""What a worker is told when it should end."""
END_TIMEOUT_S = 5.0
"""A worker ends in this time."""
_REPORT_S = 0.25
_PATIENCE_S = 600.0
"""So long a worker looks for the next queue, if there will be one: whoever starts that may have to come back first."""
_REJOIN_LOOK_S = 0.05


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


class Surroundings(msgspec.Struct, frozen=True, tag=True):
    """What a run's workers find.

    Attributes:
        endpoint: of the queue.
        secret: of the queue.
        weights: where weights are, by the name of the policy.
    """

    endpoint: str
    secret: str
    weights: dict[str, WeightsAddress]


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
        with contextlib.ExitStack() as stack:
            receiver = stack.enter_context(WeightReceiver(weights[POLICY], self.swap))
            drafts = None
            if isinstance(engine, Draftable):
                drafts = Drafts(engine.sampling, self.num_places, may_mix=self.swap is Swap.IN_FLIGHT)
                stack.callback(drafts.close)
            receiver.load(engine)
            worker = RolloutWorker(
                queue, engine, self.reward, self.decode, receiver=receiver, num_places=self.num_places, drafts=drafts
            )
            begin(worker.statistics, drafts=drafts)
            worker.run(stop)


def pack(job: Job) -> bytes:
    """Make of a job what a worker's process reads: the search path first, so that what is pickled by name is found.

    Raises:
        ConfigurationError: a reward or engine that cannot be sent to another process.
    """
    try:
        body = cloudpickle.dumps(job)
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ConfigurationError(
            f"the reward or the engine of a {job.role} worker cannot be sent to another process ({error}); give "
            "functions and classes that hold no open files, locks or processes"
        ) from error
    return msgspec.msgpack.encode(([path or os.getcwd() for path in sys.path], body))


# --------------------------------------------------------------------------- the worker's process
class _FleetLink:
    """The worker's way to its fleet, and to the next one when that is gone.

    Args:
        sock: the socket it was started with.
        home: name of the local socket of the next fleet; empty if there will be none.
        keeper_pid: the process that lets the next fleet begin; without it there will be none.
    """

    def __init__(self, sock: socket.socket, home: str, keeper_pid: int) -> None:
        self._socket = sock
        self._lines = sock.makefile("r")
        self._home = home
        self._keeper_pid = keeper_pid
        self._lock = threading.Lock()  # for the socket: nobody writes while another one takes its place
        self._drafts: Drafts | None = None
        self._books = Books([])
        self._place: Surroundings | None = None
        self._is_told = threading.Condition(self._lock)

    def tell(self, **told: Any) -> None:
        """Tell the fleet something; it is lost when that is gone."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(told).encode() + b"\n")

    def share(self, drafts: Drafts) -> None:
        """Let the fleet hold a worker's drafts, and the worker look into those of others."""
        with self._lock:
            self._drafts = drafts
            self._send_drafts()
            drafts.learn(self._books.addresses)

    def _send_drafts(self) -> None:
        if self._drafts is not None:
            address = self._drafts.address
            line = json.dumps({"drafts": [address.num_places, address.max_tokens, address.mark.hex()]})
            with contextlib.suppress(OSError):
                socket.send_fds(self._socket, [line.encode() + b"\n"], [address.fd])

    def learn(self, line: str) -> None:
        """Take in what the fleet has told: where to serve, or where the drafts of workers are."""
        told = msgspec.json.decode(line, type=Surroundings | Books)
        with self._lock:
            if isinstance(told, Surroundings):
                self._place = told
                self._is_told.notify_all()
                return
            self._books = told
            if self._drafts is not None:  # else it has not begun yet
                self._drafts.learn(told.addresses)

    def settle(self) -> Surroundings:
        """Return where to serve, with weights that this process itself keeps.

        Raises:
            ConfigurationError: they cannot be mapped from here.
        """
        while True:
            place = self._place
            assert place is not None  # whoever is told nothing does not begin
            try:
                kept = {name: keep(address) for name, address in place.weights.items()}
                return msgspec.structs.replace(place, weights=kept)
            except ConfigurationError as error:
                is_gone = isinstance(error.__cause__, FileNotFoundError)
                if not (is_gone and self._home and self._await_other(place)):
                    raise

    def _await_other(self, place: Surroundings) -> bool:
        """The fleet's process was killed, and the weights with it: the next one says where they are."""
        with self._is_told:
            return self._is_told.wait_for(lambda: self._place != place, _PATIENCE_S)

    def hear(self) -> str:
        """Wait for a line; empty when the fleet is gone."""
        with contextlib.suppress(ConnectionResetError):
            line = self._lines.readline()
            return line if line.endswith("\n") else ""  # it died while it said that
        return ""

    def await_end(self) -> bool:
        """Return when this worker should end, and whether somebody still waits for what it has."""
        while (line := self.hear()) != END:
            if line:
                self.learn(line)
            elif not self._rejoin():
                return False
        return True

    def _rejoin(self) -> bool:
        """Wait for the next fleet; return whether it is there."""
        if not self._home:
            return False
        with contextlib.suppress(ProcessLookupError):
            keeper = os.pidfd_open(self._keeper_pid)
            poller = select.poll()
            poller.register(keeper, select.POLLIN)
            try:
                while not poller.poll(1000 * _REJOIN_LOOK_S):
                    if self._connect():
                        return True
            finally:
                os.close(keeper)
        return False

    def _connect(self) -> bool:
        found = connect_locally(self._home)
        if found is None:
            return False
        with self._lock:
            self._lines.close()
            self._socket.close()
            self._socket, self._lines = found, found.makefile("r")
            self._send_drafts()
        return True


class _Reporter:
    """Tells now and then what the worker has done."""

    def __init__(self, link: _FleetLink, statistics: Sequence[WorkerStatistics]) -> None:
        self._link = link
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
        self._link.tell(statistics=dataclasses.asdict(total(self._statistics)), alive_s=alive_s)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self.tell()


def _listen(link: _FleetLink, stop: threading.Event) -> None:
    if link.await_end():
        stop.set()
        clock.sleep(END_TIMEOUT_S)
    os._exit(1)  # whatever it is doing


def _serve(
    job: Job, prepared: Any, place: Surroundings, link: _FleetLink, reconnect_s: float, stop: threading.Event
) -> None:
    reporters: list[_Reporter] = []
    with TransferQueueClient(
        place.endpoint, place.secret, reconnect_timeout_s=reconnect_s, connect_timeout_s=reconnect_s
    ) as queue:
        try:

            def begin(*statistics: WorkerStatistics, drafts: Drafts | None = None) -> None:
                if drafts is not None:
                    link.share(drafts)
                reporters.append(_Reporter(link, statistics))

            job.run(prepared, queue, place.weights, begin, stop)
        finally:
            for reporter in reporters:
                reporter.stop()


def main() -> None:
    """Be a worker until the stream ends, or somebody wants it to."""
    payload_fd, fleet_fd, keeper_pid = map(int, sys.argv[1:4])
    home = sys.argv[4]
    link = _FleetLink(socket.socket(fileno=fleet_fd), home, keeper_pid)
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
        told = link.hear()  # comes later to a process on standby
        if told in ("", END):
            os._exit(0)
        link.learn(told)
        threading.Thread(target=_listen, args=(link, stop), daemon=True).start()
        _serve(job, prepared, link.settle(), link, _PATIENCE_S if home else 0.0, stop)
    except QueueUnavailableError:
        if not stop.is_set():
            if not home:  # else it is no fault of its own: another one comes in its place
                link.tell(error=traceback.format_exc())
            sys.exit(1)
    except (Exception, SystemExit):  # noqa: BLE001 - told to the fleet; also a user's exit()
        link.tell(error=traceback.format_exc())
        sys.exit(1)
    link.tell(is_over=True)
    # What a user's engine has left running does not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
