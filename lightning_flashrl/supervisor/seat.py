"""A rank's seat on its node, and how the next process gets onto it."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lightning_flashrl import clock
from lightning_flashrl.messaging.packets import PacketChannel
from lightning_flashrl.recovery.detector import DetectorSettings, Memory
from lightning_flashrl.recovery.slot import RankSlot, RankState, Region, Word
from lightning_flashrl.supervisor import protocol, runner
from lightning_flashrl.supervisor.environment import RankEnvironment
from lightning_flashrl.supervisor.pool import StandbyPool
from lightning_flashrl.supervisor.process import Process
from lightning_flashrl.supervisor.protocol import Failure, Launch
from lightning_flashrl.supervisor.root_link import Holding, RootLink, encode_environ
from lightning_flashrl.supervisor.tail import LogTail


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
        token: what tells the controller that an agent is another one's successor.
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
    token: str = ""


@dataclass(slots=True, eq=False)
class Seat:
    """One local rank, over all its incarnations.

    Attributes:
        local_rank: number on the node.
        slot: its shared memory, which outlives its processes.
        global_rank: number in the job.
        incarnation: how many processes held the seat before the present one.
        launched: the incarnation before the first of the present launch.
        is_newcomer: whether the present process replaces another in a running job.
        channel: to the present process.
        process: the present process; ``None`` also while a standby is forking it.
        is_running: whether a process was ordered and its end was not handled yet.
        is_listening: whether the process said hello: it takes part in quorums.
        has_raised: whether it reported an exception.
        is_given_up: whether the controller counts it as lost although it runs; it is replaced when it is gone.
        has_left: whether it ended with status 0.
        failure: how it ended otherwise.
        verdict: why it was killed, if it was.
        verdict_ms: for how long it had been silent then.
        ordered_ns: when the present process was ordered.
        memory: the detector's.
        tail: shows its log.
    """

    local_rank: int
    slot: RankSlot
    global_rank: int = -1
    incarnation: int = -1
    launched: int = -1
    is_newcomer: bool = False
    channel: PacketChannel | None = None
    process: Process | None = None
    is_running: bool = False
    is_listening: bool = False
    has_raised: bool = False
    is_given_up: bool = False
    has_left: bool = False
    failure: Failure | None = None
    verdict: str = ""
    verdict_ms: float = 0.0
    ordered_ns: int = 0
    memory: Memory | None = None
    tail: LogTail | None = None

    @property
    def name(self) -> str:
        """What the root holds it by."""
        return f"rank{self.local_rank}"

    @property
    def is_waiting_for_launch(self) -> bool:
        """Whether no process of the present launch was ordered yet."""
        return self.incarnation == self.launched

    def begin(self, *, is_newcomer: bool) -> None:
        """Prepare the seat and its slot for the next process."""
        self.incarnation += 1
        self.is_newcomer = is_newcomer
        self.slot.begin_incarnation(0, self.incarnation)
        self.is_running, self.is_listening = True, False
        self.has_raised = self.is_given_up = self.has_left = False
        self.failure = None
        self.verdict, self.verdict_ms, self.memory = "", 0.0, None
        self.ordered_ns = clock.now_ns()

    def take_over(self, holding: Holding, link: RootLink) -> None:
        """Go on with the process that a predecessor of this agent has put here."""
        slot = self.slot
        self.incarnation, self.is_running = holding.number, True
        self.is_listening = bool(slot[Word.AWARE])
        self.has_raised = slot.read(Region.RAISED) is not None
        self.ordered_ns = clock.now_ns()
        self.channel = PacketChannel(socket.socket(fileno=holding.fd))
        if holding.status is None and holding.note and not slot[Word.PID]:
            self.channel.send(holding.note)  # the predecessor may have died before it sent the order
        pid = holding.pid or slot[Word.PID]
        if pid and holding.status is None:
            with contextlib.suppress(ProcessLookupError):
                self.process = link.process(pid)
                link.hold(self.name, self.incarnation, pid=pid)

    @property
    def has_own_log(self) -> bool:
        """Whether the slot knows of the log of the present incarnation how much was shown."""
        return self.slot[Word.INCARNATION] == self.incarnation and self.slot[Word.STATE] != RankState.EMPTY

    def end(self) -> None:
        """Close what belonged to the process that is gone."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.tail is not None:
            self.tail.close()
            self.tail = None
        self.process = None
        self.is_running = self.is_listening = False


