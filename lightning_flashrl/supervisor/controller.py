"""One per job: forms quorums, collects reports, plans recoveries, holds the store, and decides when the job is over.

This file decides; it opens nothing. :class:`Controller` takes a time and a message and returns what to do;
``service.py`` carries that out.

================ ========================================== ===========================================
state            waits for                                  left when
================ ========================================== ===========================================
JOINING          agents of all nodes                        the last one said hello
RUNNING          faults, reports, exits                     a rank failed for good, or all left with 0
RESTARTING       all nodes idle                             then everything is launched again
STOPPING         all nodes idle                             then DONE
================ ========================================== ===========================================

A recovery, inside RUNNING: fault → quorum + 1 announced → reports of all ranks → plan → all ranks restored. A further
fault at any point begins it anew with the next quorum id; reports and answers with an older id are ignored.

Whose fault is it? An exit by signal, or with a status and without a report, is the machine's: the rank is replaced. A
reported exception is the user's: the job stops. Exception: while another rank is being replaced, an exception of a
*survivor* may just be a consequence, so the survivor is replaced too; if the error was its own, it comes back when the
replacement gets there. Errors of this package that stop a run (:class:`~lightning_flashrl.errors.FatalError`) always
stop it, and so do exceptions of the ranks being replaced.

A controller can be pickled, and is no more than what it was told so far: a successor that is told the same, at the same
times, is the same. Agents may say things again, to a successor or as a successor; that changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from lightning_flashrl import clock, errors
from lightning_flashrl.errors import FatalError, NoDonorError, RecoveryBudgetExhaustedError, UserCodeError
from lightning_flashrl.recovery.planner import plan_recovery
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.budget import DEFAULT_MAX_FAULTS, DEFAULT_WINDOW_S, FaultBudget
from lightning_flashrl.supervisor.ongoing import OngoingRecovery, describe
from lightning_flashrl.supervisor.protocol import Failure, LostRank, QuorumChange, RecoveryRecord
from lightning_flashrl.supervisor.store import Store, Waiter

_SIGTERM = 15
_SIGNALS_FROM = 128
"""Exit codes above tell of a signal."""
FAILURE_GRACE_S = 3.0
SIGNAL_GRACE_S = 10.0
NODE_SILENCE_S = 15.0
SLOW_RECOVERY_S = 30.0


class JobState(enum.Enum):
    """See the table at the top of the file."""

    JOINING = enum.auto()
    RUNNING = enum.auto()
    RESTARTING = enum.auto()
    STOPPING = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What the command line says of a job.

    Attributes:
        num_nodes: agents to wait for.
        max_restarts: faults allowed per ``restart_window_s``; ``None`` means 100 for a flash job, none for a plain one.
        restart_window_s: see above; ``None`` means an hour.
        uses_flash: whether the program names a flash strategy, so that a rank that dies before it used one is replaced.
        master_addr: for the script's environment.
        run_id: for the script's environment.
        hash_seed: ``PYTHONHASHSEED`` of all ranks.
    """

    num_nodes: int = 1
    max_restarts: int | None = None
    restart_window_s: float | None = None
    uses_flash: bool = False
    master_addr: str = "127.0.0.1"
    run_id: str = "none"
    hash_seed: str = "0"


# --------------------------------------------------------------------------- actions
@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to one node, or to all (``node_rank=None``)."""

    node_rank: int | None
    message: protocol.ToAgent


@dataclass(frozen=True, slots=True)
class Tell:
    """Show a line to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Write a recovery's record to the log."""

    record: RecoveryRecord


Action: TypeAlias = Send | Tell | Keep


# --------------------------------------------------------------------------- state
@dataclass(slots=True)
class _Node:
    num_ranks: int
    host: str
    token: str
    last_seen_ns: int
    first_rank: int = 0


