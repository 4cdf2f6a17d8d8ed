"""The rank's side of a recovery: when to publish, when to commit, what to do when the quorum changes.

Owns one loop, the recovery thread:

| state               | waits for                                   | unblocked by                                   |
|---------------------|---------------------------------------------|------------------------------------------------|
| idle                | a change of quorum                          | the supervisor                                 |
| parking             | the program to need the lost rank           | its next collective or commit                  |
| planning            | the plan                                    | all ranks having reported                      |
| rebuilding          | all members                                 | their arrival, or the next change of quorum    |
| giving (donor)      | its own update to end; the newcomer         | the program; the newcomer's receive            |
| redoing             | collectives issued again                    | the newcomer taking part                       |

The program's thread meets it in four places: a collective (it holds there), :meth:`RecoveryRuntime.await_commit` (it
waits for all ranks to be ready), :meth:`RecoveryRuntime.enter` (a newcomer's entry into training) and
:meth:`RecoveryRuntime.finish_fit` (all ranks leave together).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import Backend

from lightning_flashrl import clock
from lightning_flashrl.communicator.base import Transport
from lightning_flashrl.communicator.communicator import Communicator
from lightning_flashrl.communicator.holding import DEFAULT_GROUP, HoldingProcessGroup
from lightning_flashrl.communicator.install import make_default
from lightning_flashrl.errors import NoDonorError
from lightning_flashrl.recovery.bulk import Snapshot, StoredBulk
from lightning_flashrl.recovery.faults import Fault, FaultTrigger
from lightning_flashrl.recovery.slot import RankSlot, RankState, Region, Word
from lightning_flashrl.recovery.snapshot import tensor_bytes, tensor_from_bytes
from lightning_flashrl.strategies import transfer
from lightning_flashrl.strategies.transfer import Arrival
from lightning_flashrl.supervisor.allocator import keep_freed_memory
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.protocol import PROGRAM_END, QuorumChange, RecoveryRecord
from lightning_flashrl.types import Phase, RankReport, RecoveryPlan, ResumeKind, ResumePoint, StepTag

_COMMIT_BUFFERS = (Region.COMMIT_A, Region.COMMIT_B)
_MID_BUFFERS = (Region.MID_A, Region.MID_B)
_WITHIN_BATCH = frozenset({Phase.FORWARD, Phase.BACKWARD, Phase.ALL_REDUCE, Phase.COMMIT, Phase.OPTIMIZER_STEP})


@dataclass(frozen=True, slots=True)
class Published:
    """A resume point read back from a slot.

    Attributes:
        ordinal: publications of the rank up to this one.
        point: where in the program.
        facts: small values that a replacement needs before it has set up anything (logger versions, …).
        schema: of the frozen state.
        content: the frozen state, without large tensors.
        bulk: the large tensors, still in the slot.
    """

    ordinal: int
    point: ResumePoint
    facts: dict[str, Any]
    schema: bytes
    content: bytes
    bulk: StoredBulk


@dataclass(frozen=True, slots=True)
class Entry:
    """What a newcomer needs to enter: where, with which state, and from whom the rest comes."""

    published: Published
    donor: int
    native: Backend
    changed: threading.Event
    arrival: Arrival | None
    """The donor's state, if it is on its way already."""


