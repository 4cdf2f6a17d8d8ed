"""A task of the queue as something to iterate over: in a loop, in a torch DataLoader, in a Lightning Trainer.

=====================  ==================================================  ========================================
who                    waits for                                           unblocked by
=====================  ==================================================  ========================================
the loop               the next lease                                      the thread
the thread             rows; a free place in the buffer; half a lease's    the queue; the loop; time
                       time, to renew what the loop has not committed
=====================  ==================================================  ========================================
"""

from __future__ import annotations

import contextlib
import queue as standard_queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError, EndOfStream, FlashRLError, LeaseLostError, LeaseTimeoutError
from lightning_flashrl.streaming.queue import Lease, QueueVerbs
from lightning_flashrl.streaming.samplers import Sampler

_LOOK_S = 0.2
"""How often a thread that waits for rows looks whether the loop is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What each iteration brings; see :meth:`QueueVerbs.lease`.

    Attributes:
        fields: what to bring; empty for the task's own.
        count: this many rows, or
        tokens: as many rows as fit into so many tokens.
        sampler: another than the task's, or its name.
        allow_partial: take what is ready.
        replica_rank: which data-parallel replica iterates.
        policy_version: the version that will be trained, for samplers that look at it.
    """

    fields: Iterable[str] = ()
    count: int | None = None
    tokens: int | None = None
    sampler: Sampler | str | None = None
    allow_partial: bool = False
    replica_rank: int = 0
    policy_version: int | None = None


class StreamingDataset(IterableDataset[Lease]):
    """Leases of one task, until the queue is closed and all rows are committed.

    Iterate over it, or wrap it in ``DataLoader(dataset, batch_size=None)``. Rows are fetched ahead by a thread, and
    their leases are renewed as long as the loop has them.

    Args:
        queue: the queue, or a client of it.
        task: which task.
        request: what each iteration brings.
        prefetch: leases that are fetched ahead; 0 fetches when the loop asks.
        commits: whether asking for the next lease commits the one before. If not, the loop commits or releases each; it
            is told the end of the stream once it has all that is left.

    Raises:
        ConfigurationError: a negative ``prefetch``.

    >>> from lightning_flashrl.streaming import Field, TransferQueue
    >>> with TransferQueue({"x": Field(int)}, ["train"]) as queue:
    ...     rows = queue.put({"x": [1, 2, 3, 4, 5]})
    ...     queue.close()
    ...     [lease["x"] for lease in StreamingDataset(queue, "train", Request(count=2))]
    [[1, 2], [3, 4], [5]]
    """

    def __init__(
        self, queue: QueueVerbs, task: str, request: Request, *, prefetch: int = 1, commits: bool = True
    ) -> None:
        if prefetch < 0:
            raise ConfigurationError(f"prefetch={prefetch}; use 0 or more")
        self.queue = queue
        self.task = task
        self.request = request
        self.prefetch = prefetch
        self.commits = commits

    def __iter__(self) -> Iterator[Lease]:
        if get_worker_info() is not None:
            raise ConfigurationError(
                "StreamingDataset fetches ahead by itself and its leases belong to the process that iterates; use "
                "DataLoader(num_workers=0)"
            )
        leases = self._fetched() if self.prefetch else self._asked()
        if not self.commits:
            yield from leases
            return
        for lease in leases:
            try:
                yield lease
            except GeneratorExit:
                self._release(lease)
                raise
            self.queue.commit(lease)

    # ------------------------------------------------------------------ with and without a thread
    def _lease(self, timeout_s: float | None) -> Lease:
        wanted = self.request
        return self.queue.lease(
            self.task,
            wanted.fields,
            wanted.count,
            wanted.tokens,
            sampler=wanted.sampler,
            allow_partial=wanted.allow_partial,
            replica_rank=wanted.replica_rank,
            policy_version=wanted.policy_version,
            timeout_s=timeout_s,
        )

    def _asked(self) -> Iterator[Lease]:
        with contextlib.suppress(EndOfStream):
            while True:
                yield self._lease(None)

    def _fetched(self) -> Iterator[Lease]:
        ahead = _Ahead(self)
        try:
            while True:
                item = ahead.next()
                if isinstance(item, EndOfStream):
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ahead.stop()

    def _release(self, lease: Lease) -> None:
        with contextlib.suppress(LeaseLostError):
            self.queue.release(lease)


class _Ahead:
    """A thread that leases ahead of a loop and renews what the loop has."""

    def __init__(self, dataset: StreamingDataset) -> None:
        self._dataset = dataset
        self._items: standard_queue.Queue[Lease | BaseException] = standard_queue.Queue()
        self._free = threading.Semaphore(dataset.prefetch)
        self._over = threading.Event()
        self._held: dict[int, Lease] = {}
        self._thread = threading.Thread(target=self._run, name="flashrl-loader", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._renew()
                if self._free.acquire(timeout=_LOOK_S):
                    lease = self._fetch()
                    if lease is not None:
                        self._held[lease.lease_id] = lease
                        self._items.put(lease)
        except BaseException as error:  # noqa: BLE001 - whoever waits for rows gets it
            self._items.put(error)
        with contextlib.suppress(FlashRLError):
            while not self._over.wait(_LOOK_S):
                self._renew()

    def _fetch(self) -> Lease | None:
        while not self._over.is_set():
            try:
                return self._dataset._lease(_LOOK_S)
            except LeaseTimeoutError:
                self._renew()
                if self._has_the_rest():
                    raise EndOfStream(self._dataset.task) from None
        return None

    def _has_the_rest(self) -> bool:
        """Whether the loop itself has all that is not committed: it may not do so before it is told the end."""
        seen = self._dataset.queue.statistics()
        task = seen.tasks[self._dataset.task]
        return seen.is_closed and task.num_open == task.num_leased <= sum(map(len, self._held.values()))

    def _renew(self) -> None:
        now_s = clock.now_s()
        for lease in list(self._held.values()):
            if now_s > lease.deadline_s - lease.timeout_s / 2:
                try:
                    self._held[lease.lease_id] = self._dataset.queue.renew(lease)
                except LeaseLostError:  # the loop has committed or released it
                    del self._held[lease.lease_id]

    # ------------------------------------------------------------------ the loop
    def next(self) -> Lease | BaseException:
        """Wait for the next lease, or for what ended the thread."""
        item = self._items.get()
        self._free.release()
        return item

    def stop(self) -> None:
        """End the thread and give back what the loop did not take."""
        self._over.set()
        self._thread.join()
        while not self._items.empty():
            item = self._items.get()
            if isinstance(item, Lease):
                self._dataset._release(item)
