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
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend, HashStore, ProcessGroup, Work

from lightning_flashrl.communicator.base import KeyValueStore, Transport, run_abandonable
from lightning_flashrl.communicator.collectives import BufferPool, Collective, flatten
from lightning_flashrl.errors import RankLostError, ReplayMismatchError

_NO_TIMEOUT = timedelta(0)
DEFAULT_GROUP = "0"
"""Name of the group of all ranks."""


class Call:
    """A numbered collective: its inputs, its native work, and who waits for it."""

    def __init__(self, group: HoldingProcessGroup, seq: int, collective: Collective) -> None:
        self.group = group
        self.seq = seq
        self.collective = collective
        self.work: Work | None = None
        self.changed = group.communicator.changed
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._lock = threading.Lock()

    def future(self) -> torch.futures.Future[Any]:
        """A future of the results, for the gradient reducer."""
        with self._lock:
            if self._future is None:
                devices: list[int | str | torch.device]
                devices = [t.device for t in flatten(self.collective.results)[:1] if t.device.type != "cpu"]
                self._future = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
                if self.finished.is_set():
                    self._resolve(self._future)
                    return self._future
                self.group.communicator.begin_wait()
            future, work = self._future, self.work
        if work is not None:
            self.watch(work)
        return future

    def watch(self, work: Work) -> None:
        """Finish this call when ``work`` ends well; a failure is left to the recovery."""

        def ended(native: torch.futures.Future[Any]) -> None:
            try:
                native.value()
            except RuntimeError as error:
                self.group.communicator.note_failure(self, error)
            else:
                self.finish()

        work.get_future().then(ended)

    def _resolve(self, future: torch.futures.Future[Any]) -> None:
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(flatten(self.collective.results))

    def finish(self, error: BaseException | None = None) -> None:
        """Give the results (or an error that is not a peer's fault) to whoever waits."""
        with self._lock:
            if self.finished.is_set():
                return
            self.error = error
            if error is None:
                self.group.on_finished(self)
            self.finished.set()
            future = self._future
        if future is not None:
            self.group.communicator.end_wait()
            self._resolve(future)