class RecoveryRuntime:
    """Recovery inside one rank.

    Args:
        client: the rank's connection to its supervisor.
        transport: native backend.
        device: of this rank.
        timeout_s: of a native collective.
    """

    def __init__(self, client: RankClient, transport: Transport, device: torch.device, timeout_s: float) -> None:
        self.client = client
        self.slot = client.slot
        self.device = device
        self.version = 0
        """Optimizer updates contained in this rank's parameters and optimizer state."""
        self.ordinal = 0
        self._mid_parity = 0
        self._files: list[tuple[int, str]] = []
        self._last_commit_ordinal = 0
        self.num_fits = 0
        """Fits that this program has ended."""
        self.section: dict[str, int] = {}
        """Collectives issued before the set-up of the current fit began."""
        self.count_updates: Callable[[], int] = lambda: 0
        """Set by the session: optimizer updates committed so far, as the Trainer counts them."""
        self.updates_inside_batch = True
        """Set by the session: the user's step may call optimizers, so that updates are counted at every phase."""
        self._global_step = 0
        self.is_in_backward = False
        """Set by the strategy: what is reduced now are gradients."""
        self.is_training = False
        self.stop_version: int | None = None
        """All ranks agreed to stop after this many updates, because one of them got SIGTERM."""
        self.on_recovery_start: Callable[[QuorumChange], None] = lambda change: None
        self.replicated: Callable[[], tuple[list[torch.Tensor], Any]] | None = None
        """Set by the strategy: parameters and a tree of further replicated state."""
        self.records: list[RecoveryRecord] = []
        self.communicator = Communicator(
            transport,
            put=client.store_set,
            fetch=client.store_get,
            global_rank=client.global_rank,
            timeout_s=timeout_s,
            on_waiting=self._note_waiting,
            on_seq=self._note_seq,
        )
        self.at_end: list[Callable[[], None]] = []
        """What to do when the program is over, and no rank will be replaced any more."""
        self._published = self.read_published(self.slot)
        self.is_newcomer = client.is_newcomer
        self._has_arrived = False
        self._entry_lock = threading.Lock()
        self._timeout_s = timeout_s
        self._began_ns = clock.now_ns()
        self._entry: Entry | None = None
        self._entry_ready = threading.Event()
        self._quorums: queue.SimpleQueue[QuorumChange] = queue.SimpleQueue()
        self._plans: dict[int, RecoveryPlan] = {}
        self._plan_arrived = threading.Condition()
        self._update_lock = threading.Condition()
        self._is_updating = False
        self._is_held = False
        self._is_single_host = len(client.local_slots) == client.world_size
        self._records_lock = threading.Lock()
        self._trigger = FaultTrigger([], client.global_rank)
        self.arm([Fault.parse(line) for line in json.loads(os.environ.get("FLASHRL_CHAOS", "[]"))])

    # ------------------------------------------------------------------ life
    def arrive(self) -> None:
        """Begin to take part in quorums.

        A newcomer does so before it runs the program: the plan is made, groups are formed and state arrives meanwhile.
        """
        self._has_arrived = True
        self._start_client()
        threading.Thread(target=self._run, name="flashrl-recovery", daemon=True).start()

    def _start_client(self) -> None:
        self.client.start(
            on_quorum_change=self._on_quorum_change,
            on_plan=self._on_plan,
            on_event=self._on_event,
            is_host_only=self.device.type == "cpu",
        )

    def start(self) -> HoldingProcessGroup:
        """Connect to the supervisor and install the default process group."""
        slot, client = self.slot, self.client
        slot[Word.STATE] = RankState.SETUP
        keep_freed_memory()
        if self.is_newcomer:
            journal = self._read_journal()
            self.communicator.start_replay(journal, is_complete=bool(self._published))
        self.communicator.start_recording(self._record_result)
        if not self._has_arrived:
            self._start_client()
        group = make_default(self.communicator, client.global_rank, client.world_size, connect=not self.is_newcomer)
        if self.is_newcomer:
            self.communicator.enter(self.facts.get("section", {}))
        if not self._has_arrived:
            self._has_arrived = True
            threading.Thread(target=self._run, name="flashrl-recovery", daemon=True).start()
        atexit.register(self._leave)
        return group

    def _leave(self) -> None:
        self._leave_together()
        for action in self.at_end:
            action()

    def _leave_together(self) -> None:
        """At the end of the program: a rank may be lost after its fit, and needs a donor then."""
        if sys.exc_info()[0] is not None or hasattr(sys, "last_exc") or hasattr(sys, "last_value"):
            return
        if self.slot[Word.STATE] >= RankState.TRAINING:
            self.slot[Word.STATE] = RankState.FINISHED
            with self.held():
                self.client.finish(PROGRAM_END)
                self.client.wait_all_finished()
        self._entry = None
        self.communicator.close()

    def _note_waiting(self, waits: bool) -> None:
        if not waits:
            self.slot[Word.LOOP_BEAT_NS] = clock.now_ns()
        self.slot[Word.WAITING_SINCE_NS] = clock.now_ns() if waits else 0

    def _note_seq(self, seq: int) -> None:
        self.slot[Word.SEQ_ISSUED] = seq
        if self.is_in_backward:
            self.enter_phase(Phase.ALL_REDUCE)
            self.slot[Word.PHASE] = Phase.BACKWARD

    @property
    def facts(self) -> dict[str, Any]:
        """What the predecessor published for its replacement's set-up; empty in a first process."""
        return self._published[0].facts if self._published else {}

    # ------------------------------------------------------------------ phases
    def arm(self, faults: list[Fault]) -> None:
        """Let faults strike on purpose."""
        if faults:
            struck = [Fault.parse(line.decode()) for line in self.slot.records(Region.STRUCK)]
            self._trigger = FaultTrigger(faults, self.client.global_rank, struck)

    def enter_phase(self, phase: Phase) -> None:
        """The program begins ``phase`` of its current step."""
        if self.updates_inside_batch or phase not in _WITHIN_BATCH:
            self._global_step = self.count_updates()
        self.slot.begin_phase(phase, self._global_step)
        fault = self._trigger.at(StepTag(self._global_step, phase)) if self._trigger.is_armed else None
        if fault is not None:
            self.slot.append(Region.STRUCK, str(fault).encode())
            fault.how.strike()

    # ------------------------------------------------------------------ journal of the set-up
    def _record_result(self, group: str, seq: int, name: str, results: list[torch.Tensor] | None) -> None:
        packed = None
        if results is not None:
            packed = [(tensor_bytes(t), str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in results]
        self.slot.append(Region.JOURNAL, pickle.dumps((group, seq, name, packed), protocol=5))

    def _read_journal(self) -> dict[tuple[str, int], tuple[str, list[torch.Tensor] | None]]:
        journal: dict[tuple[str, int], tuple[str, list[torch.Tensor] | None]] = {}
        for record in self.slot.records(Region.JOURNAL):
            group, seq, name, packed = pickle.loads(record)  # our own memory, never the network
            tensors = None
            if packed is not None:
                tensors = [
                    tensor_from_bytes(content, getattr(torch, dtype), shape, "cpu") for content, dtype, shape in packed
                ]
            journal[group, seq] = (name, tensors)
        return journal

    def _journaled(self) -> dict[str, int]:
        """For each group, how many of its first collectives have a recorded result."""
        journal = self._read_journal()
        lengths: dict[str, int] = {}
        for group in {group for group, _ in journal} | {DEFAULT_GROUP}:
            length = 0
            while journal.get((group, length), ("", None))[1] is not None:
                length += 1
            lengths[group] = length
        return lengths

    # ------------------------------------------------------------------ publishing
    @staticmethod
    def read_published(slot: RankSlot) -> list[Published]:
        """The resume points in a slot, newest first."""
        found: list[Published] = []
        for region in (*_COMMIT_BUFFERS, *_MID_BUFFERS):
            content = slot.read(region)
            if content is not None:
                header_size = int.from_bytes(content[:4], "little")
                schema_size = int.from_bytes(content[4:8], "little")
                ordinal, point, facts, bulk = pickle.loads(content[8 : 8 + header_size])
                start = 8 + header_size
                schema, rest = content[start : start + schema_size], content[start + schema_size :]
                found.append(Published(ordinal, point, facts, schema, rest, StoredBulk(slot, region, bulk)))
        return sorted(found, key=lambda published: -published.ordinal)

    def publish(self, kind: ResumeKind, batch: int, version: int, state: Snapshot, facts: dict[str, Any]) -> None:
        """Write a resume point to the slot: from now on a replacement can enter here.

        Raises:
            SnapshotTooLargeError: the state does not fit; nothing has changed then.
        """
        is_commit = kind is ResumeKind.COMMIT
        parity = version % 2 if is_commit else 1 - self._mid_parity
        region = (_COMMIT_BUFFERS if is_commit else _MID_BUFFERS)[parity]
        point = ResumePoint(kind, batch, version, self.communicator.next_seqs(), int(region))
        transport = (self.communicator.transport.backend, self.device.type, self._timeout_s)
        facts = {**facts, "fit": self.num_fits, "section": self.section, "transport": transport}
        header = pickle.dumps((self.ordinal + 1, point, facts, state.bulk), protocol=5)
        sizes = len(header).to_bytes(4, "little") + len(state.schema).to_bytes(4, "little")
        self.slot.write(region, [sizes, header, state.schema, state.content], state.pieces(region), state.bulk_bytes)
        self.ordinal += 1
        if not is_commit:
            self._mid_parity = parity
        if not self.is_training:
            self.is_training = True
            self.communicator.stop_recording()
            self.slot[Word.STATE] = RankState.TRAINING

    # ------------------------------------------------------------------ commit
    def await_commit(self, version: int) -> None:
        """Wait until every rank has gradients and a published state for update ``version``; then the update may run."""
        slot = self.slot
        slot[Word.READY_TO_COMMIT] = version
        self.enter_phase(Phase.COMMIT)
        if self._is_single_host:
            self._await_slots(version)
        else:
            self.communicator.groups[DEFAULT_GROUP].barrier().wait()
        with self._update_lock:
            self._is_updating = True
        self._agree_on_stop(version)

    def _await_slots(self, version: int) -> None:
        others = [slot for rank, slot in self.client.local_slots.items() if rank != self.client.global_rank]
        late = [slot for slot in others if slot[Word.READY_TO_COMMIT] < version]
        if not late:
            return
        with self.communicator.waiting():
            self._is_held = True
            try:
                spins = 0
                while late := [slot for slot in late if slot[Word.READY_TO_COMMIT] < version]:
                    spins += 1
                    if spins < 50:
                        os.sched_yield()
                    else:
                        clock.sleep(0.0001 if spins < 2000 else 0.001)
            finally:
                self._is_held = False

    def _agree_on_stop(self, version: int) -> None:
        for slot in self.client.local_slots.values():
            asked = slot[Word.STOP_REQUESTED]
            if asked and asked <= version:
                self.stop_version = version

    def request_stop(self) -> None:
        """This rank got SIGTERM: all ranks stop after the next update that is not yet ready."""
        if not self.slot[Word.STOP_REQUESTED]:
            self.slot[Word.STOP_REQUESTED] = self.version + 1

    def committed(self, version: int) -> None:
        """Update ``version`` is in the parameters; all ranks have published a resume point that belongs to it.

        Args:
            version: of this rank's state from here on.
        """
        with self._update_lock:
            self.version = version
            self._is_updating = False
            self._update_lock.notify_all()
        self.slot[Word.COMMITTED] = version
        self.communicator.truncate()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Mark that the program waits here for all ranks, in no collective."""
        with self.communicator.waiting():
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    def finish_fit(self) -> None:
        """Wait until the fit of every rank is over; until then this rank can be a donor."""
        self.slot[Word.STATE] = RankState.FINISHED
        self.client.finish(self.num_fits)
        with self.held():
            self.client.wait_all_finished()
        # What follows is the set-up of a further fit, if there is one: a replacement needs its results.
        self.section = self.communicator.next_seqs()
        self.num_fits += 1
        self.is_training = False
        self.communicator.start_recording(self._record_result)

    # ------------------------------------------------------------------ messages from the supervisor
    def _on_quorum_change(self, change: QuorumChange) -> None:
        self.communicator.begin_quorum(change.quorum_id)
        self.slot[Word.QUORUM_ID] = change.quorum_id
        self._quorums.put(change)

    def _on_plan(self, plan: RecoveryPlan) -> None:
        with self._plan_arrived:
            self._plans[plan.quorum_id] = plan
            self._plan_arrived.notify_all()

    def _on_event(self, record: RecoveryRecord) -> None:
        with self._records_lock:
            self.records.append(record)

    def take_records(self) -> list[RecoveryRecord]:
        """Recoveries completed since the last call."""
        with self._records_lock:
            taken, self.records = self.records, []
        return taken

    # ------------------------------------------------------------------ recovery thread
    def _run(self) -> None:
        while True:
            change = self._quorums.get()
            if change.quorum_id != self.communicator.quorum_id:
                continue
            changed = self.communicator.changed
            try:
                self.on_recovery_start(change)
                self._recover(change.quorum_id, changed)
            except (RuntimeError, TimeoutError) as error:
                if changed.is_set() or self._changes_soon(changed, error):
                    continue
                self._give_up()
            except Exception:  # noqa: BLE001 - a bug here must end the job with its traceback, not hang it
                self._give_up()

    def _changes_soon(self, changed: threading.Event, error: Exception) -> bool:
        """A lost peer is felt before the supervisor tells of it."""
        return self.communicator.transport.is_peer_failure(error) and changed.wait(self.communicator.grace_s)

    def _give_up(self) -> None:
        self.client.report_exception(traceback.format_exc())
        os._exit(1)

    def _recover(self, quorum_id: int, changed: threading.Event) -> None:
        timings: dict[str, float] = {}
        with _stage(timings, "park"):
            report = self._make_report(quorum_id, changed)
        if report is None:
            return
        self.client.send_report(report)
        with _stage(timings, "plan_wait"):
            plan = self._await_plan(quorum_id, changed)
        if plan is None:
            return
        if not self.is_newcomer:
            self._take_part(plan, changed, timings)
        elif plan.entries.get(self.client.global_rank) is None:
            self._join_setup(plan, changed, timings)
        else:
            self._prepare_entry(plan, changed, timings)
            return  # the program's thread goes on in `enter`
        self.client.send_restored(quorum_id, timings)

    def _make_report(self, quorum_id: int, changed: threading.Event) -> RankReport | None:
        rank, communicator = self.client.global_rank, self.communicator
        with self._entry_lock:
            is_newcomer = self.is_newcomer
        if is_newcomer:
            points = tuple(published.point for published in self._published)
            journaled = {} if points else self._journaled()
            return RankReport(rank, quorum_id, True, journaled=journaled, resume_points=points)
        if not communicator.wait_until_parked(changed, lambda: self._is_held):
            return None
        return RankReport(
            rank, quorum_id, False, first_incomplete=communicator.first_incomplete(), version=self.version
        )

    def _await_plan(self, quorum_id: int, changed: threading.Event) -> RecoveryPlan | None:
        with self._plan_arrived:
            while quorum_id not in self._plans:
                if changed.is_set():
                    return None
                self._plan_arrived.wait(0.02)
            return self._plans[quorum_id]

    def _take_part(self, plan: RecoveryPlan, changed: threading.Event, timings: dict[str, float]) -> None:
        """Survivors: form every group anew; each group on its own, for a newcomer may still have to create some."""
        others = [group_id for group_id in self.communicator.begin_regrouping(changed) if group_id != DEFAULT_GROUP]
        failures: list[RuntimeError] = []

        def rejoin(group_id: str) -> None:
            try:
                native = self.communicator.reconnect(group_id, changed)
                self.communicator.redo(group_id, native, plan.redo_from.get(group_id, 0), changed)
            except RuntimeError as error:
                failures.append(error)

        threads = [threading.Thread(target=rejoin, args=(group_id,), daemon=True) for group_id in others]
        for thread in threads:
            thread.start()
        with _stage(timings, "rendezvous"):
            native = self.communicator.reconnect(DEFAULT_GROUP, changed)
        with _stage(timings, "transfer"):
            self._give(plan, native, changed)
        with _stage(timings, "redo"):
            self.communicator.redo(DEFAULT_GROUP, native, plan.redo_from.get(DEFAULT_GROUP, 0), changed)
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]

    def _give(self, plan: RecoveryPlan, native: Backend, changed: threading.Event) -> None:
        mine = [rank for rank, donor in sorted(plan.donors.items()) if donor == self.client.global_rank]
        for newcomer in mine:
            point = plan.entries[newcomer]
            assert point is not None
            with self._update_lock:
                while (self.version < point.version or self._is_updating) and not changed.is_set():
                    self._update_lock.wait(0.05)
            if changed.is_set():
                raise RuntimeError("the quorum changed")
            if self.version != point.version:
                raise NoDonorError((newcomer,))
            if self.replicated is None:
                raise NoDonorError((newcomer,))
            parameters, tree = self.replicated()
            transfer.send_state(
                native, newcomer, self.version, parameters, tree, self.device, reader_pid=self._reader_pid(newcomer)
            )

    def _reader_pid(self, newcomer: int) -> int:
        """The newcomer's process, if it can read tensors out of this process's memory."""
        slot = self.client.local_slots.get(newcomer)
        return 0 if slot is None or self.device.type != "cpu" else slot[Word.PID]

    def _join_setup(self, plan: RecoveryPlan, changed: threading.Event, timings: dict[str, float]) -> None:
        """The predecessor died before training: take part in what it missed."""
        communicator = self.communicator
        for group_id in communicator.begin_regrouping(changed):
            with _stage(timings, "rendezvous"):
                native = communicator.reconnect(group_id, changed)
            group = communicator.groups[group_id]
            with group.lock:
                if changed.is_set():
                    return
                group.native = native
        self.is_newcomer = False
        communicator.limit_replay(plan.redo_from)

    def _prepare_entry(self, plan: RecoveryPlan, changed: threading.Event, timings: dict[str, float]) -> None:
        point = plan.entries[self.client.global_rank]
        assert point is not None
        published = next(p for p in self._published if p.point == point)
        donor = plan.donors[self.client.global_rank]
        self.slot[Word.READY_TO_COMMIT] = point.version  # what it published says so; the donor may wait for that
        with _stage(timings, "rendezvous"):
            native = self.communicator.join(self.client.world_size, changed)
        arrival = None
        if self.device.type == "cpu":  # what goes to a device is the business of the thread that chose it
            with _stage(timings, "transfer"):
                arrival = Arrival(native, donor, self.device)
        self._entry_timings = timings
        self._entry = Entry(published, donor, native, changed, arrival)
        self._entry_ready.set()

    # ------------------------------------------------------------------ newcomer: entry into training
    @property
    def must_enter(self) -> bool:
        """Whether this process has still to jump to a resume point."""
        return self.is_newcomer and bool(self._published)

    def enter(self, receive: Callable[[Arrival], None]) -> Published:
        """Wait for the plan, let ``receive`` take the donor's state, and go live. Called by the program's thread.

        Args:
            receive: puts the state into the model and the optimizers.
        """
        self.slot[Word.STATE] = RankState.RESTORING
        setup_ms = (clock.now_ns() - self._began_ns) / 1e6
        while True:
            with self.communicator.waiting():
                self._entry_ready.wait()
            self._entry_ready.clear()
            entry = self._entry
            assert entry is not None
            if entry.changed.is_set():
                continue
            timings = self._entry_timings | {"setup": setup_ms}
            try:
                with _stage(timings, "transfer"):
                    arrival = entry.arrival or Arrival(entry.native, entry.donor, self.device)
                    receive(arrival)
            except RuntimeError as error:
                if entry.changed.is_set() or self._changes_soon(entry.changed, error):
                    continue
                raise
            if self._go_live(entry, arrival.version):
                self.client.send_restored(self.communicator.quorum_id, timings)
                return entry.published

    def _go_live(self, entry: Entry, version: int) -> bool:
        point, communicator = entry.published.point, self.communicator
        self.ordinal = entry.published.ordinal
        self.num_fits, self.section = entry.published.facts["fit"], entry.published.facts["section"]
        self.version = version
        for published in self._published:
            if published.ordinal > entry.published.ordinal:
                self.slot.clear(Region(published.point.buffer))
        self._mid_parity = 0
        if point.kind is not ResumeKind.COMMIT:
            self._mid_parity = _MID_BUFFERS.index(Region(point.buffer))
        self.slot[Word.READY_TO_COMMIT] = version
        self.slot[Word.COMMITTED] = version
        communicator.stop_recording()
        communicator.end_replay()
        communicator.enter(point.seqs)
        changed = entry.changed
        others = [group_id for group_id in communicator.begin_regrouping(changed) if group_id != DEFAULT_GROUP]
        try:
            natives = {
                DEFAULT_GROUP: entry.native,
                **{group_id: communicator.reconnect(group_id, changed) for group_id in others},
            }
        except RuntimeError:
            if changed.is_set() or changed.wait(communicator.grace_s):
                return False
            raise
        with self._entry_lock:  # from here on this rank reports as a survivor, unless it is to report already
            if changed.is_set():
                return False
            self.is_newcomer = False
        for group_id, native in natives.items():
            group = communicator.groups[group_id]
            with group.lock:
                if not changed.is_set():
                    group.native = native
        self.is_training = True
        self.slot[Word.STATE] = RankState.TRAINING
        return True

    # ------------------------------------------------------------------ files
    def note_file(self, path: str) -> None:
        """A file is about to be written that a replacement would write again."""
        if not os.path.exists(path):
            self._files.append((self.ordinal, path))
            self.slot.write(Region.FILES, [pickle.dumps(self._files, protocol=5)])

    def forget_files(self) -> None:
        """A commit was published: files from before the commit before it will not be written again."""
        if self._files:
            self._files = [(ordinal, path) for ordinal, path in self._files if ordinal >= self._last_commit_ordinal]
            self.slot.write(Region.FILES, [pickle.dumps(self._files, protocol=5)])
        self._last_commit_ordinal = self.ordinal

    def remove_later_files(self, ordinal: int) -> None:
        """Remove what the predecessor wrote after resume point ``ordinal``: it is about to be written again."""
        noted = self.slot.read(Region.FILES)
        for written, path in pickle.loads(noted) if noted else []:  # our own memory
            if written < ordinal:
                continue
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            elif os.path.exists(path):
                os.remove(path)
        self.slot.clear(Region.FILES)


@contextlib.contextmanager
def _stage(timings: dict[str, float], name: str) -> Iterator[None]:
    began = clock.now_s()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + (clock.now_s() - began) * 1e3
