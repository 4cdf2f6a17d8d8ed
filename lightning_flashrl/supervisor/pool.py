"""The agent's side of the standby: keeps it alive, and keeps processes ready that can become a rank at once.

The standby outlives its agent: the root holds it, and the agent's successor goes on with it. The processes that waited
see the end of the agent, and end; the successor has new ones forked.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.packets import PacketChannel, make_pair
from lightning_flashrl.supervisor import protocol, standby
from lightning_flashrl.supervisor.process import SHORTAGES, Process
from lightning_flashrl.supervisor.root_link import Holding, RootLink

_REFILL_DELAY_S = 1.0
"""A new process is forked when the recovery that took the last one is probably over."""
_FIRST_FILL_DELAY_S = 0.1
_NAME = "standby"
_GROWTH = 1.1
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


@dataclass(slots=True, eq=False)
class Candidate:
    """A process that waits to become a rank, or is about to exist.

    Attributes:
        channel: to the process; what is sent is there when it begins to listen.
        process: ``None`` until it said that it is ready.
        warm_bytes: memory that it was told to touch.
    """

    channel: PacketChannel
    process: Process | None = None
    warm_bytes: int = 0


class StandbyPool:
    """Processes on standby.

    Args:
        loop: calls this object back.
        link: to the root, which holds the standby.
        size: how many processes wait; 0 turns standby off.
        modules: what the standby imports.
        core_modules: what it imports when the former did not go well.
        path_entry: first entry of the program's ``sys.path``.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        loop: EventLoop,
        link: RootLink,
        size: int,
        modules: tuple[str, ...],
        core_modules: tuple[str, ...],
        path_entry: str,
        tell: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._link = link
        self._number = -1
        self._size = size
        self._attempts = [modules, core_modules] if modules != core_modules else [modules]
        self._path_entry = path_entry
        self._tell = tell
        self._environ: dict[str, str] = {}
        self._process: Process | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self._is_closed = False
        self._waiting: list[Candidate] = []
        self._when_settled: list[Callable[[], None]] = []

    @property
    def pids(self) -> set[int]:
        """Processes that belong to this pool."""
        found = {c.process.pid for c in self._waiting if c.process is not None}
        return found if self._process is None else found | {self._process.pid}

    @property
    def is_expecting(self) -> bool:
        """Whether a forked process has not said its number yet."""
        return any(c.process is None for c in self._waiting)

    # ------------------------------------------------------------------ the standby
    def start(self, environ: Mapping[str, str], when_settled: Callable[[], None]) -> None:
        """Start the standby; ``when_settled`` is called when it can fork, or when it is clear that it cannot."""
        self._environ = dict(environ)
        if self._is_ready or self._size == 0 or not self._attempts:
            when_settled()
            return
        self._when_settled.append(when_settled)
        holding = self._link.holdings.pop(_NAME, None)
        if self._process is None and (holding is None or not self._take_over(holding)):
            self._start_process()

    def _take_over(self, holding: Holding) -> bool:
        self._number = holding.number
        if holding.status is not None:
            return False
        self._watch(self._link.process(holding.pid), socket.socket(fileno=holding.fd))
        assert self._control is not None
        with contextlib.suppress(OSError):  # it has just died
            self._control.send(standby.ASK)
        if holding.note == standby.READY:
            self._on_ready()
        return True

    def _start_process(self) -> None:
        environ = self._environ | _ONE_THREAD
        environ |= {
            "FLASHRL_ROOT_PID": str(self._link.root_pid),
            "FLASHRL_PRELOAD": msgspec.json.encode(list(self._attempts[0])).decode(),
            "FLASHRL_PATH_ENTRY": self._path_entry,
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        self._number += 1
        command = [sys.executable, "-m", standby.__name__]
        try:
            process, control = self._link.spawn(_NAME, self._number, command, environ, "FLASHRL_STANDBY_FD")
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            self._settle()  # ranks are started cold meanwhile
            self._loop.call_later(_REFILL_DELAY_S, self._start_again)
        else:
            self._watch(process, control)

    def _start_again(self) -> None:
        if self._process is None and not self._is_closed:
            self._start_process()

    def _watch(self, process: Process, control: socket.socket) -> None:
        control.setblocking(False)
        self._process, self._control = process, control
        self._loop.add_reader(control.fileno(), self._on_control)
        self._loop.add_reader(process.pidfd, self._on_exit)

    def _on_ready(self) -> None:
        if not self._is_ready:
            self._is_ready = True
            self._settle()
            self._loop.call_later(_FIRST_FILL_DELAY_S, self._refill)

    def _on_control(self) -> None:
        assert self._control is not None
        try:
            message = self._control.recv(16)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message == standby.READY:
            self._link.hold(_NAME, self._number, note=standby.READY)
            self._on_ready()
        else:
            self._loop.remove(self._control.fileno())

    def _on_exit(self) -> None:
        assert self._process is not None
        assert self._control is not None
        pidfd = self._process.pidfd
        status = self._process.poll()
        if status is None:
            return
        self._loop.remove(pidfd)
        self._loop.remove(self._control.fileno())
        self._control.close()
        self._process = None
        was_ready, self._is_ready = self._is_ready, False
        if self._is_closed:
            return
        if was_ready:
            self._tell(f"the standby process ended ({status}); a new one is started, ranks are not affected")
            self._start_process()
        elif len(self._attempts) > 1:
            del self._attempts[0]
            self._start_process()
        else:
            self._tell(f"the standby process cannot be used ({status}); ranks are started cold")
            self._attempts = []
            self._settle()

    def end_if_stopped(self) -> None:
        """Kill a standby that a signal has stopped: ranks that it was to fork are then started cold."""
        if self._process is not None and self._process.is_stopped():
            self._process.send_signal(signal.SIGKILL)

    def _settle(self) -> None:
        callbacks, self._when_settled = self._when_settled, []
        for callback in callbacks:
            callback()

    # ------------------------------------------------------------------ candidates
    def take(self) -> Candidate | None:
        """Return a process that will become a rank, or ``None`` when ranks must be started cold."""
        while self._waiting:
            candidate = self._waiting.pop(0)
            self._loop.remove(candidate.channel.fileno())
            if candidate.process is not None:
                self._loop.remove(candidate.process.pidfd)
                if candidate.process.poll() is not None:
                    candidate.channel.close()
                    continue
            break
        else:
            fresh = self._fork()
            if fresh is None:
                return None
            candidate = fresh
        self._loop.call_later(_REFILL_DELAY_S, self._refill)
        return candidate

    def _fork(self) -> Candidate | None:
        if not self._is_ready or self._control is None:
            return None
        ours, theirs = make_pair()
        try:
            socket.send_fds(self._control, [standby.FORK], [theirs.fileno()])
        except OSError:  # it has just died, or is so slow that the queue is full
            ours.close()
            return None
        finally:
            theirs.close()
        return Candidate(PacketChannel(ours))

    def _refill(self) -> None:
        while not self._is_closed and len(self._waiting) < self._size:
            candidate = self._fork()
            if candidate is None:
                return
            self._waiting.append(candidate)
            self._loop.add_reader(candidate.channel.fileno(), functools.partial(self._on_candidate, candidate))
            self._watch_exit(candidate)

    def _watch_exit(self, candidate: Candidate) -> None:
        if candidate.process is not None:
            self._loop.add_reader(candidate.process.pidfd, functools.partial(self._on_candidate_exit, candidate))

    def _on_candidate(self, candidate: Candidate) -> None:
        for payload in candidate.channel.receive():
            with contextlib.suppress(msgspec.MsgspecError, ProcessLookupError):
                message = protocol.decode_rank_message(payload)
                if isinstance(message, protocol.Ready):
                    candidate.process = self._link.process(message.pid)
                    self._watch_exit(candidate)
        if not candidate.channel.is_open:
            self._loop.remove(candidate.channel.fileno())
            if candidate.process is None:
                self._drop(candidate)

    def _on_candidate_exit(self, candidate: Candidate) -> None:
        assert candidate.process is not None
        pidfd = candidate.process.pidfd
        if candidate.process.poll() is not None:
            self._loop.remove(pidfd)
            self._drop(candidate)

    def warm(self, num_bytes: int) -> None:
        """Let waiting processes touch as much memory as a rank holds, again when that has grown."""
        for candidate in self._waiting:
            if candidate.process is not None and num_bytes > _GROWTH * candidate.warm_bytes:
                candidate.warm_bytes = num_bytes
                candidate.channel.send(protocol.encode(protocol.Warm(num_bytes)))

    def _drop(self, candidate: Candidate) -> None:
        if candidate in self._waiting:
            self._waiting.remove(candidate)
            self._loop.remove(candidate.channel.fileno())
            candidate.channel.close()
            self._loop.call_later(_REFILL_DELAY_S, self._refill)

    def close(self) -> None:
        """Let go of the standby and of all that wait; the root ends them with everything else."""
        self._is_closed = True
        for candidate in self._waiting:
            self._loop.remove(candidate.channel.fileno())
            candidate.channel.close()
            if candidate.process is not None:
                self._loop.remove(candidate.process.pidfd)
        if self._process is not None and self._control is not None:
            self._loop.remove(self._process.pidfd)
            self._loop.remove(self._control.fileno())
            self._control.close()
