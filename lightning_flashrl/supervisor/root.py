"""The process that the user starts: parent of all processes of the node, and of the supervisor that looks after them.

::

    root ─fork─▶ supervisor: controller (on node 0) and agent
      ├─────────▶ standby, ranks, replacements: started and collected at the supervisor's request

The supervisor may die, or hang: the root then forks another one, which takes the ranks over. They do not notice, for
their parent lives, and so do the sockets between them and the supervisor, whose ends the root holds as well. The end of
the root is the end of everything below it (the kernel sees to that): the loss of a node.

One thread, which decides next to nothing and never blocks. What it waits for:

========================= ============================================================
ready                     means
========================= ============================================================
the supervisor's pidfd    it ended: serve what it had asked for, then start another one
its socket                start a process, hold something, collect a process, the end
a signal                  passed on
a timer, every 250 ms     has the supervisor been silent for too long, or stopped?
========================= ============================================================
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable

from lightning_flashrl import clock
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.packets import make_pair
from lightning_flashrl.recovery.detector import DetectorSettings, Health, Look, Memory, detect
from lightning_flashrl.recovery.slot import Heartbeat, RankState
from lightning_flashrl.supervisor.budget import FaultBudget
from lightning_flashrl.supervisor.process import (
    STOP_SIGNALS,
    ExitStatus,
    Process,
    become_subreaper,
    bury,
    children,
    die_with_parent,
    fork,
    name_process,
    reap_strangers,
    spawn,
)
from lightning_flashrl.supervisor.root_link import (
    Alive,
    Born,
    Bury,
    Copy,
    Done,
    Hold,
    Holding,
    Messages,
    RootLink,
    RootRequest,
    Signalled,
    Spawn,
    Takeover,
    ToSupervisor,
    Unborn,
    Writing,
    decode_request,
)

SUPERVISOR_NAME = "flashrl-superv"
"""What the kernel calls a supervisor."""
_LOOK_S = 0.25
_MAX_TAKEOVERS, _WINDOW_S = 19, 60.0
_RETRY_S = 1.0
_GRACE_S = 3.0
_KILL_WAIT_S = 5.0


class Root:
    """The root of a node's processes.

    Args:
        supervise: what a supervisor does until the job is over; returns the job's exit status. Runs in a copy of this
            process.
        detector: limits for a supervisor that hangs.
        tell: shows a line to the user.
        live_as_rank: what a further copy of this process does with its socket, where ranks are copies.
    """

    def __init__(
        self,
        supervise: Callable[[RootLink], int],
        detector: DetectorSettings,
        tell: Callable[[str], None],
        live_as_rank: Callable[[socket.socket], int] | None = None,
    ) -> None:
        self._supervise = supervise
        self._detector = detector
        self._tell = tell
        self._live_as_rank = live_as_rank
        self._loop = EventLoop()
        self._holdings: dict[str, Holding] = {}
        self._budget = FaultBudget(_MAX_TAKEOVERS, _WINDOW_S)
        self._number = -1
        self._exit_code: int | None = None
        self._asked_signal = 0
        self._beat_ns = 0
        self._is_writing = False
        self._memory: Memory | None = None
        self._verdict = ""

    def run(self) -> int:
        """Serve until the job is over and all its processes are gone; return its exit status."""
        self._children_before = set(children())
        become_subreaper()
        is_hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # under nohup
        stop_signals = tuple(n for n in STOP_SIGNALS if n != signal.SIGHUP or not is_hangup_ignored)
        with self._loop.catch_signals(stop_signals, self._on_signal):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            try:
                self._start(None)
                self._loop.call_every(_LOOK_S, self._look)
                self._loop.run_until(lambda: self._exit_code is not None)
            finally:
                self._end_all()
                become_subreaper(False)
        assert self._exit_code is not None
        return self._exit_code

    # ------------------------------------------------------------------ the supervisor
    def _start(self, takeover: Takeover | None) -> None:
        ours, theirs = make_pair()
        root_pid = os.getpid()

        def live() -> int:
            ours.close()
            os.setsid()
            die_with_parent(root_pid)
            name_process(SUPERVISOR_NAME)
            for number in STOP_SIGNALS:  # they are for the root, which passes them on; who sends one to all means one
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            link = RootLink(theirs, root_pid, self._holdings, takeover, self._asked_signal)
            link.end(self._supervise(link))
            return 0

        try:
            pid = fork(live)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._number += 1
        self._beat_ns, self._memory, self._verdict = clock.now_ns(), None, ""
        self._is_writing = False
        self._supervisor = Process(pid)
        ours.setblocking(False)
        self._messages = Messages(ours)
        self._loop.add_reader(ours.fileno(), self._serve)
        self._loop.add_reader(self._supervisor.pidfd, self._on_end)

    def _on_end(self) -> None:
        pidfd = self._supervisor.pidfd
        status = self._supervisor.poll()
        if status is None:
            return
        now_ns = clock.now_ns()
        self._loop.remove(pidfd)
        self._serve()
        self._loop.remove(self._messages.fileno())
        self._messages.close()
        if self._exit_code is not None:
            return
        self._replace(Takeover(f"the supervisor {self._verdict or _describe(status)}", now_ns))

    def _replace(self, takeover: Takeover) -> None:
        if self._budget.is_exhausted_by(clock.now_ns() / 1e9):
            self._give_up(f"{takeover.reason}, for the {self._budget.num_faults}th time within {_WINDOW_S:g} s")
            return
        try:
            self._start(takeover)
        except OSError:  # the machine is short of memory or processes; ranks go on meanwhile
            self._loop.call_later(_RETRY_S, lambda: self._replace(takeover))

    def _give_up(self, text: str) -> None:
        self._tell(f"{text}; the job stops: see above for what ended it, and start again from the newest checkpoint")
        for holding in self._holdings.values():
            if holding.pid and holding.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(holding.pid, signal.SIGTERM)

        def end() -> None:
            self._exit_code = 1

        self._loop.call_later(_GRACE_S, end)

    def _look(self) -> None:
        """Judge the supervisor as a rank that waits for others: it must run, or write, but need not advance."""
        beat = Heartbeat(
            pid=self._supervisor.pid,
            incarnation=self._number,
            state=RankState.TRAINING,
            thread_beat_ns=clock.now_ns() if self._is_writing else self._beat_ns,
            loop_beat_ns=0,
            loop_beats=0,
            waiting_since_ns=self._beat_ns,
            seq_issued=0,
            global_step=0,
            phase=0,
            step_time_ns=0,
            largest_gap_ns=0,
            is_paused=False,
            is_aware=True,
        )
        look = Look(beat, is_stopped=self._supervisor.is_stopped())
        verdict, self._memory = detect(clock.now_ns(), look, self._memory, self._detector, interval_s=_LOOK_S)
        if verdict.health is Health.HUNG and not self._verdict:
            self._verdict = f"was killed, for it {verdict.reason}"
            self._supervisor.send_signal(signal.SIGKILL)

    def _on_signal(self, number: int) -> None:
        self._asked_signal = self._asked_signal or number
        self._send(Signalled(number))

    # ------------------------------------------------------------------ its requests
    def _serve(self) -> None:
        while True:
            try:
                received = self._messages.receive()
            except BlockingIOError:
                return
            if received is None:
                self._loop.remove(self._messages.fileno())
                return
            payload, fd = received
            self._on_request(decode_request(payload), fd)

    def _on_request(self, request: RootRequest, fd: int) -> None:
        match request:
            case Spawn():
                self._spawn(request)
            case Copy():
                self._copy()
            case Hold():
                self._hold(request, fd)
            case Bury(pid=pid):
                self._bury(pid)
            case Alive(known=known):
                self._beat_ns = clock.now_ns()
                if known is not None:
                    held = {holding.pid for holding in self._holdings.values()}
                    reap_strangers(held | set(known) | {self._supervisor.pid} | self._children_before)
            case Writing(is_begin=is_begin):
                self._is_writing, self._beat_ns = is_begin, clock.now_ns()
            case Done(exit_code=exit_code):
                self._exit_code = exit_code

    def _send(self, message: ToSupervisor, fd: int | None = None) -> None:
        with contextlib.suppress(OSError):  # it is dead, or hangs; its successor will see
            self._messages.send(message, fd)

    def _spawn(self, request: Spawn) -> None:
        ours, theirs = make_pair()
        environ = {os.fsdecode(name): os.fsdecode(value) for name, value in request.environ.items()}
        environ[request.variable] = str(theirs.fileno())
        try:
            pid = spawn(list(map(os.fsdecode, request.argv)), environ, (theirs.fileno(),))
        except OSError as error:
            ours.close()
            self._send(Unborn(error.errno or 0, error.strerror or str(error)))
            return
        finally:
            theirs.close()
        fd = ours.detach()
        self._hold(Hold(request.name, request.number, pid), fd)
        self._send(Born(pid), fd)

    def _copy(self) -> None:
        assert self._live_as_rank is not None
        live_as_rank = self._live_as_rank
        ours, theirs = make_pair()
        try:
            pid = fork(lambda: live_as_rank(theirs))
        except OSError as error:
            self._send(Unborn(error.errno or 0, error.strerror or str(error)))
        else:
            self._send(Born(pid), ours.fileno())
        finally:
            ours.close()
            theirs.close()

    def _hold(self, request: Hold, fd: int) -> None:
        holding = self._holdings.get(request.name)
        if holding is None or holding.number != request.number:
            self._drop(holding)
            self._holdings[request.name] = Holding(request.number, request.pid, fd, request.note)
            return
        if request.pid not in (0, holding.pid):
            holding.pid, holding.status = request.pid, None
        holding.note = request.note or holding.note
        if fd >= 0:
            self._drop(holding)
            holding.fd = fd

    def _drop(self, holding: Holding | None) -> None:
        if holding is not None and holding.fd >= 0:
            os.close(holding.fd)
            holding.fd = -1

    def _bury(self, pid: int) -> None:
        status = bury(pid)
        for holding in self._holdings.values():
            if holding.pid == pid and status is not None:
                holding.status = status

    # ------------------------------------------------------------------ the end
    def _end_all(self) -> None:
        """End every process that is left."""
        deadline_s = clock.now_s() + _KILL_WAIT_S
        while (left := set(children()) - self._children_before) and clock.now_s() < deadline_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)
        for holding in self._holdings.values():
            self._drop(holding)


def _describe(status: ExitStatus) -> str:
    return f"was {status}" if status.is_signal else str(status)
