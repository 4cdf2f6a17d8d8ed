"""One per node: holds the slots, starts ranks, sees them end, and passes messages between them and the controller.

All in one thread. What it waits for:

========================= ============================================================
ready                     means
========================= ============================================================
a rank's pidfd            the rank ended: drain its channel, judge, tell the controller
a rank's channel          a message (or a standby process that says its number)
the controller's socket   quorums, plans, launch, stop
a timer, every 100 ms     look at heartbeats, collect adopted children, show logs
========================= ============================================================

A hung rank is killed and then takes the way of a dead one, so a slot never has two writers.
"""

from __future__ import annotations

import glob
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.recovery.detector import DetectorSettings, Health, Look, Memory, detect
from lightning_flashrl.recovery.slot import RankSlot, RankState, Word
from lightning_flashrl.supervisor import protocol, runner
from lightning_flashrl.supervisor.channel import AgentChannel
from lightning_flashrl.supervisor.device_health import DeviceHealth, DeviceWatch
from lightning_flashrl.supervisor.environment import RankEnvironment
from lightning_flashrl.supervisor.loop import EventLoop, Timer
from lightning_flashrl.supervisor.pool import StandbyPool
from lightning_flashrl.supervisor.process import (
    ExitStatus,
    Process,
    become_subreaper,
    children,
    reap_strangers,
    spawn,
)
from lightning_flashrl.supervisor.tail import LogTail
from lightning_flashrl.types import RankReport

