"""One per node: has ranks started, sees them end, and passes messages between them and the controller.

All in one thread. What it waits for:

========================= ============================================================
ready                     means
========================= ============================================================
a rank's pidfd            the rank ended: drain its channel, judge, tell the controller
a rank's watched thread   the same, as a rule, before the kernel has taken the process's memory apart
a rank's channel          a message (or a standby process that says its number)
the controller's socket   quorums, plans, launch, stop
a timer, every 100 ms     look at heartbeats, show logs
a timer, every 250 ms     tell the root that all is well, and which processes are known here
========================= ============================================================

A hung rank is killed and then takes the way of a dead one, so a slot never has two writers.

An agent that begins with ranks running takes them over from one that died. What it must know is with the root (which
process has which seat, and over which socket it is reached), in the slots, and with the controller, which tells it
again. What ranks had said to the agent that died they say again when they are asked to. Whatever is said twice has the
effect of once; a loss is known by the number of the process that was lost.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.packets import PacketChannel
from lightning_flashrl.recovery.detector import DetectorSettings, Health, Look, detect
from lightning_flashrl.recovery.slot import RankSlot, RankState, Region, Word
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.allocator import anonymous_bytes
from lightning_flashrl.supervisor.device_health import DeviceHealth, DeviceWatch
from lightning_flashrl.supervisor.environment import RankEnvironment
from lightning_flashrl.supervisor.pool import StandbyPool
from lightning_flashrl.supervisor.process import SHORTAGES, ExitStatus, Process, open_thread
from lightning_flashrl.supervisor.root_link import RootLink
from lightning_flashrl.supervisor.seat import AgentSettings, Seat, Starter
from lightning_flashrl.types import RankReport

_TICK_S = 0.1
_WARM_S = 0.5
_SETTLED_STEPS = 3
"""Steps after which a rank holds what it will hold."""
_ALIVE_S = 0.25
_BEAT_S = 1.0
_MAX_UNANSWERED = 15
"""Beats, not seconds: an agent that was stopped itself does not blame the controller."""
_LAUNCH, _STOP = "launch", "stop"
"""Names of what the root holds for the next agent, besides ranks."""
_RETRY_S = 1.0
_LOOK_S, _NUM_LOOKS = 0.001, 50
"""A process whose watched thread has ended is looked at this often; later its own descriptor tells."""


class _Launched(msgspec.Struct, frozen=True):
    """A launch, for the next agent.

    Attributes:
        launch: what the controller said.
        incarnations: by local rank, of the processes before it.
    """

    launch: protocol.Launch
    incarnations: list[int]


class Agent:
    """The agent of a node.

    Attributes:
        exit_code: the job's, once :attr:`is_done`.
        is_done: whether the node is idle for good.
        is_caught_up: whether the controller has told what an agent must know that begins in the middle of a job.

    Args:
        context: ZeroMQ context.
        loop: calls this object back.
        link: to the root.
        endpoint: of the controller.
        settings: of this node.
        environment: of the ranks.
        pool: processes on standby.
        slots: one per local rank.
        tell: shows a line to the user.
        show: shows a block of rank output.
        guard: prepares the socket for a guarded controller.
        health: device checks.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: EventLoop,
        link: RootLink,
        endpoint: str,
        settings: AgentSettings,
        environment: RankEnvironment,
        pool: StandbyPool,
        slots: list[RankSlot],
        *,
        tell: Callable[[str], None],
        show: Callable[[str], None],
        guard: Callable[[zmq.Socket[bytes]], None] | None = None,
        health: list[DeviceHealth] | None = None,
    ) -> None:
        self.exit_code = 1
        self.is_done = False
        self.is_caught_up = False
        self._loop = loop
        self._link = link
        self._endpoint = endpoint
        self._settings = settings
        self._environment = environment
        self._starter = Starter(settings, environment, pool, show, link)
        self._pool = pool
        self._tell = tell
        self._seats = [Seat(local_rank, slot) for local_rank, slot in enumerate(slots)]
        self._by_global: dict[int, Seat] = {}
        self._launch: protocol.Launch | None = None
        self._detector = settings.detector
        self._devices = DeviceWatch(health or [])
        self._quorum: protocol.QuorumChange | None = None
        self._reports: dict[int, RankReport] = {}
        self._restored: dict[int, dict[str, float]] = {}
        self._has_unknown_seats = False
        """Whether there are processes of the agent before this one that are not looked at yet."""
        self._is_killing = False
        self._is_stopping = False
        self._asked_signal = 0
        self._num_unanswered = 0
        self._threads: set[int] = set()
        self._ending: set[Process] = set()
        """Processes that will execute nothing any more, but are not gone."""
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        if guard is not None:
            guard(self._socket)
        self._socket.connect(endpoint)
        loop.add_reader(self._socket, self._on_controller)
        self._say_hello()
        self._take_over()
        loop.call_every(_TICK_S, self._on_tick)
        loop.call_every(_ALIVE_S, self._say_alive)
        loop.call_every(_BEAT_S, self._on_beat)
        loop.call_every(_WARM_S, self._warm_standby)
        loop.call_later(settings.join_timeout_s, self._on_join_timeout)

    # ------------------------------------------------------------------ controller
    def _send(self, message: protocol.AgentMessage) -> None:
        self._socket.send(protocol.encode(message))

    def _say_hello(self) -> None:
        settings = self._settings
        node_rank = settings.node_rank if self._launch is None else self._launch.node_rank
        self._send(protocol.AgentHello(node_rank, settings.num_ranks, socket.gethostname(), settings.token))

    def _say_again(self) -> None:
        """Tell a controller that is new, or one that lost this node's agent, what it may not know; so do the ranks."""
        for seat in self._seats:
            if seat.is_listening:
                self._send(protocol.RankAware(seat.global_rank, seat.incarnation, 0.0))
                self._forward(seat, protocol.encode(protocol.Resync()))
            if seat.has_left:
                self._send(protocol.RankExited(seat.global_rank))
            if seat.failure is not None:
                self._send(protocol.RanksFailed((seat.failure,)))
        if self._asked_signal:
            self._send(protocol.StopAsked(self._asked_signal))
        self.is_caught_up = True

    def _on_controller(self) -> None:
        while True:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._num_unanswered = 0
            self._on_order(protocol.decode_to_agent(payload), payload)

    def _on_order(self, message: protocol.ToAgent, payload: bytes) -> None:
        match message:
            case protocol.Launch():
                self._on_launch(message)
            case protocol.QuorumChange():
                self._on_quorum_change(message, payload)
            case protocol.ToOneRank(global_rank=global_rank, message=answer):
                seat = self._by_global.get(global_rank)
                if seat is not None:
                    self._forward(seat, protocol.encode(answer))
            case protocol.PlanReady() | protocol.RecoveryRecord() | protocol.AllFinished():
                for seat in self._seats:
                    self._forward(seat, payload)
            case protocol.KillAll():
                self._is_killing = True
                self._take_over_seats()
                self._signal_all(signal.SIGKILL)
                self._check_idle()
            case protocol.StopAll():
                self._stop(message)
            case protocol.WhoAreYou():
                if self._launch is not None or not self._is_stopping:
                    self._say_hello()
            case protocol.Resync():
                self._say_again()
            case protocol.AgentBeat():
                pass

    def _on_beat(self) -> None:
        if self.is_done:
            return
        self._pool.end_if_stopped()
        self._send(protocol.AgentBeat())
        self._num_unanswered += 1
        if self._launch is not None and not self._is_stopping and self._num_unanswered > _MAX_UNANSWERED:
            self._tell(f"the controller did not answer {_MAX_UNANSWERED} times; this node stops")
            self._stop(protocol.StopAll(1, signal.SIGTERM, 0.0, ""))

    def _on_join_timeout(self) -> None:
        if self._launch is None and not self._is_stopping:
            self._tell(
                f"the job did not begin within {self._settings.join_timeout_s:g} s; check that all nodes were started, "
                f"that they reach {self._endpoint} and have the same FLASHRL_JOB_SECRET, or give them longer with "
                "--rdzv-conf join_timeout=SECONDS"
            )
            self._send(protocol.StopAsked(signal.SIGTERM))
            self._stop(protocol.StopAll(1, signal.SIGTERM, 0.0, ""))

    def ask_stop(self, signal_number: int) -> None:
        """React to a signal that was sent to ``flashrun``; the second one ends ranks at once."""
        self._asked_signal = signal_number
        if self._is_stopping:
            self._signal_all(signal.SIGKILL)
        elif self._launch is None:
            self._send(protocol.StopAsked(signal_number))
            self._stop(protocol.StopAll(128 + signal_number, signal_number, 0.0, ""))
        else:
            self._tell(f"got {signal.Signals(signal_number).name}: ranks are stopped")
            self._send(protocol.StopAsked(signal_number))

    # ------------------------------------------------------------------ taking over from an agent that died
    def _take_over(self) -> None:
        """Find out who sits where; what became of them is looked at once the controller says that it still counts."""
        kept = self._link.holdings.get(_LAUNCH)
        if kept is not None:
            self._assign_seats(msgspec.msgpack.decode(kept.note, type=_Launched))
            self._has_unknown_seats = True
            for seat in self._seats:
                holding = self._link.holdings.get(seat.name)
                seat.incarnation = max(seat.launched, -1 if holding is None else holding.number)
        stop = self._link.holdings.get(_STOP)
        if stop is not None:
            self._stop(msgspec.msgpack.decode(stop.note, type=protocol.StopAll))
        elif self._link.asked_signal:
            self.ask_stop(self._link.asked_signal)

    def _take_over_seats(self) -> None:
        if not self._has_unknown_seats:
            return
        self._has_unknown_seats = False
        seats = [seat for seat in self._seats if not seat.is_waiting_for_launch]
        for seat in seats:
            seat.take_over(self._link.holdings[seat.name], self._link)
            self._starter.take_over_log(seat)
            self._watch(seat)
            self._watch_thread(seat)
        for seat in seats:
            status = self._link.holdings[seat.name].status
            if status is not None:
                self._drain(seat)
                self._on_end(seat, status, clock.now_ns())

    # ------------------------------------------------------------------ starting ranks
    def _on_launch(self, launch: protocol.Launch) -> None:
        if self._launch is not None and launch.incarnation <= self._launch.incarnation:
            if self._has_unknown_seats:
                self._take_over_seats()
                self._start_ranks(launch)
            return
        self._is_killing = self._has_unknown_seats = False
        self._quorum = None
        launched = _Launched(launch, [seat.incarnation for seat in self._seats])
        self._assign_seats(launched)
        if launch.incarnation == 0:
            self._starter.remove_old_logs(self._seats)
        self._link.hold(_LAUNCH, launch.incarnation, note=msgspec.msgpack.encode(launched))
        self._start_ranks(launch)

    def _assign_seats(self, launched: _Launched) -> None:
        launch = self._launch = launched.launch
        for seat, incarnation in zip(self._seats, launched.incarnations, strict=True):
            seat.global_rank = launch.first_rank + seat.local_rank
            seat.incarnation = seat.launched = incarnation
            seat.has_left, seat.failure = False, None
        self._by_global = {seat.global_rank: seat for seat in self._seats}

    def _start_ranks(self, launch: protocol.Launch) -> None:
        if self._settings.is_python:
            self._pool.start(self._environment.common(launch), self._spawn_all)
        else:
            self._spawn_all()

    def _spawn_all(self) -> None:
        for seat in self._seats:
            if seat.is_waiting_for_launch:
                self._spawn(seat)

    def _spawn(self, seat: Seat) -> None:
        if self._is_stopping or self._is_killing or self._launch is None:
            return
        seat.begin(is_newcomer=self._quorum is not None)
        self._start(seat, self._starter.start)

    def _start(self, seat: Seat, start: Callable[[Seat, protocol.Launch], None], num_refused: int = 0) -> None:
        """Start the seat's process; again and again while the machine is short of memory or processes."""
        assert self._launch is not None
        try:
            start(seat, self._launch)
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            if num_refused == 0:
                self._tell(f"rank {seat.global_rank} cannot be started yet ({error.strerror}); tried every second")
            self._loop.call_later(_RETRY_S, lambda: self._start_again(seat, start, num_refused + 1))
        else:
            self._watch(seat)

    def _start_again(self, seat: Seat, start: Callable[[Seat, protocol.Launch], None], num_refused: int) -> None:
        if self._is_stopping or self._is_killing:
            seat.is_running = False
            self._check_idle()
        else:
            self._start(seat, start, num_refused)

    def _watch(self, seat: Seat) -> None:
        assert seat.channel is not None
        channel = seat.channel
        self._loop.add_reader(channel.fileno(), lambda: self._on_channel(seat, channel))
        self._update_writer(channel)
        if seat.process is not None:
            self._watch_process(seat, seat.process)

    def _watch_process(self, seat: Seat, process: Process) -> None:
        seat.process = process
        self._loop.add_reader(process.pidfd, lambda: self._on_exit(seat, process))

    # ------------------------------------------------------------------ a rank's channel
    def _forward(self, seat: Seat, payload: bytes) -> None:
        if seat.is_listening and seat.channel is not None:
            seat.channel.send(payload)
            self._update_writer(seat.channel)

    def _update_writer(self, channel: PacketChannel) -> None:
        if not channel.is_open:
            return

        def flush() -> None:
            channel.flush()
            self._update_writer(channel)

        self._loop.set_writer(channel.fileno(), flush if channel.has_pending else None)

    def _drain(self, seat: Seat) -> None:
        if seat.channel is None:
            return
        for payload in seat.channel.receive():
            try:
                message = protocol.decode_rank_message(payload)
            except msgspec.MsgspecError:
                continue
            self._on_rank_message(seat, message)

    def _on_channel(self, seat: Seat, channel: PacketChannel) -> None:
        self._drain(seat)
        if not channel.is_open and seat.channel is channel:
            self._loop.remove(channel.fileno())
            channel.close()
            seat.channel = None
            if seat.process is None and seat.is_running:
                self._on_stillborn(seat)

    def _on_rank_message(self, seat: Seat, message: protocol.RankMessage) -> None:
        match message:
            case protocol.Ready(pid=pid):
                self._on_born(seat, pid)
            case protocol.Hello():
                self._on_hello(seat)
            case protocol.Report(report=report):
                self._on_report(seat, report)
            case protocol.Restored():
                self._on_restored(seat, message)
            case protocol.PolicySet(hang_timeout_s=hang_timeout_s):
                if hang_timeout_s is not None and not self._settings.is_detector_fixed:
                    self._detector = DetectorSettings.exactly(hang_timeout_s)
                self._pass_on(seat, message)
            case protocol.Raised():
                seat.has_raised = True
                self._pass_on(seat, message)
            case _:
                self._pass_on(seat, message)

    def _pass_on(
        self,
        seat: Seat,
        message: protocol.StoreSet
        | protocol.StoreGet
        | protocol.CheckpointSaved
        | protocol.PolicySet
        | protocol.Raised
        | protocol.Finished,
    ) -> None:
        self._send(protocol.FromRank(seat.global_rank, message, seat.incarnation))

    def _on_born(self, seat: Seat, pid: int) -> None:
        if seat.process is not None:
            return
        try:
            process = self._link.process(pid)
        except ProcessLookupError:
            self._on_stillborn(seat)
            return
        self._link.hold(seat.name, seat.incarnation, pid=pid)
        self._watch_process(seat, process)
        if self._is_killing or self._is_stopping:
            process.send_signal(signal.SIGKILL)

    def _on_stillborn(self, seat: Seat) -> None:
        """The standby died before it forked the process that was to become this rank."""
        if self._is_killing or self._is_stopping:
            seat.is_running = False
            self._check_idle()
        else:
            self._start(seat, self._starter.start_cold)

    def _on_hello(self, seat: Seat) -> None:
        is_first = not seat.is_listening
        seat.is_listening = True
        if is_first:
            spawn_ms = (clock.now_ns() - seat.ordered_ns) / 1e6
            self._send(protocol.RankAware(seat.global_rank, seat.incarnation, spawn_ms))
            if self._quorum is not None:
                self._forward(seat, protocol.encode(self._quorum))
            self._watch_thread(seat)

    # ------------------------------------------------------------------ recoveries
    def _on_quorum_change(self, change: protocol.QuorumChange, payload: bytes) -> None:
        self._quorum = change
        self._reports.clear()
        self._restored.clear()
        lost = {who.global_rank: who.incarnation for who in change.lost}
        for seat in self._seats:
            self._forward(seat, payload)
        for seat in self._seats:
            if lost.get(seat.global_rank) != seat.incarnation:  # not lost, or replaced already
                continue
            if not seat.is_running:
                self._spawn(seat)
            else:  # it raised, and is on its way out
                seat.is_given_up = True
                self._kill(seat)

    def _on_report(self, seat: Seat, report: RankReport) -> None:
        if self._quorum is None or report.quorum_id != self._quorum.quorum_id:
            return
        self._reports[seat.global_rank] = report
        if len(self._reports) == len(self._seats):
            reports = tuple(self._reports[global_rank] for global_rank in sorted(self._reports))
            self._send(protocol.NodeReports(self._quorum.quorum_id, reports))

    def _on_restored(self, seat: Seat, message: protocol.Restored) -> None:
        """Newcomers are passed on at once, the others together: the controller hears once from most nodes."""
        quorum = self._quorum
        if quorum is None or message.quorum_id != quorum.quorum_id:
            return
        lost = {who.global_rank for who in quorum.lost}
        if seat.global_rank in lost:
            self._send(protocol.NodeRestored(quorum.quorum_id, (seat.global_rank,), message.timings_ms))
            return
        self._restored[seat.global_rank] = message.timings_ms
        if len(self._restored) < sum(r.global_rank not in lost for r in self._seats):
            return
        slowest: dict[str, float] = {}
        for timings_ms in self._restored.values():
            for stage, duration_ms in timings_ms.items():
                slowest[stage] = max(duration_ms, slowest.get(stage, 0.0))
        self._send(protocol.NodeRestored(quorum.quorum_id, tuple(self._restored), slowest))

    # ------------------------------------------------------------------ the end of a rank
    def _watch_thread(self, seat: Seat) -> None:
        """A thread's end announces the end of its process, before the kernel has taken the memory apart."""
        process, thread = seat.process, seat.slot[Word.WATCHED_THREAD]
        fd = open_thread(thread) if thread else None
        if process is None or fd is None:
            return

        def on_end() -> None:
            self._loop.remove(fd)
            os.close(fd)
            self._threads.discard(fd)
            self._on_thread_end(seat, process)

        self._threads.add(fd)
        self._loop.add_reader(fd, on_end)

    def _on_thread_end(self, seat: Seat, process: Process, num_looks: int = _NUM_LOOKS) -> None:
        if seat.process is not process or self._is_killing or self._is_stopping:
            return
        woken_ns = clock.now_ns()
        status = process.ending()
        if status is None and num_looks:
            self._loop.call_later(_LOOK_S, lambda: self._on_thread_end(seat, process, num_looks - 1))
        if status is not None:
            if seat.channel is not None:
                self._on_channel(seat, seat.channel)
            self._ending.add(process)
            self._loop.add_reader(process.pidfd, lambda: self._bury(process))
            self._on_end(seat, status, woken_ns)

    def _bury(self, process: Process) -> None:
        pidfd = process.pidfd
        if process.poll() is not None:
            self._loop.remove(pidfd)
            self._ending.discard(process)
            if self._is_killing or self._is_stopping:
                self._check_idle()

    def _on_exit(self, seat: Seat, process: Process) -> None:
        woken_ns = clock.now_ns()
        if seat.channel is not None:
            self._on_channel(seat, seat.channel)
        pidfd = process.pidfd
        status = process.poll()
        if status is None:
            return
        self._loop.remove(pidfd)
        self._on_end(seat, status, woken_ns)

    def _on_end(self, seat: Seat, status: ExitStatus, woken_ns: int) -> None:
        if seat.channel is not None:
            self._loop.remove(seat.channel.fileno())
        raised = seat.slot.read(Region.RAISED)
        seat.end()
        if self._is_killing or self._is_stopping:
            self._check_idle()
        elif seat.is_given_up:
            self._spawn(seat)
        elif status == ExitStatus(0, is_signal=False):
            seat.has_left = True
            self._send(protocol.RankExited(seat.global_rank))
        else:
            if raised is not None:  # an agent before this one may have died with the report
                self._on_rank_message(seat, protocol.decode_rank_message(raised))
            self._report_failure(seat, status, woken_ns)

    def _report_failure(self, seat: Seat, status: ExitStatus, woken_ns: int) -> None:
        now_ns = clock.now_ns()
        reason = seat.verdict or str(status)
        detect_ms = seat.verdict_ms or (now_ns - woken_ns) / 1e6
        lost = protocol.LostRank(seat.global_rank, reason, now_ns, seat.incarnation)
        seat.failure = protocol.Failure(lost, status.shell_code, detect_ms)
        self._send(protocol.RanksFailed((seat.failure,)))

    def _kill(self, seat: Seat) -> None:
        if seat.process is not None:
            seat.process.send_signal(signal.SIGKILL)

    # ------------------------------------------------------------------ looking
    def _on_tick(self) -> None:
        for seat in self._seats:
            if seat.tail is not None:
                seat.tail.pump()
        if not self._is_stopping and not self._is_killing:
            self._look_at_ranks()

    def _say_alive(self) -> None:
        known: set[int] | None = None
        is_complete = not self._has_unknown_seats and all(r.process is not None for r in self._seats if r.is_running)
        if is_complete and not self._pool.is_expecting:
            known = {r.process.pid for r in self._seats if r.process is not None} | self._pool.pids
            known |= {process.pid for process in self._ending}
        self._link.say_alive(known)

    def _look_at_ranks(self) -> None:
        now_ns = clock.now_ns()
        faults = self._devices.take()
        beats = {seat.local_rank: seat.slot.heartbeat() for seat in self._seats if seat.process is not None}
        num_waiting = sum(beat.waiting_since_ns > 0 for beat in beats.values())
        for seat in self._seats:
            if seat.process is None or seat.verdict:
                continue
            beat = beats[seat.local_rank]
            look = Look(
                beat,
                is_stopped=seat.process.is_stopped(),
                device_faults=tuple(fault.reason for fault in faults if fault.local_rank == seat.local_rank),
                num_peers_waiting=num_waiting - (beat.waiting_since_ns > 0),
                num_peers=len(beats) - 1,
            )
            verdict, seat.memory = detect(now_ns, look, seat.memory, self._detector, interval_s=_TICK_S)
            if verdict.health is Health.HUNG:
                seat.verdict = verdict.reason
                seat.verdict_ms = verdict.silent_s * 1000
                self._kill(seat)

    def _warm_standby(self) -> None:
        """Waiting processes take the memory that a rank holds; not where that belongs to a device's library."""
        ranks = [
            seat.process.pid
            for seat in self._seats
            if seat.process is not None
            and seat.slot[Word.WATCHED_THREAD]
            and seat.slot[Word.STATE] == RankState.TRAINING
            and seat.slot[Word.GLOBAL_STEP] >= _SETTLED_STEPS
        ]
        if len(ranks) == len(self._seats):
            self._pool.warm(max(map(anonymous_bytes, ranks)))

    # ------------------------------------------------------------------ stopping
    def _stop(self, order: protocol.StopAll) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        self.exit_code = order.exit_code
        self._link.hold(_STOP, 0, note=protocol.encode(order))
        self._take_over_seats()
        if order.reason and self._settings.node_rank != 0:
            self._tell(order.reason)
        for seat in self._seats:
            if seat.process is not None and not seat.has_raised:
                seat.process.send_signal(order.signal_number)
        self._loop.call_later(order.grace_s, lambda: self._signal_all(signal.SIGKILL))
        self._check_idle()

    def _signal_all(self, number: int) -> None:
        for seat in self._seats:
            if seat.process is not None:
                seat.process.send_signal(number)

    def _check_idle(self) -> None:
        if self._ending or any(seat.is_running for seat in self._seats):
            return
        if self._is_stopping:
            if not self.is_done:
                self._send(protocol.NodeIdle())
            self.is_done = True
        else:
            for seat in self._seats:
                seat.slot.reset()
                seat.failure = None
            self._send(protocol.NodeIdle())

    def close(self) -> None:
        """Let go of everything; the root ends what is left."""
        self._devices.close()
        self._pool.close()
        for fd in self._threads:
            self._loop.remove(fd)
            os.close(fd)
        self._loop.remove(self._socket)
        self._socket.close()