class Starter:
    """Puts processes onto seats: from standby when one is ready, cold otherwise.

    Args:
        settings: of the node.
        environment: of the ranks.
        pool: processes on standby.
        show: shows a block of rank output.
        link: to the root, which holds the processes.
    """

    def __init__(
        self,
        settings: AgentSettings,
        environment: RankEnvironment,
        pool: StandbyPool,
        show: Callable[[str], None],
        link: RootLink,
    ) -> None:
        self._link = link
        self._settings = settings
        self._environment = environment
        self._pool = pool
        self._show = show

    def start(self, seat: Seat, launch: Launch) -> None:
        """Start the seat's present incarnation; sets its channel and, once it is known, its process."""
        candidate = self._pool.take() if self._settings.is_python else None
        if candidate is None:
            self.start_cold(seat, launch)
            return
        seat.channel, seat.process = candidate.channel, candidate.process
        log_path = self._open_log(seat)
        order = protocol.encode(
            protocol.Order(
                encode_environ(self._environ(seat, launch)),
                list(map(os.fsencode, self._settings.argv)),
                self._settings.is_module,
                None if log_path is None else os.fsencode(log_path),
            )
        )
        pid = 0 if seat.process is None else seat.process.pid
        self._link.hold(seat.name, seat.incarnation, pid=pid, note=order, fd=seat.channel.fileno())
        seat.channel.send(order)

    def start_cold(self, seat: Seat, launch: Launch) -> None:
        """Start the seat's present incarnation as a fresh interpreter."""
        environ = self._environ(seat, launch) | {"FLASHRL_ROOT_PID": str(self._link.root_pid)}
        log_path = self._open_log(seat)
        if log_path is not None:
            environ["FLASHRL_LOG_PATH"] = log_path
        if not self._settings.is_python:
            environ["FLASHRL_NO_PYTHON"] = "1"
        flags = ["-m"] if self._settings.is_module else []
        command = [sys.executable, "-m", runner.__name__, *flags, *self._settings.argv]
        seat.process, sock = self._link.spawn(seat.name, seat.incarnation, command, environ, "FLASHRL_CONTROL_FD")
        seat.channel = PacketChannel(sock)

    def _environ(self, seat: Seat, launch: Launch) -> dict[str, str]:
        return self._environment.of_rank(launch, seat.local_rank, seat.incarnation, is_newcomer=seat.is_newcomer)

    def take_over_log(self, seat: Seat) -> None:
        """Go on showing the log of a process that a predecessor has started."""
        if seat.has_own_log:
            self._open_log(seat)

    def _open_log(self, seat: Seat) -> str | None:
        settings = self._settings
        if settings.log_dir is None:
            return None
        path = os.path.join(settings.log_dir, f"rank{seat.global_rank}", f"incarnation{seat.incarnation}.log")
        if settings.show_ranks is None or seat.local_rank in settings.show_ranks:
            seat.tail = LogTail(path, f"[rank{seat.global_rank}]: ", self._show, seat.slot)
        return path

    def remove_old_logs(self, seats: Iterable[Seat]) -> None:
        """Make room: a log directory holds one job, and an earlier one's logs are not mistaken for this one's."""
        if self._settings.log_dir is not None:
            for seat in seats:
                folder = os.path.join(glob.escape(self._settings.log_dir), f"rank{seat.global_rank}")
                for path in glob.glob(f"{folder}/incarnation*.log"):
                    os.remove(path)