_TICK_S = 0.1
_BEAT_S = 1.0
_MAX_UNANSWERED = 15
"""Beats, not seconds: an agent that was stopped itself does not blame the controller."""
_KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What an agent is told by the command line.

    Attributes:
        argv: script, module or command, then its arguments.
        is_module: whether ``argv[0]`` is a module.
        is_python: whether ``argv[0]`` is a Python program; other commands are always started cold.
        num_ranks: ranks of this node.
        node_rank: -1 lets the controller choose.
        log_dir: keep the output of every incarnation of every rank in ``rank{R}/incarnation{K}.log`` under it.
        show_ranks: local ranks whose output also goes to the terminal when there is a ``log_dir``; ``None`` means all.
        detector: limits for hangs.
        is_detector_fixed: whether ranks may not change them.
        join_timeout_s: how long to wait for the other nodes.
    """

    argv: tuple[str, ...]
    is_module: bool = False
    is_python: bool = True
    num_ranks: int = 1
    node_rank: int = 0
    log_dir: str | None = None
    show_ranks: frozenset[int] | None = None
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    is_detector_fixed: bool = False
    join_timeout_s: float = 600.0


@dataclass(slots=True, eq=False)
class _Rank:
    """One local rank, over all its incarnations."""

    local_rank: int
    slot: RankSlot
    global_rank: int = -1
    incarnation: int = -1
    is_newcomer: bool = False
    channel: AgentChannel | None = None
    process: Process | None = None
    is_running: bool = False
    """Ordered or started, and its end not handled."""
    is_listening: bool = False
    """It said hello: it takes part in quorums."""
    has_raised: bool = False
    is_given_up: bool = False
    """The controller counts it as lost although it runs: replace it as soon as it is gone."""
    needs_spawn: bool = False
    verdict: str = ""
    verdict_ms: float = 0.0
    ordered_ns: int = 0
    memory: Memory | None = None
    tail: LogTail | None = None


class Agent:
    """The agent of a node.

    Args:
        context: ZeroMQ context.
        loop: calls this object back.
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
        self._loop = loop
        self._endpoint = endpoint
        self._settings = settings
        self._environment = environment
        self._pool = pool
        self._tell = tell
        self._show = show
        self._ranks = [_Rank(local_rank, slot) for local_rank, slot in enumerate(slots)]
        self._by_global: dict[int, _Rank] = {}
        self._launch: protocol.Launch | None = None
        self._detector = settings.detector
        self._devices = DeviceWatch(health or [])
        self._quorum: protocol.QuorumChange | None = None
        self._reports: dict[int, RankReport] = {}
        self._restored: dict[int, dict[str, float]] = {}
        self._is_killing = False
        self._is_stopping = False
        self._kill_timer: Timer | None = None
        self._num_unanswered = 0
        self._children_before = set(children())
        become_subreaper()
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        if guard is not None:
            guard(self._socket)
        self._socket.connect(endpoint)
        loop.add_reader(self._socket, self._on_controller)
        self._send(protocol.AgentHello(settings.node_rank, settings.num_ranks, socket.gethostname()))
        loop.call_every(_TICK_S, self._on_tick)
        loop.call_every(_BEAT_S, self._on_beat)
        loop.call_later(settings.join_timeout_s, self._on_join_timeout)

    # ------------------------------------------------------------------ controller
    def _send(self, message: protocol.AgentMessage) -> None:
        self._socket.send(protocol.encode(message))

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
                rank = self._by_global.get(global_rank)
                if rank is not None:
                    self._forward(rank, protocol.encode(answer))
            case protocol.PlanReady() | protocol.RecoveryRecord() | protocol.AllFinished():
                for rank in self._ranks:
                    self._forward(rank, payload)
            case protocol.KillAll():
                self._is_killing = True
                self._signal_all(signal.SIGKILL)
                self._check_idle()
            case protocol.StopAll():
                self._stop(message)
            case protocol.AgentBeat():
                pass

    def _on_beat(self) -> None:
        if self.is_done:
            return
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
        if self._is_stopping:
            self._signal_all(signal.SIGKILL)
        elif self._launch is None:
            self._send(protocol.StopAsked(signal_number))
            self._stop(protocol.StopAll(128 + signal_number, signal_number, 0.0, ""))
        else:
            self._tell(f"got {signal.Signals(signal_number).name}: ranks are stopped")
            self._send(protocol.StopAsked(signal_number))

    # ------------------------------------------------------------------ starting ranks
    def _on_launch(self, launch: protocol.Launch) -> None:
        self._launch = launch
        self._is_killing = False
        self._quorum = None
        for rank in self._ranks:
            rank.global_rank = launch.first_rank + rank.local_rank
        if launch.incarnation == 0:
            self._remove_old_logs()
        self._by_global = {rank.global_rank: rank for rank in self._ranks}
        if self._settings.is_python:
            self._pool.start(self._environment.common(launch), self._spawn_all)
        else:
            self._spawn_all()

    def _remove_old_logs(self) -> None:
        """A log directory holds one job: what an earlier one left is not mistaken for this one's."""
        for rank in self._ranks:
            if self._settings.log_dir is not None:
                for path in glob.glob(f"{glob.escape(self._settings.log_dir)}/rank{rank.global_rank}/incarnation*.log"):
                    os.remove(path)

    def _spawn_all(self) -> None:
        for rank in self._ranks:
            self._spawn(rank)

    def _spawn(self, rank: _Rank) -> None:
        if self._is_stopping or self._is_killing or self._launch is None:
            return
        rank.incarnation += 1
        rank.is_newcomer = self._quorum is not None
        rank.slot.begin_incarnation(0, rank.incarnation)
        rank.is_running, rank.is_listening = True, False
        rank.has_raised = rank.is_given_up = rank.needs_spawn = False
        rank.verdict, rank.verdict_ms, rank.memory = "", 0.0, None
        rank.ordered_ns = clock.now_ns()
        candidate = self._pool.take() if self._settings.is_python else None
        if candidate is None:
            self._spawn_cold(rank)
            return
        rank.channel = candidate.channel
        rank.channel.send(
            protocol.encode(
                protocol.Order(
                    self._environ_of(rank), list(self._settings.argv), self._settings.is_module, self._log_path(rank)
                )
            )
        )
        self._watch_channel(rank)
        if candidate.process is not None:
            self._watch_process(rank, candidate.process)

    def _spawn_cold(self, rank: _Rank) -> None:
        ours, theirs = socket.socketpair()
        environ = self._environ_of(rank) | {
            "FLASHRL_CONTROL_FD": str(theirs.fileno()),
            "FLASHRL_AGENT_PID": str(os.getpid()),
        }
        log_path = self._log_path(rank)
        if log_path is not None:
            environ["FLASHRL_LOG_PATH"] = log_path
        if not self._settings.is_python:
            environ["FLASHRL_NO_PYTHON"] = "1"
        command = [
            sys.executable,
            "-m",
            runner.__name__,
            *(["-m"] if self._settings.is_module else []),
            *self._settings.argv,
        ]
        process = spawn(command, environ, (theirs.fileno(),))
        theirs.close()
        rank.channel = AgentChannel(ours)
        self._watch_channel(rank)
        self._watch_process(rank, process)

    def _environ_of(self, rank: _Rank) -> dict[str, str]:
        assert self._launch is not None
        return self._environment.of_rank(self._launch, rank.local_rank, rank.incarnation, is_newcomer=rank.is_newcomer)

    def _log_path(self, rank: _Rank) -> str | None:
        if self._settings.log_dir is None:
            return None
        path = os.path.join(
            os.path.abspath(self._settings.log_dir), f"rank{rank.global_rank}", f"incarnation{rank.incarnation}.log"
        )
        if self._settings.show_ranks is None or rank.local_rank in self._settings.show_ranks:
            rank.tail = LogTail(path, f"[rank{rank.global_rank}]: ", self._show)
        return path

    def _watch_channel(self, rank: _Rank) -> None:
        assert rank.channel is not None
        channel = rank.channel
        self._loop.add_reader(channel.fileno(), lambda: self._on_channel(rank, channel))
        self._update_writer(channel)

    def _watch_process(self, rank: _Rank, process: Process) -> None:
        rank.process = process
        rank.slot[Word.PID] = process.pid
        self._loop.add_reader(process.pidfd, lambda: self._on_exit(rank, process))

    # ------------------------------------------------------------------ a rank's channel
    def _forward(self, rank: _Rank, payload: bytes) -> None:
        if rank.is_listening and rank.channel is not None:
            rank.channel.send(payload)
            self._update_writer(rank.channel)

    def _update_writer(self, channel: AgentChannel) -> None:
        if not channel.is_open:
            return

        def flush() -> None:
            channel.flush()
            self._update_writer(channel)

        self._loop.set_writer(channel.fileno(), flush if channel.has_pending else None)

    def _on_channel(self, rank: _Rank, channel: AgentChannel) -> None:
        for payload in channel.receive():
            try:
                message = protocol.decode_rank_message(payload)
            except msgspec.MsgspecError:
                continue
            self._on_rank_message(rank, message)
        if not channel.is_open and rank.channel is channel:
            self._loop.remove(channel.fileno())
            channel.close()
            rank.channel = None
            if rank.process is None and rank.is_running:
                self._on_stillborn(rank)

    def _on_rank_message(self, rank: _Rank, message: protocol.RankMessage) -> None:
        match message:
            case protocol.Ready(pid=pid):
                self._on_born(rank, pid)
            case protocol.Hello():
                self._on_hello(rank)
            case protocol.Report(report=report):
                self._on_report(rank, report)
            case protocol.Restored():
                self._on_restored(rank, message)
            case protocol.PolicySet(hang_timeout_s=hang_timeout_s):
                if hang_timeout_s is not None and not self._settings.is_detector_fixed:
                    self._detector = DetectorSettings.exactly(hang_timeout_s)
                self._send(protocol.FromRank(rank.global_rank, message))
            case protocol.Raised():
                rank.has_raised = True
                self._send(protocol.FromRank(rank.global_rank, message))
            case _:
                self._send(protocol.FromRank(rank.global_rank, message))

    def _on_born(self, rank: _Rank, pid: int) -> None:
        try:
            process = Process(pid)
        except ProcessLookupError:
            self._on_stillborn(rank)
            return
        self._watch_process(rank, process)
        if self._is_killing or self._is_stopping:
            process.send_signal(signal.SIGKILL)

    def _on_stillborn(self, rank: _Rank) -> None:
        """The standby died before it forked the process that was to become this rank."""
        if self._is_killing or self._is_stopping:
            rank.is_running = False
            self._check_idle()
        else:
            self._spawn_cold(rank)

    def _on_hello(self, rank: _Rank) -> None:
        is_first = not rank.is_listening
        rank.is_listening = True
        if is_first:
            spawn_ms = (clock.now_ns() - rank.ordered_ns) / 1e6
            self._send(protocol.RankAware(rank.global_rank, rank.incarnation, spawn_ms))
            if self._quorum is not None:
                self._forward(rank, protocol.encode(self._quorum))

    # ------------------------------------------------------------------ recoveries
    def _on_quorum_change(self, change: protocol.QuorumChange, payload: bytes) -> None:
        self._quorum = change
        self._reports.clear()
        self._restored.clear()
        lost = {who.global_rank for who in change.lost}
        for rank in self._ranks:
            self._forward(rank, payload)
        for rank in self._ranks:
            if rank.global_rank not in lost:
                continue
            if rank.needs_spawn:
                self._spawn(rank)
            elif rank.is_running and rank.has_raised:
                rank.is_given_up = True
                self._kill(rank)

    def _on_report(self, rank: _Rank, report: RankReport) -> None:
        if self._quorum is None or report.quorum_id != self._quorum.quorum_id:
            return
        self._reports[rank.global_rank] = report
        if len(self._reports) == len(self._ranks):
            reports = tuple(self._reports[global_rank] for global_rank in sorted(self._reports))
            self._send(protocol.NodeReports(self._quorum.quorum_id, reports))

    def _on_restored(self, rank: _Rank, message: protocol.Restored) -> None:
        """Newcomers are passed on at once, the others together: the controller hears once from most nodes."""
        quorum = self._quorum
        if quorum is None or message.quorum_id != quorum.quorum_id:
            return
        lost = {who.global_rank for who in quorum.lost}
        if rank.global_rank in lost:
            self._send(protocol.NodeRestored(quorum.quorum_id, (rank.global_rank,), message.timings_ms))
            return
        self._restored[rank.global_rank] = message.timings_ms
        if len(self._restored) < sum(r.global_rank not in lost for r in self._ranks):
            return
        slowest: dict[str, float] = {}
        for timings_ms in self._restored.values():
            for stage, duration_ms in timings_ms.items():
                slowest[stage] = max(duration_ms, slowest.get(stage, 0.0))
        self._send(protocol.NodeRestored(quorum.quorum_id, tuple(self._restored), slowest))

    # ------------------------------------------------------------------ the end of a rank
    def _on_exit(self, rank: _Rank, process: Process) -> None:
        woken_ns = clock.now_ns()
        if rank.channel is not None:
            self._on_channel(rank, rank.channel)
        pidfd = process.pidfd
        status = process.poll(kill_group=True)
        if status is None:
            return
        self._loop.remove(pidfd)
        if rank.channel is not None:
            self._loop.remove(rank.channel.fileno())
            rank.channel.close()
            rank.channel = None
        if rank.tail is not None:
            rank.tail.close()
            rank.tail = None
        rank.process = None
        rank.is_running = rank.is_listening = False
        if self._is_killing or self._is_stopping:
            self._check_idle()
        elif rank.is_given_up:
            self._spawn(rank)
        elif status == ExitStatus(0, is_signal=False):
            self._send(protocol.RankExited(rank.global_rank))
        else:
            rank.needs_spawn = True
            if not rank.has_raised:
                self._report_failure(rank, status, woken_ns)

    def _report_failure(self, rank: _Rank, status: ExitStatus, woken_ns: int) -> None:
        now_ns = clock.now_ns()
        reason = rank.verdict or str(status)
        detect_ms = rank.verdict_ms or (now_ns - woken_ns) / 1e6
        failure = protocol.Failure(
            protocol.LostRank(rank.global_rank, reason, now_ns),
            status.shell_code,
            rank.slot[Word.STATE] == RankState.FINISHED,
            detect_ms,
        )
        self._send(protocol.RanksFailed((failure,)))

    def _kill(self, rank: _Rank) -> None:
        if rank.process is not None:
            rank.process.send_signal(signal.SIGKILL)

    # ------------------------------------------------------------------ looking
    def _on_tick(self) -> None:
        for rank in self._ranks:
            if rank.tail is not None:
                rank.tail.pump()
        if not self._pool.is_expecting and all(r.process is not None for r in self._ranks if r.is_running):
            known = {r.process.pid for r in self._ranks if r.process is not None} | self._pool.pids
            reap_strangers(known | self._children_before)
        if not self._is_stopping and not self._is_killing:
            self._look_at_ranks()

    def _look_at_ranks(self) -> None:
        now_ns = clock.now_ns()
        faults = self._devices.take()
        beats = {rank.local_rank: rank.slot.heartbeat() for rank in self._ranks if rank.process is not None}
        num_waiting = sum(beat.waiting_since_ns > 0 for beat in beats.values())
        for rank in self._ranks:
            if rank.process is None or rank.verdict:
                continue
            beat = beats[rank.local_rank]
            look = Look(
                beat,
                is_stopped=rank.process.is_stopped(),
                device_faults=tuple(fault.reason for fault in faults if fault.local_rank == rank.local_rank),
                num_peers_waiting=num_waiting - (beat.waiting_since_ns > 0),
                num_peers=len(beats) - 1,
            )
            verdict, rank.memory = detect(now_ns, look, rank.memory, self._detector, interval_s=_TICK_S)
            if verdict.health is Health.HUNG:
                rank.verdict = verdict.reason
                rank.verdict_ms = verdict.silent_s * 1000
                self._kill(rank)

    # ------------------------------------------------------------------ stopping
    def _stop(self, order: protocol.StopAll) -> None:
        self._is_stopping = True
        self.exit_code = order.exit_code
        if order.reason and self._settings.node_rank != 0:
            self._tell(order.reason)
        for rank in self._ranks:
            if rank.process is not None and not rank.has_raised:
                rank.process.send_signal(order.signal_number)
        self._loop.call_later(order.grace_s, lambda: self._signal_all(signal.SIGKILL))
        self._check_idle()

    def _signal_all(self, number: int) -> None:
        for rank in self._ranks:
            if rank.process is not None:
                rank.process.send_signal(number)

    def _check_idle(self) -> None:
        if any(rank.is_running for rank in self._ranks):
            return
        if self._is_stopping:
            if not self.is_done:
                self._send(protocol.NodeIdle())
            self.is_done = True
        else:
            for rank in self._ranks:
                rank.slot.reset()
                rank.needs_spawn = False
            self._send(protocol.NodeIdle())

    def close(self) -> None:
        """End every process that is left below this one, and close everything."""
        self._devices.close()
        self._pool.close()
        self._loop.remove(self._socket)
        self._socket.close()
        deadline_s = clock.now_s() + _KILL_WAIT_S
        while (left := set(children()) - self._children_before) and clock.now_s() < deadline_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)
        become_subreaper(False)
        for rank in self._ranks:
            rank.slot.close()
            os.close(rank.slot.fd)
