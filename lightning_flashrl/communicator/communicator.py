"""Process groups in which a survivor waits instead of failing.

This file owns no loop; it is called by three kinds of threads:

| thread                     | waits for                             | unblocked by                                  |
|----------------------------|---------------------------------------|-----------------------------------------------|
| program (and autograd)     | its collective                        | the native group, or the redo after a fault   |
| native group's own threads | nothing                               |                                               |
| recovery thread            | all members, then redone collectives  | members arriving, or the next quorum          |

Collectives of a group are numbered in program order. Each keeps its inputs until :meth:`Communicator.truncate`, which
the training loop calls when every rank has published a later resume point. When a member is lost, calls that had not
finished stay pending; :meth:`Communicator.reconnect` forms new native groups and :meth:`Communicator.redo` issues again
what newcomers missed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch._C._distributed_c10d import Backend, Work

from lightning_flashrl.communicator.base import KeyValueStore, Transport, run_abandonable
from lightning_flashrl.communicator.collectives import BufferPool, flatten
from lightning_flashrl.communicator.holding import DEFAULT_GROUP, Call, HoldingProcessGroup
from lightning_flashrl.errors import RankLostError, ReplayMismatchError


class Communicator:
    """All process groups of one process, and how they are broken and made again.

    Args:
        transport: the native backend.
        put: stores a rendezvous value with the controller.
        fetch: waits for a rendezvous value; the event ends the wait.
        global_rank: of this process.
        timeout_s: time-out of a native collective, seconds.
        rendezvous_timeout_s: how long members may take to arrive at a new quorum, seconds.
        on_waiting: told when the program begins (``True``) and ends (``False``) to wait for others.
        on_seq: told how many collectives the default group has issued.
    """

    grace_s = 60.0
    """How long a failed collective waits to learn which peer was lost before its error reaches the program."""

    def __init__(
        self,
        transport: Transport,
        put: Callable[[str, bytes], None],
        fetch: Callable[[str, float, threading.Event], bytes],
        global_rank: int,
        *,
        timeout_s: float = 1800.0,
        rendezvous_timeout_s: float = 600.0,
        on_waiting: Callable[[bool], None] = lambda waits: None,
        on_seq: Callable[[int], None] = lambda seq: None,
    ) -> None:
        self.transport = transport
        self.global_rank = global_rank
        self.quorum_id = 0
        self.groups: dict[str, HoldingProcessGroup] = {}
        self.pool = BufferPool()
        self.is_unrecorded = False
        self._put = put
        self._fetch = fetch
        self._timeout_s = timeout_s
        self._rendezvous_timeout_s = rendezvous_timeout_s
        self._on_waiting = on_waiting
        self._on_seq = on_seq
        self._num_waiting = 0
        self._waiting_lock = threading.Lock()
        self._changed = threading.Event()
        """Set when the current quorum is over; ends every wait that belongs to it."""
        self._groups_lock = threading.Lock()
        self._awaits_plan = False
        """A quorum was announced, and the recovery has not yet said that it connects the groups that exist."""
        self._parked = threading.Condition()
        self._sink: Callable[[str, int, str, list[torch.Tensor] | None], None] | None = None
        self._journal: Mapping[tuple[str, int], tuple[str, list[torch.Tensor] | None]] = {}
        self._replay_until: dict[str, int] | None = {}
        self._replay_known = threading.Event()
        self._replay_known.set()

    # ------------------------------------------------------------------ groups
    def create_group(self, group_id: str, rank: int, ranks: list[int], connect: bool = True) -> HoldingProcessGroup:
        """Make a group and connect it, unless a recovery is going to: that waits for the program to need the group."""
        group = HoldingProcessGroup(self, group_id, rank, ranks)
        with self._groups_lock:
            self.groups[group_id] = group
            changed, quorum_id = self._changed, self.quorum_id
            connect = connect and not self._awaits_plan
        if connect:
            try:
                native = self._connect(group_id, rank, len(ranks), quorum_id, changed)
            except RuntimeError:
                if not changed.is_set():
                    raise
            else:
                with group.lock:
                    if not changed.is_set():
                        group.native = native
        return group

    def _connect(self, group_id: str, rank: int, size: int, quorum_id: int, changed: threading.Event) -> Backend:
        def fetch(key: str, timeout_s: float) -> bytes:
            try:
                return self._fetch(key, timeout_s, changed)
            except RankLostError as error:
                raise RuntimeError(str(error)) from error

        store = KeyValueStore(f"q{quorum_id}/{group_id}/", self._put, fetch, self._rendezvous_timeout_s)
        return run_abandonable(
            lambda: self.transport.connect(store, rank, size, self._timeout_s, group_id), changed, group_id
        )

    def close(self) -> None:
        """Let go of the native groups, whose threads end then; not while a collective is pending: they would await it.

        A thread that lets go of a tensor when the interpreter is being taken down would end the process by SIGABRT.
        """
        if self._has_pending():
            return
        for group in list(self.groups.values()):
            with group.lock:
                group.native = None
                for call in group.calls:
                    call.work = None
        self.transport.close()

    # ------------------------------------------------------------------ waiting and failures
    def begin_wait(self) -> None:
        """From here on the program may wait for other ranks: a late heartbeat of its loop is not its fault."""
        with self._waiting_lock:
            self._num_waiting += 1
            if self._num_waiting == 1:
                self._on_waiting(True)

    def end_wait(self) -> None:
        """One reason to wait is gone."""
        with self._waiting_lock:
            self._num_waiting -= 1
            if self._num_waiting == 0:
                self._on_waiting(False)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark that the program waits for other ranks."""
        self.begin_wait()
        try:
            yield
        finally:
            self.end_wait()

    def on_issued(self) -> None:
        """A call was issued: tell the heartbeat, and the recovery that may wait for the program to arrive."""
        default = self.groups.get(DEFAULT_GROUP)
        if default is not None:
            self._on_seq(default.next_seq)
        with self._parked:
            self._parked.notify_all()

    def note_failure(self, call: Call, error: RuntimeError) -> None:
        """A native call failed: hold if a peer may be the cause, else give the error to the program."""
        if not self.transport.is_peer_failure(error):
            call.finish(error)
            return
        changed = call.changed
        if changed.is_set():
            return

        def expire() -> None:
            if not changed.wait(self.grace_s):
                call.finish(error)

        threading.Thread(target=expire, name="flashrl-grace", daemon=True).start()

    # ------------------------------------------------------------------ break and rebuild
    def begin_quorum(self, quorum_id: int) -> None:
        """The quorum changed: end everything that belongs to the old one. Called by the thread that learns of it."""
        with self._groups_lock:
            if quorum_id <= self.quorum_id:
                return
            self.quorum_id = quorum_id
            self._awaits_plan = True
        self._changed.set()
        self.transport.abort()
        for group in list(self.groups.values()):
            with group.lock:
                group.native = None
        self._changed = threading.Event()
        with self._parked:
            self._parked.notify_all()

    @property
    def changed(self) -> threading.Event:
        """Set when the quorum that is current now is over."""
        return self._changed

    def wait_until_parked(self, changed: threading.Event, is_held: Callable[[], bool]) -> bool:
        """Block until the program cannot go on without the lost rank; false when the quorum changes meanwhile.

        Args:
            changed: the event of the quorum that is being formed.
            is_held: whether the program waits elsewhere, e.g. to commit.
        """
        with self._parked:
            while not changed.is_set():
                if is_held() or self._has_pending():
                    return True
                self._parked.wait(0.005)
        return False

    def _has_pending(self) -> bool:
        return any(group.first_incomplete() < group.next_seq for group in list(self.groups.values()))

    def first_incomplete(self) -> dict[str, int]:
        """Number of the lowest unfinished call of each group; waits until broken native calls have ended."""
        for group in list(self.groups.values()):
            with group.lock:
                pending = [call for call in group.calls if not call.is_finished and call.work is not None]
            for call in pending:
                assert call.work is not None
                try:
                    call.work.wait()
                except RuntimeError:
                    continue
                call.finish()
        return {group_id: group.first_incomplete() for group_id, group in list(self.groups.items())}

    def begin_regrouping(self, changed: threading.Event) -> list[str]:
        """Groups that the recovery has to connect; the program connects those that it makes from now on itself.

        Args:
            changed: the event of the quorum that is being formed.
        """
        with self._groups_lock:
            if not changed.is_set():
                self._awaits_plan = False
            return list(self.groups)

    def reconnect(self, group_id: str, changed: threading.Event) -> Backend:
        """Form the native group of the current quorum."""
        group = self.groups[group_id]
        return self._connect(group_id, group.getRank(), group.getSize(), self.quorum_id, changed)

    def join(self, world_size: int, changed: threading.Event) -> Backend:
        """Form the native default group of the current quorum as a newcomer, whose program may not have made it yet."""
        return self._connect(DEFAULT_GROUP, self.global_rank, world_size, self.quorum_id, changed)

    def redo(self, group_id: str, native: Backend, redo_from: int, changed: threading.Event) -> int:
        """Issue again what newcomers missed, let the group go on, and wait until the redone calls have ended.

        Returns:
            how many calls were issued again.

        Raises:
            RuntimeError: another rank was lost meanwhile.
        """
        group = self.groups[group_id]
        redone: list[tuple[Call, Work]] = []
        with group.lock:
            if changed.is_set():
                raise RuntimeError("the quorum changed")
            for call in list(group.calls):
                if call.seq < redo_from:
                    continue
                if call.is_finished:
                    redone.append((call, call.collective.contribute_again(native)))
                else:
                    call.changed = changed
                    call.work = call.collective.issue_again(native)
                    redone.append((call, call.work))
            group.native = native
        for call, work in redone:
            work.wait()
            call.finish()
        return len(redone)

    def enter(self, seqs: Mapping[str, int]) -> None:
        """A newcomer jumps to a resume point: its next collectives have these numbers."""
        for group_id, seq in seqs.items():
            group = self.groups.get(group_id)
            if group is not None:
                with group.lock:
                    group.calls.clear()
                    group.next_seq = seq

    def next_seqs(self) -> dict[str, int]:
        """Number of the next collective of each group."""
        return {group_id: group.next_seq for group_id, group in self.groups.items()}

    def truncate(self) -> None:
        """Every rank has published a later resume point: finished calls are never needed again."""
        for group in self.groups.values():
            group.truncate()

    # ------------------------------------------------------------------ journal of the set-up
    def start_recording(self, sink: Callable[[str, int, str, list[torch.Tensor] | None], None]) -> None:
        """Hand the results of collectives to ``sink(group_id, seq, name, results)`` from now on."""
        self._sink = sink

    def stop_recording(self) -> None:
        """Training begins: results are no longer recorded."""
        self._sink = None

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Record only the fact, not the result, of large collectives that a donor's state makes superfluous."""
        self.is_unrecorded = True
        try:
            yield
        finally:
            self.is_unrecorded = False

    def record(self, group: HoldingProcessGroup, call: Call) -> None:
        """Called when a call finished."""
        if self._sink is not None:
            results = None if call.collective.is_stable else flatten(call.collective.results)
            self._sink(group.group_id, call.seq, call.collective.name, results)

    def start_replay(
        self, journal: Mapping[tuple[str, int], tuple[str, list[torch.Tensor] | None]], *, is_complete: bool
    ) -> None:
        """Answer collectives of the set-up from a predecessor's journal.

        Args:
            journal: (group, number) → (name, results or ``None`` where they were not recorded).
            is_complete: whether the predecessor began to train; else the plan says how far the journal may be used.
        """
        self._journal = journal
        self._replay_until = None
        if not is_complete:
            self._replay_known.clear()

    @property
    def is_replaying(self) -> bool:
        """Whether a journal still answers for this newcomer."""
        return bool(self._journal) and self._replay_until is None

    def limit_replay(self, redo_from: Mapping[str, int]) -> None:
        """From these numbers on collectives are real."""
        self._replay_until = dict(redo_from)
        self._replay_known.set()

    def end_replay(self) -> None:
        """The newcomer has entered the loop: everything is real from here."""
        self._journal = {}

    def skip_unrecorded(self) -> None:
        """Step over collectives whose results were not recorded, in every group."""
        for group in self.groups.values():
            with group.lock:
                while self._journal.get((group.group_id, group.next_seq), ("", []))[1] is None:
                    group.next_seq += 1

    def await_replay_limit(self) -> None:
        """Block a newcomer whose predecessor died in the set-up until the plan says where its own part begins."""
        if not self._replay_known.is_set():
            with self.waiting():
                self._replay_known.wait()

    def replayed(self, group: HoldingProcessGroup, name: str) -> list[torch.Tensor] | None:
        """Results of the next collective if the journal answers it, else ``None``."""
        if not self._journal:
            return None
        if self._replay_until is not None and group.next_seq >= self._replay_until.get(group.group_id, 0):
            return None
        recorded = self._journal.get((group.group_id, group.next_seq))
        if recorded is None:
            return None
        recorded_name, results = recorded
        if recorded_name != name:
            raise ReplayMismatchError(group.next_seq, recorded_name, name)
        return results or []
