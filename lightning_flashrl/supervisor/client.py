"""A rank's side of the supervisor: its slots, its messages, its signs of life.

Threads of a rank that belong to this file:

======== ==================================== ==============================
thread   waits for                            unblocked by
======== ==================================== ==============================
receiver a frame from the agent               the agent, or :meth:`RankClient.close`
beat     50 ms                                :meth:`RankClient.close`
======== ==================================== ==============================

Importing this file loads neither torch nor Lightning.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.errors import RankLostError
from lightning_flashrl.recovery.slot import RankSlot, Word
from lightning_flashrl.supervisor import protocol, runner
from lightning_flashrl.supervisor.channel import RankChannel, rank_channel
from lightning_flashrl.supervisor.protocol import QuorumChange, RecoveryRecord
from lightning_flashrl.types import RankReport, RecoveryPlan

BEAT_INTERVAL_S = 0.05
_ABORT_CHECK_S = 0.05
_SUPERVISOR_PATIENCE_S = 600.0
"""An abort event is looked at after every callback, and at least this often."""


class RankClient:
    """What a rank of a job under ``flashrun`` knows of its job.

    Attributes:
        global_rank: number of this rank in the job.
        local_rank: number of this rank on its node.
        world_size: ranks of the job.
        local_world_size: ranks of this node.
        node_rank: number of the node.
        incarnation: how many processes held this rank before.
        is_newcomer: whether it replaces a rank of a running job; ``False`` also when the whole job starts again.
        slot: this rank's shared memory.
        local_slots: slots of all ranks of this node, by global rank.
        log_dir: where ``flashrun --log-dir`` keeps logs.
    """

    _of_process: RankClient | None = None

    def __init__(self, channel: RankChannel, slots: dict[int, RankSlot]) -> None:
        self.global_rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self.node_rank = int(os.environ["GROUP_RANK"])
        self.incarnation = int(os.environ["FLASHRL_INCARNATION"])
        self.is_newcomer = os.environ["FLASHRL_IS_NEWCOMER"] == "1"
        self.local_slots = slots
        self.slot = slots[self.global_rank]
        self.log_dir = os.environ.get("FLASHRL_LOG_DIR")
        self._channel = channel
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._wake_read, self._wake_write = -1, -1
        self._answered = threading.Condition()
        self._answers: dict[int, bytes | None] = {}
        self._standing_lock = threading.Lock()
        self._standing: dict[str, protocol.Message] = {}
        """What a new supervisor must be told, by kind: of each the newest."""
        self._unanswered: dict[int, protocol.StoreSet | protocol.StoreGet] = {}
        self._next_request = self.incarnation << 32
        """Not one that a process before this one may have waited for."""
        self._fits_changed = threading.Condition()
        self._num_fits = 0
        self._num_fits_over = 0
        self._quorum: QuorumChange | None = None
        self._planned = self._recorded = -1
        """Newest quorums whose plan and whose end this process was told of; a new supervisor tells them again."""

    @classmethod
    def from_environ(cls) -> RankClient | None:
        """Return this process's client, or ``None`` when it does not run under ``flashrun``.

        The slots are mapped; threads begin with :meth:`start`. A process has one client: later calls return it again.
        """
        slot_fds = os.environ.get("FLASHRL_SLOT_FDS")
        channel = rank_channel()
        if slot_fds is None or channel is None:
            return None
        if cls._of_process is None:
            region_bytes = int(os.environ["FLASHRL_SLOT_REGION_BYTES"])
            pairs = (pair.split(":") for pair in slot_fds.split(","))
            slots = {int(global_rank): RankSlot(int(fd), region_bytes) for global_rank, fd in pairs}
            cls._of_process = cls(channel, slots)
        return cls._of_process

    # ------------------------------------------------------------------ life
    def start(
        self,
        *,
        on_quorum_change: Callable[[QuorumChange], None],
        on_plan: Callable[[RecoveryPlan], None],
        on_event: Callable[[RecoveryRecord], None],
        is_host_only: bool = False,
    ) -> None:
        """Tell the agent that a flash strategy runs here, and begin to receive and to beat.

        Args:
            on_quorum_change: told of each quorum.
            on_plan: told of the plan of the newest quorum.
            on_event: told of each recovery that ended.
            is_host_only: the process holds no device that a replacement would need, so that it may be replaced while
                the kernel still takes its memory apart.

        Callbacks run on the receiver thread, one after the other. A rank that starts while a quorum is being formed
        gets ``on_quorum_change`` right away.
        """
        self._on_quorum_change = on_quorum_change
        self._on_plan = on_plan
        self._on_event = on_event
        self.slot.beat_thread()
        self.slot[Word.AWARE] = 1
        if not self._threads:
            self._stop.clear()
            self._wake_read, self._wake_write = os.pipe()
            self._threads = [
                threading.Thread(target=self._receive, name="flashrl-receiver", daemon=True),
                threading.Thread(target=self._beat, name="flashrl-beat", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
            if is_host_only:
                self.slot[Word.WATCHED_THREAD] = self._threads[1].native_id or 0
        self._state(protocol.Hello(self.incarnation))

    def close(self) -> None:
        """Stop the threads. The rank stays supervised; :meth:`start` may be called again."""
        if not self._threads:
            return
        self._stop.set()
        os.write(self._wake_write, b"x")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
        self.slot[Word.AWARE] = 0
        os.close(self._wake_read)
        os.close(self._wake_write)

    # ------------------------------------------------------------------ recovery
    def send_report(self, report: RankReport) -> None:
        """Hand in this rank's part of the planner's input."""
        self._state(protocol.Report(report))

    def send_restored(self, quorum_id: int, timings_ms: dict[str, float]) -> None:
        """Say that this rank is through with a recovery, and what took how long."""
        self._state(protocol.Restored(quorum_id, timings_ms))

    # ------------------------------------------------------------------ store
    def store_set(self, key: str, value: bytes) -> None:
        """Put ``value`` into the job's store.

        Keys ``q{id}/…`` vanish when their quorum is history. When the whole job starts again all others do, too, but
        ``kept/…``: these are found under ``before/kept/…`` then.
        """
        self._ask(lambda request_id: protocol.StoreSet(request_id, key, value))

    def store_get(self, key: str, timeout_s: float, abort: threading.Event | None = None) -> bytes:
        """Return the value of ``key``, waiting until somebody sets it.

        Raises:
            TimeoutError: nobody did within ``timeout_s``.
            RankLostError: ``abort`` was set meanwhile.
        """
        deadline_s = clock.now_s() + timeout_s
        request_id = self._ask(lambda request_id: protocol.StoreGet(request_id, key))
        with self._answered:
            try:
                while (value := self._answers[request_id]) is None:
                    if abort is not None and abort.is_set():
                        raise self._rank_lost(key)
                    left_s = deadline_s - clock.now_s()
                    if left_s <= 0:
                        raise TimeoutError(f"store key {key!r} was not set within {timeout_s:g} s")
                    self._answered.wait(left_s if abort is None else min(left_s, _ABORT_CHECK_S))
            finally:
                del self._answers[request_id]
                self._unanswered.pop(request_id, None)
        return value

    def store_find(self, key: str) -> bytes | None:
        """Return the value of ``key``, or ``None`` if nobody has set it, as soon as the controller has answered."""
        request_id = self._ask(lambda request_id: protocol.StoreGet(request_id, key))
        asked = f"asked/{self.global_rank}/{request_id}"
        self.store_set(asked, b"")  # it answers in the order in which it is asked
        self.store_get(asked, _SUPERVISOR_PATIENCE_S)
        with self._answered:
            self._unanswered.pop(request_id, None)
            return self._answers.pop(request_id)

    def _rank_lost(self, key: str) -> RankLostError:
        if self._quorum is not None and self._quorum.lost:
            lost = self._quorum.lost[0]
            return RankLostError(lost.global_rank, lost.reason)
        return RankLostError(-1, f"waiting for store key {key!r} was aborted")

    # ------------------------------------------------------------------ what the controller should know
    def note_checkpoint(self, path: str) -> None:
        """Remember ``path`` as the newest checkpoint of the job."""
        self._state(protocol.CheckpointSaved(path))

    def set_policy(
        self, *, max_faults: int | None, window_s: float | None, fallback: str | None, hang_timeout_s: float | None
    ) -> None:
        """Pass the user's wishes on. Flags given to ``flashrun`` win over them."""
        self._state(protocol.PolicySet(max_faults, window_s, fallback, hang_timeout_s))

    def report_exception(self, traceback_text: str) -> None:
        """Say that user code raised here: the job stops. On return the message has left this process."""
        runner.report(protocol.Raised(traceback_text))

    def finish(self, fit: int = 0) -> None:
        """Say that fit number ``fit`` of this rank's program is over; it can still be a donor."""
        self._num_fits = fit + 1
        self._state(protocol.Finished(fit))

    def wait_all_finished(self, timeout_s: float | None = None) -> bool:
        """Wait until all ranks said :meth:`finish` of that fit; return whether they did."""
        with self._fits_changed:
            return self._fits_changed.wait_for(lambda: self._num_fits_over >= self._num_fits, timeout_s)

    # ------------------------------------------------------------------ threads
    def _send(self, message: protocol.Message) -> None:
        self._channel.send(protocol.encode(message))

    def _state(self, message: protocol.Message) -> None:
        """Say what stays true until something of the same kind is said."""
        with self._standing_lock:
            self._standing[type(message).__name__] = message
        self._send(message)

    def _ask(self, make: Callable[[int], protocol.StoreSet | protocol.StoreGet]) -> int:
        """Send a request, which is sent again to a new supervisor until it is answered."""
        with self._answered:
            request_id = self._next_request
            self._next_request += 1
            request = self._unanswered[request_id] = make(request_id)
            if isinstance(request, protocol.StoreGet):
                self._answers[request_id] = None
        self._send(request)
        return request_id

    def _say_again(self) -> None:
        with self._standing_lock:
            standing = list(self._standing.values())
        with self._answered:
            requests = list(self._unanswered.values())
        for message in (*standing, *requests):
            self._send(message)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_INTERVAL_S):
            self.slot.beat_thread()

    def _receive(self) -> None:
        poller = select.poll()
        poller.register(self._channel.fileno(), select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while not self._stop.is_set():
            if any(fd == self._wake_read for fd, _ in poller.poll()):
                return
            payloads = self._channel.receive()
            if payloads is None:
                return
            for payload in payloads:
                try:
                    message = protocol.decode_to_rank(payload)
                except msgspec.MsgspecError:
                    continue
                self._dispatch(message)

    def _dispatch(self, message: protocol.ToRank) -> None:
        known = -1 if self._quorum is None else self._quorum.quorum_id
        match message:
            case protocol.Resync():
                self._say_again()
            case protocol.StoreValue(request_id=request_id, value=value):
                with self._answered:
                    self._unanswered.pop(request_id, None)
                    if request_id in self._answers:
                        self._answers[request_id] = value
                    self._answered.notify_all()
            case QuorumChange(quorum_id=quorum_id) if quorum_id > known:
                self._quorum = message
                self._on_quorum_change(message)
                with self._answered:
                    self._answered.notify_all()
            case protocol.PlanReady(plan=plan) if plan.quorum_id == known > self._planned:
                self._planned = known
                self._on_plan(plan)
            case RecoveryRecord(quorum_id=quorum_id) if quorum_id > self._recorded:
                self._recorded = quorum_id
                self._on_event(message)
            case protocol.AllFinished(num_fits=num_fits):
                with self._fits_changed:
                    self._num_fits_over = max(num_fits, self._num_fits_over)
                    self._fits_changed.notify_all()
            case _:
                pass