class HoldingWork(Work):
    """What a collective returns: a handle that outlives the native group."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._held = call

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Block until the collective is done, however many ranks are replaced meanwhile."""
        call = self._held
        if call.finished.is_set():
            return self._outcome()
        communicator = call.group.communicator
        with communicator.waiting():
            work = call.work
            if work is not None:
                try:
                    work.wait()
                except RuntimeError as error:
                    communicator.note_failure(call, error)
                else:
                    communicator.transport.synchronize(flatten(call.collective.results))
                    call.finish()
            call.finished.wait()
        return self._outcome()

    def _outcome(self) -> bool:
        if self._held.error is not None:
            raise self._held.error
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Future of the results."""
        return self._held.future()

    def is_completed(self) -> bool:
        """Whether the results are there."""
        call = self._held
        if not call.finished.is_set() and call.work is not None and call.work.is_completed() and call.work.is_success():
            call.finish()
        return call.finished.is_set()

    def is_success(self) -> bool:
        """Whether the results are there and no error was met."""
        return self.is_completed() and self._held.error is None

    def result(self) -> list[torch.Tensor]:
        """The tensors the collective wrote."""
        return flatten(self._held.collective.results)

    def synchronize(self) -> None:
        """Same as :meth:`wait`."""
        self.wait()


class HoldingProcessGroup(ProcessGroup):
    """A process group whose members may be replaced while calls are pending.

    Args:
        communicator: the process's set of groups.
        group_id: name of this group, the same on all members.
        rank: this process's rank within the group.
        ranks: global ranks of the members.
    """

    def __init__(self, communicator: Communicator, group_id: str, rank: int, ranks: list[int]) -> None:
        super().__init__(rank, len(ranks))  # type: ignore[call-arg]
        self.communicator = communicator
        self.group_id = group_id
        self.ranks = ranks
        self.native: Backend | None = None
        self.calls: deque[Call] = deque()
        self.next_seq = 0
        self.lock = threading.RLock()
        self._rank = rank
        self._name = group_id
        self._description = "undefined"
        self._answer_alone: Callable[[str, list[torch.Tensor]], None] | None = None

    # ------------------------------------------------------------------ identity
    def getBackendName(self) -> str:  # noqa: N802, D102 - name given by torch
        return f"flash{self.communicator.transport.backend}"

    def getRank(self) -> int:  # noqa: N802, D102
        return self._rank

    def getSize(self) -> int:  # noqa: N802, D102
        return len(self.ranks)

    def getGroupName(self) -> str:  # noqa: N802, D102
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802, D102
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802, D102
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802, D102
        self._description = description

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """Name under which torch registers the group."""
        return self._name

    @property
    def group_desc(self) -> str:
        """Description for torch's logs."""
        return self._description

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    def abort(self) -> None:
        """Break the native groups of this process."""
        self.communicator.transport.abort()

    # ------------------------------------------------------------------ calls
    def _start(self, collective: Collective) -> HoldingWork:
        if self._answer_alone is not None:
            self._answer_alone(collective.name, flatten(collective.results))
            call = Call(self, -1, collective)
            call.finished.set()
            return HoldingWork(call)
        communicator = self.communicator
        communicator.await_replay_limit()
        with self.lock:
            answer = communicator.replayed(self, collective.name)
            call = Call(self, self.next_seq, collective)
            self.next_seq += 1
            if answer is not None:
                self._deliver(call, answer)
                return HoldingWork(call)
            collective.is_stable = communicator.is_unrecorded
            collective.save(communicator.pool)
            self.calls.append(call)
            if self.native is not None:
                try:
                    call.work = collective.issue(self.native)
                except RuntimeError as error:
                    if not communicator.transport.is_peer_failure(error):
                        self.calls.pop()
                        self.next_seq -= 1
                        raise
                    communicator.note_failure(call, error)
        communicator.on_issued()
        return HoldingWork(call)

    def _deliver(self, call: Call, answer: list[torch.Tensor]) -> None:
        with torch.no_grad():
            if not answer:
                call.finished.set()  # nothing to write, or a donor's state will replace it
                return
            for tensor, value in zip(flatten(call.collective.results), answer, strict=True):
                tensor.copy_(value)
        call.finished.set()

    @contextlib.contextmanager
    def alone(self, answer: Callable[[str, list[torch.Tensor]], None]) -> Iterator[None]:
        """Within this context every collective has one member; ``answer`` may change what it returns."""
        self._answer_alone = answer
        try:
            yield
        finally:
            self._answer_alone = None

    def on_finished(self, call: Call) -> None:
        """Keep the result of a set-up collective for a possible replacement of this rank."""
        self.communicator.record(self, call)

    def first_incomplete(self) -> int:
        """Number of the lowest call that is not finished here."""
        with self.lock:
            return next((call.seq for call in self.calls if not call.finished.is_set()), self.next_seq)

    def truncate(self) -> None:
        """Forget the inputs of finished calls."""
        with self.lock:
            while self.calls and self.calls[0].finished.is_set():
                self.calls.popleft().collective.forget(self.communicator.pool)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> HoldingWork:  # type: ignore[override]  # noqa: D102
        return self._start(Collective("allreduce", tensors, tensors, _given(opts), is_in_place=True))

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> HoldingWork:  # noqa: D102
        return self._start(Collective("allreduce_coalesced", tensors, tensors, _given(opts), is_in_place=True))

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> HoldingWork:  # type: ignore[override]  # noqa: D102
        is_root = opts is None or opts.rootRank == self._rank
        return self._start(Collective("broadcast", tensors, tensors if is_root else [], _given(opts), is_in_place=True))

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> HoldingWork:  # type: ignore[override]  # noqa: D102
        return self._start(Collective("reduce", tensors, tensors, _given(opts), is_in_place=True))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> HoldingWork:  # noqa: D102
        return self._start(Collective("allgather", outputs, inputs, _given(opts), is_in_place=False))

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> HoldingWork:
        return self._start(Collective("_allgather_base", output, input, _given(opts), is_in_place=False))

    all_gather_single = _allgather_base

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> HoldingWork:  # type: ignore[override]  # noqa: D102
        return self._start(Collective("gather", outputs, inputs, _given(opts), is_in_place=False))

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> HoldingWork:  # type: ignore[override]  # noqa: D102
        return self._start(Collective("scatter", outputs, inputs, _given(opts), is_in_place=False))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> HoldingWork:  # type: ignore[override]  # noqa: D102
        return self._start(Collective("reduce_scatter", outputs, inputs, _given(opts), is_in_place=False))

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> HoldingWork:
        return self._start(Collective("_reduce_scatter_base", output, input, _given(opts), is_in_place=False))

    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> HoldingWork:  # noqa: D102
        return self._start(Collective("alltoall", outputs, inputs, _given(opts), is_in_place=False))

    def alltoall_base(  # noqa: D102
        self, output: torch.Tensor, input: torch.Tensor, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> HoldingWork:
        options = (output_splits, input_splits, *_given(opts))
        return self._start(Collective("alltoall_base", output, input, options, is_in_place=False))

    all_to_all_single = alltoall_base  # type: ignore[assignment]

    def barrier(self, opts: Any = None) -> HoldingWork:  # noqa: D102
        return self._start(Collective("barrier", [], [], _given(opts), is_in_place=True))

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier; the members that are missing are named by the supervisor's log."""
        self.barrier().wait()

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> HoldingWork:  # noqa: D102
        raise _no_point_to_point("send")

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> HoldingWork:  # noqa: D102
        raise _no_point_to_point("recv")

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> HoldingWork:  # noqa: D102
        raise _no_point_to_point("recv")


def _given(options: Any) -> tuple[Any, ...]:
    return () if options is None else (options,)


def _no_point_to_point(name: str) -> RuntimeError:
    return RuntimeError(
        f"torch.distributed.{name} has no place in a group whose members are replaced: the order of point-to-point "
        "messages is not the same on all ranks; use a collective (broadcast, all_gather, all_to_all) instead"
    )


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
        self._parked = threading.Condition()
        self._sink: Callable[[str, int, str, list[torch.Tensor] | None], None] | None = None
        self._journal: Mapping[tuple[str, int], tuple[str, list[torch.Tensor] | None]] = {}
        self._replay_until: dict[str, int] | None = {}
        self._replay_known = threading.Event()
        self._replay_known.set()

    # ------------------------------------------------------------------ groups
    def create_group(self, group_id: str, rank: int, ranks: list[int], connect: bool = True) -> HoldingProcessGroup:
        """Make a group and, unless its quorum is still forming, connect it."""
        group = HoldingProcessGroup(self, group_id, rank, ranks)
        self.groups[group_id] = group
        if connect:
            changed, quorum_id = self._changed, self.quorum_id
            try:
                native = self._connect(group, quorum_id, changed)
            except RuntimeError:
                if not changed.is_set():
                    raise
            else:
                with group.lock:
                    if not changed.is_set():
                        group.native = native
        return group

    def _connect(self, group: HoldingProcessGroup, quorum_id: int, changed: threading.Event) -> Backend:
        def fetch(key: str, timeout_s: float) -> bytes:
            try:
                return self._fetch(key, timeout_s, changed)
            except RankLostError as error:
                raise RuntimeError(str(error)) from error

        store = KeyValueStore(f"q{quorum_id}/{group.group_id}/", self._put, fetch, self._rendezvous_timeout_s)
        return run_abandonable(
            lambda: self.transport.connect(store, group.getRank(), group.getSize(), self._timeout_s, group.group_id),
            changed,
            group.group_id,
        )

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
        if quorum_id <= self.quorum_id:
            return
        self.quorum_id = quorum_id
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
                pending = [call for call in group.calls if not call.finished.is_set() and call.work is not None]
            for call in pending:
                assert call.work is not None
                try:
                    call.work.wait()
                except RuntimeError:
                    continue
                call.finish()
        return {group_id: group.first_incomplete() for group_id, group in list(self.groups.items())}

    def reconnect(self, group_id: str, changed: threading.Event) -> Backend:
        """Form the native group of the current quorum."""
        return self._connect(self.groups[group_id], self.quorum_id, changed)

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
                if call.finished.is_set():
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


def make_default(communicator: Communicator, rank: int, world_size: int, connect: bool) -> HoldingProcessGroup:
    """Install a holding group as the default process group of ``torch.distributed``.

    Groups made later with ``new_group`` hold as well. ``get_backend()`` reports the native backend's name for all of
    them, so that code which asks takes the same path as without us.
    """
    c10d = dist.distributed_c10d
    native = communicator.transport.backend
    name = f"flash{native}"

    def create(options: Any, _: Any = None) -> HoldingProcessGroup:
        is_first = DEFAULT_GROUP not in communicator.groups
        ranks = list(options.global_ranks_in_group) or list(range(world_size))
        if is_first:
            return communicator.create_group(DEFAULT_GROUP, options.group_rank, ranks, connect=connect)
        communicator.await_replay_limit()
        return communicator.create_group(
            f"g{options.group_id}", options.group_rank, ranks, connect=not communicator.is_replaying
        )

    make_group = c10d._new_process_group_helper

    def make_holding_group(size: int, group_rank: int, ranks: list[int], backend: Any, *args: Any, **kwargs: Any) -> Any:
        if str(backend) != native:
            return make_group(size, group_rank, ranks, backend, *args, **kwargs)
        group, store = make_group(size, group_rank, ranks, name, *args, **kwargs)
        if isinstance(group, HoldingProcessGroup):
            c10d._world.pg_map[group] = (native, c10d._world.pg_map[group][1])
        return group, store

    dist.Backend._plugins.pop(name.upper(), None)
    dist.Backend.register_backend(name, create, extended_api=True, devices=[communicator.transport.device_type])
    c10d._new_process_group_helper = make_holding_group
    dist.init_process_group(native, store=HashStore(), rank=rank, world_size=world_size)
    return communicator.groups[DEFAULT_GROUP]