class Controller:
    """The deciding part.

    Args:
        settings: of the job.
        choose_port: finds a free port for the script's environment.
    """

    def __init__(self, settings: JobSettings, choose_port: Callable[[], int]) -> None:
        self.state = JobState.JOINING
        self.exit_code = 0
        self.error: FatalError | None = None
        """Why the job failed, if it did."""
        self.quorum_id = 0
        self.num_records = 0
        """Recoveries told of in the log so far."""
        self._settings = settings
        self._choose_port = choose_port
        self._nodes: dict[int, _Node] = {}
        self._idle_nodes: set[int] = set()
        self._store = Store()
        self._budget = FaultBudget(
            DEFAULT_MAX_FAULTS if settings.max_restarts is None else settings.max_restarts,
            settings.restart_window_s or DEFAULT_WINDOW_S,
        )
        self._num_restarts = 0
        self._fallback: str | None = None
        self._newest_checkpoint: str | None = None
        self._resume_checkpoint: str | None = None
        self._recovery: OngoingRecovery | None = None
        self._change: QuorumChange | None = None
        self._record: RecoveryRecord | None = None
        self._stop_order: protocol.StopAll | None = None
        """The newest of each, for an agent that takes over."""
        self._uses_flash = settings.uses_flash
        self._exited: set[int] = set()
        self._ended: dict[int, int] = {}
        """The newest incarnation of each rank whose loss or exception was dealt with."""
        self._fits: dict[int, int] = {}
        """Fits that each rank has ended."""
        self._num_fits_over = 0
        """Fits that all ranks have ended."""
        self._world_size = 0
        self._port = 0
        self._now_ns = 0
        self._ticked_ns = 0
        self._actions: list[Action] = []

    @property
    def is_recovering(self) -> bool:
        """Whether a recovery is under way."""
        return self._recovery is not None

    @property
    def world_size(self) -> int:
        """Ranks of the job; 0 until all nodes have joined."""
        return self._world_size

    def handle(self, now_ns: int, node_rank: int, message: protocol.AgentMessage) -> list[Action]:
        """Take in one message of a node that has joined (:meth:`join`) and return what to do."""
        self._now_ns = now_ns
        self._nodes[node_rank].last_seen_ns = now_ns
        match message:
            case protocol.FromRank():
                self._on_rank_message(node_rank, message)
            case protocol.NodeReports():
                self._on_reports(message)
            case protocol.NodeRestored():
                self._on_restored(message)
            case protocol.RanksFailed(failures=failures):
                for failure in failures:
                    self._on_failure(failure)
            case protocol.RankAware(spawn_ms=spawn_ms, global_rank=global_rank):
                self._uses_flash = True
                if self._recovery is not None and global_rank in self._recovery.lost:
                    self._recovery.note({"spawn": spawn_ms})
            case protocol.RankExited(global_rank=global_rank):
                self._on_exited(global_rank)
            case protocol.NodeIdle():
                self._on_idle(node_rank)
            case protocol.StopAsked(signal_number=number):
                self._stop(128 + number, "", signal_number=number, grace_s=SIGNAL_GRACE_S)
            case protocol.AgentBeat():
                self._send(node_rank, message)
            case protocol.AgentHello():
                pass
        return self._take()

    def tick(self, now_ns: int) -> list[Action]:
        """Look at what time alone decides."""
        self._now_ns = now_ns
        was_away = now_ns - self._ticked_ns > NODE_SILENCE_S * 1e9 / 2
        self._ticked_ns = now_ns
        if was_away:  # this process did not run; messages of nodes are waiting to be read
            for node in self._nodes.values():
                node.last_seen_ns = now_ns
        if self.state is JobState.STOPPING:
            for node_rank, node in sorted(self._nodes.items()):
                if now_ns - node.last_seen_ns > NODE_SILENCE_S * 1e9:
                    self._on_idle(node_rank)
        if self.state in (JobState.RUNNING, JobState.RESTARTING):
            for node_rank, node in sorted(self._nodes.items()):
                if now_ns - node.last_seen_ns > NODE_SILENCE_S * 1e9:
                    self._idle_nodes.add(node_rank)
                    self._fail(
                        f"node {node_rank} ({node.host}) has been silent for {NODE_SILENCE_S:g} s; the job stops"
                    )
                    break
        recovery = self._recovery
        if recovery is not None and not recovery.is_overdue and now_ns - recovery.began_ns > SLOW_RECOVERY_S * 1e9:
            recovery.is_overdue = True
            missing = recovery.describe_missing(self._world_size)
            self._tell(f"quorum {self.quorum_id}: still waiting after {SLOW_RECOVERY_S:g} s for {missing}")
        return self._take()

    # ------------------------------------------------------------------ joining
    def join(self, now_ns: int, hello: protocol.AgentHello) -> tuple[int, list[Action]]:
        """Give a node its rank; -1 refuses it. The last one launches the job.

        An agent that takes over from another one of its node, or says hello again to a new controller, is told how
        things stand.
        """
        self._now_ns = now_ns
        for known_rank, node in self._nodes.items():
            if hello.token and node.token == hello.token:
                node.last_seen_ns = now_ns
                self._catch_up(known_rank)
                return known_rank, self._take()
        node_rank = hello.node_rank
        if node_rank < 0:
            node_rank = next((n for n in range(self._settings.num_nodes) if n not in self._nodes), -1)
        if (
            self.state is not JobState.JOINING
            or node_rank in self._nodes
            or not 0 <= node_rank < self._settings.num_nodes
        ):
            return -1, []
        self._nodes[node_rank] = _Node(hello.num_ranks, hello.host, hello.token, now_ns)
        if len(self._nodes) == self._settings.num_nodes:
            for rank in sorted(self._nodes):
                self._nodes[rank].first_rank = self._world_size
                self._nodes[rank].last_seen_ns = now_ns
                self._world_size += self._nodes[rank].num_ranks
            self._launch()
        return node_rank, self._take()

    def _launch(self) -> None:
        self.state = JobState.RUNNING
        self._port = self._choose_port()
        for node_rank in sorted(self._nodes):
            self._send_launch(node_rank)

    def _send_launch(self, node_rank: int) -> None:
        self._send(
            node_rank,
            protocol.Launch(
                node_rank=node_rank,
                first_rank=self._nodes[node_rank].first_rank,
                world_size=self._world_size,
                incarnation=self._num_restarts,
                master_addr=self._settings.master_addr,
                master_port=self._port,
                run_id=self._settings.run_id,
                hash_seed=self._settings.hash_seed,
                resume_checkpoint=self._resume_checkpoint,
            ),
        )

    def _catch_up(self, node_rank: int) -> None:
        """Say again what the node's agent, or its ranks, may have missed; what they know already changes nothing."""
        if self.state is JobState.RUNNING:
            self._send_launch(node_rank)
            plan = None if self._recovery is None or self._recovery.plan is None else self._recovery.plan
            messages: tuple[protocol.ToAgent | None, ...] = (
                self._change,
                None if plan is None else protocol.PlanReady(plan),
                self._record,
                protocol.AllFinished(self._num_fits_over) if self._num_fits_over else None,
            )
            for message in messages:
                if message is not None:
                    self._send(node_rank, message)
        elif self.state is JobState.RESTARTING:
            self._send(node_rank, protocol.KillAll())
        elif self._stop_order is not None:
            self._send(node_rank, self._stop_order)
        self._send(node_rank, protocol.Resync())

    # ------------------------------------------------------------------ faults
    def _on_failure(self, failure: Failure) -> None:
        lost = failure.lost
        if self.state is not JobState.RUNNING or not self._is_news(lost.global_rank, lost.incarnation):
            return
        if self._num_fits_over > protocol.PROGRAM_END and failure.exit_code > _SIGNALS_FROM:
            self._on_exited(lost.global_rank)  # the programs of all ranks are over: nothing is lost with it
        elif not self._uses_flash:
            self._restart_plain(f"rank {lost.global_rank} {lost.reason}", failure.exit_code)
        elif self._exited:
            self._without_donor(
                f"rank {lost.global_rank} was lost when other ranks had already left the program ({lost.reason}), so "
                "nobody can give it state",
                "resume from the newest checkpoint or run that part again",
            )
        else:
            self._begin_recovery(lost, failure.detect_ms)

    def _is_news(self, global_rank: int, incarnation: int) -> bool:
        """Whether this process's end was not dealt with before; now it is."""
        if incarnation <= self._ended.get(global_rank, -1):
            return False
        self._ended[global_rank] = incarnation
        return True

    def _begin_recovery(self, lost: LostRank, detect_ms: float) -> None:
        if self._budget.is_exhausted_by(self._now_ns / 1e9):
            error = RecoveryBudgetExhaustedError(
                self._budget.num_faults, self._budget.max_faults, self._budget.window_s, self._newest_checkpoint
            )
            self._tell(f"rank {lost.global_rank} lost: {lost.reason}")
            self._fail(f"RecoveryBudgetExhaustedError: {error}", error=error)
            return
        unrestored: dict[int, LostRank] = {}
        if self._recovery is not None:
            unrestored = self._recovery.unrestored()
            self._end_recovery(self._recovery, is_complete=False)
        self.quorum_id += 1
        unrestored[lost.global_rank] = lost
        self._recovery = OngoingRecovery(self.quorum_id, unrestored, self._now_ns, {"detect": detect_ms})
        if self._fits.get(lost.global_rank, 0) > self._num_fits_over:  # its replacement has to end that fit again
            self._fits[lost.global_rank] = self._num_fits_over
        self._store.drop_before(self.quorum_id)
        self._change = QuorumChange(self.quorum_id, tuple(unrestored.values()))
        self._send(None, self._change)
        self._tell(
            f"rank {lost.global_rank} lost: {lost.reason}; it is replaced, the others wait (quorum {self.quorum_id})"
        )

    def _on_reports(self, message: protocol.NodeReports) -> None:
        recovery = self._recovery
        if recovery is None or message.quorum_id != self.quorum_id or recovery.plan is not None:
            return
        for report in message.reports:
            recovery.reports[report.global_rank] = report
        if len(recovery.reports) == self._world_size:
            self._plan(recovery)

    def _plan(self, recovery: OngoingRecovery) -> None:
        recovery.note({"report": (self._now_ns - recovery.began_ns) / 1e6})
        began_ns = clock.now_ns()
        try:
            plan = plan_recovery(self.quorum_id, recovery.reports, self._newest_checkpoint)
        except NoDonorError as error:
            self._without_donor(f"NoDonorError: {error}", "", error)
            return
        recovery.plan = plan
        self._send(None, protocol.PlanReady(plan))
        recovery.note({"plan": (clock.now_ns() - began_ns) / 1e6})

    def _on_restored(self, message: protocol.NodeRestored) -> None:
        recovery = self._recovery
        if recovery is None or message.quorum_id != self.quorum_id:
            return
        recovery.restored.update(message.global_ranks)
        recovery.note(message.timings_ms)
        if len(recovery.restored) == self._world_size:
            self._recovery = None
            self._end_recovery(recovery, is_complete=True)

    def _end_recovery(self, recovery: OngoingRecovery, *, is_complete: bool) -> None:
        record = recovery.record(self._now_ns, is_complete=is_complete)
        self.num_records += 1
        self._record = record
        self._actions.append(Keep(record))
        self._send(None, record)
        self._tell(describe(record))

    def _without_donor(self, text: str, remedy: str, error: FatalError | None = None) -> None:
        """In-place recovery is impossible: fall back to a checkpoint when the user wants that, else stop."""
        if self._fallback == "last" and self._newest_checkpoint is not None:
            self._resume_checkpoint = self._newest_checkpoint
            self._tell(f"{text}\n→ everything starts again from {self._newest_checkpoint}")
            self._restart_all()
        else:
            self._fail(f"{text}; {remedy}" if remedy else text, error=error)

    # ------------------------------------------------------------------ exceptions and exits
    def _on_raised(self, global_rank: int, incarnation: int, raised: protocol.Raised) -> None:
        if self.state is not JobState.RUNNING or not self._is_news(global_rank, incarnation):
            return
        if self._uses_flash and self._may_be_consequence(global_rank, raised.traceback):
            last = raised.traceback.strip().rpartition("\n")[2]
            reason = f"raised while another rank was being replaced: {last}"
            self._begin_recovery(LostRank(global_rank, reason, self._now_ns, incarnation), 0.0)
            return
        error = UserCodeError(global_rank, raised.traceback.rstrip())
        if self._uses_flash:
            self._fail(str(error), exit_code=raised.exit_code, error=error)
        else:
            self._restart_plain(str(error), raised.exit_code)

    def _may_be_consequence(self, global_rank: int, traceback: str) -> bool:
        if self._recovery is None or global_rank in self._recovery.lost:
            return False
        last = traceback.strip().rpartition("\n")[2]
        kind = getattr(errors, last.partition(":")[0].removeprefix(f"{errors.__name__}."), None)
        return not (isinstance(kind, type) and issubclass(kind, errors.FatalError))

    def _restart_plain(self, text: str, exit_code: int) -> None:
        """As torchrun does: a failure of one rank ends all, and all start again while restarts are left."""
        if self._num_restarts < (self._settings.max_restarts or 0):
            self._tell(f"{text}\n→ all ranks start again ({self._num_restarts + 1} of {self._settings.max_restarts})")
            self._restart_all()
        else:
            self._fail(text, exit_code=exit_code)

    def _restart_all(self) -> None:
        self.state = JobState.RESTARTING
        self._num_restarts += 1
        self.quorum_id = 0
        self._recovery = self._change = self._record = None
        self._store.begin_anew()
        self._exited.clear()
        self._fits.clear()
        self._num_fits_over = 0
        self._idle_nodes.clear()
        self._send(None, protocol.KillAll())

    def _on_exited(self, global_rank: int) -> None:
        self._exited.add(global_rank)
        if len(self._exited) == self._world_size and self.state is JobState.RUNNING:
            self._stop(0, "", signal_number=_SIGTERM, grace_s=0.0)

    def _on_idle(self, node_rank: int) -> None:
        if self.state in (JobState.RESTARTING, JobState.STOPPING):
            self._idle_nodes.add(node_rank)
        if len(self._idle_nodes) < len(self._nodes):
            return
        if self.state is JobState.RESTARTING:
            self._launch()
        elif self.state is JobState.STOPPING:
            self.state = JobState.DONE

    def _fail(self, text: str, *, exit_code: int = 1, error: FatalError | None = None) -> None:
        self.error = error or FatalError(text)
        self._stop(exit_code or 1, text, signal_number=_SIGTERM, grace_s=FAILURE_GRACE_S)

    def _stop(self, exit_code: int, text: str, *, signal_number: int, grace_s: float) -> None:
        if self.state in (JobState.STOPPING, JobState.DONE):
            return
        self.state = JobState.STOPPING if self._nodes else JobState.DONE
        self.exit_code = exit_code
        if text:
            self._tell(text)
        self._stop_order = protocol.StopAll(exit_code, signal_number, grace_s, text)
        self._send(None, self._stop_order)

    # ------------------------------------------------------------------ ranks
    def _on_rank_message(self, node_rank: int, envelope: protocol.FromRank) -> None:
        global_rank = envelope.global_rank
        match envelope.message:
            case protocol.StoreSet(request_id=request_id, key=key, value=value):
                for waiter in self._store.set(key, value):
                    self._answer(waiter, value)
                self._answer(Waiter(node_rank, global_rank, request_id), b"")
            case protocol.StoreGet(request_id=request_id, key=key):
                waiter = Waiter(node_rank, global_rank, request_id)
                found = self._store.get(key, waiter)
                if found is not None:
                    self._answer(waiter, found)
            case protocol.Finished(fit=fit):
                self._fits[global_rank] = max(fit + 1, self._fits.get(global_rank, 0))
                self._num_fits_over = min(self._fits.get(rank, 0) for rank in range(self._world_size))
                if self._num_fits_over > fit:
                    self._send(None, protocol.AllFinished(self._num_fits_over))
            case protocol.CheckpointSaved(path=path):
                self._newest_checkpoint = path
            case protocol.Raised() as raised:
                self._on_raised(global_rank, envelope.incarnation, raised)
            case protocol.PolicySet() as policy:
                self._set_policy(policy)

    def _set_policy(self, policy: protocol.PolicySet) -> None:
        self._fallback = policy.fallback if policy.fallback is not None else self._fallback
        if policy.max_faults is not None and self._settings.max_restarts is None:
            self._budget.max_faults = policy.max_faults
        if policy.window_s is not None and self._settings.restart_window_s is None:
            self._budget.window_s = policy.window_s

    def _answer(self, waiter: Waiter, value: bytes) -> None:
        self._send(
            waiter.node_rank, protocol.ToOneRank(waiter.global_rank, protocol.StoreValue(waiter.request_id, value))
        )

    # ------------------------------------------------------------------ actions
    def _send(self, node_rank: int | None, message: protocol.ToAgent) -> None:
        self._actions.append(Send(node_rank, message))

    def _tell(self, text: str) -> None:
        self._actions.append(Tell(text))

    def _take(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions
