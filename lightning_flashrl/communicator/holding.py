"""A process group whose members may be replaced while calls are pending.

Collectives of a group are numbered in program order. A call that had not finished when a member was lost stays pending:
whoever waits for it goes on waiting, and gets its results when the call has been issued again on a new native group.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import Backend, ProcessGroup, Work

from lightning_flashrl.communicator.collectives import Collective, flatten

if TYPE_CHECKING:
    from lightning_flashrl.communicator.communicator import Communicator

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
        self.is_finished = False
        self.error: BaseException | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._ended: threading.Event | None = None
        """For threads that wait; most calls have a future instead."""
        self._lock = threading.Lock()

    def wait_until_finished(self) -> None:
        """Block until :meth:`finish`."""
        with self._lock:
            if self.is_finished:
                return
            if self._ended is None:
                self._ended = threading.Event()
            ended = self._ended
        ended.wait()

    def future(self) -> torch.futures.Future[Any]:
        """A future of the results, for the gradient reducer."""
        with self._lock:
            if self._future is None:
                devices: list[int | str | torch.device] = []
                if self.group.communicator.transport.device_type != "cpu":
                    devices = [t.device for t in flatten(self.collective.results)[:1] if t.device.type != "cpu"]
                self._future = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
                if self.is_finished:
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
            if self.is_finished:
                return
            self.error = error
            if error is None:
                self.group.on_finished(self)
            self.is_finished = True
            future, ended = self._future, self._ended
        if ended is not None:
            ended.set()
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
        if call.is_finished:
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
            call.wait_until_finished()
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
        if not call.is_finished and call.work is not None and call.work.is_completed() and call.work.is_success():
            call.finish()
        return call.is_finished

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
            call.is_finished = True
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
                call.is_finished = True  # nothing to write, or a donor's state will replace it
                return
            for tensor, value in zip(flatten(call.collective.results), answer, strict=True):
                tensor.copy_(value)
        call.is_finished = True

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
            return next((call.seq for call in self.calls if not call.is_finished), self.next_seq)

    def truncate(self) -> None:
        """Forget the inputs of finished calls."""
        with self.lock:
            while self.calls and self.calls[0].is_finished:
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
