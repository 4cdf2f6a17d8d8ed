"""A worker of one task between rollout and update: leases rows, computes fields of them, writes them back.

=====================  ==============================  ==========================
the worker             waits for                       unblocked by
=====================  ==============================  ==========================
with nothing to do     rows of its task                rollouts · the stream's end
with rows              nothing: it computes            –
=====================  ==============================  ==========================

Results are committed together with the lease of their rows: a worker may die at any moment, and its rows go to another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_flashrl import clock
from lightning_flashrl.engines.worker import WorkerStatistics
from lightning_flashrl.errors import ConfigurationError, EndOfStream, LeaseLostError, LeaseTimeoutError, UnknownRowError
from lightning_flashrl.streaming import Lease, QueueVerbs

_LOOK_S = 0.2
_HOLD_S = 0.02
"""How long a result may wait for others before it is written."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a row.

    Attributes:
        row: its number.
        data: its fields; ``None`` if it failed: then it is counted and cleared.
        num_tokens: tokens that were looked at, for the statistics.
        why: it failed, if it did.
    """

    row: int
    data: Mapping[str, Any] | None
    num_tokens: int = 0
    why: str = ""


class Stage(Protocol):
    """What a task's worker computes. One's own may be any function of a lease."""

    def __call__(self, lease: Lease) -> Iterator[Result | None]:
        """Go through a lease's rows, and give a result for each.

        What takes long gives ``None`` now and then: a lease is renewed, and a worker may end, between two of these.
        """


@dataclass(slots=True)
class _Batch:
    """A lease, and results that are not written yet."""

    lease: Lease
    results: list[Result] = field(default_factory=list)
    written_s: float = field(default_factory=clock.now_s)


class StageWorker:
    """Computes one task's fields, row by row.

    Args:
        queue: where rows come from and go to.
        task: of the queue.
        fields: what the stage reads; rows are ready when they have all of them.
        stage: computes.
        count: rows leased together at most, or
        tokens: tokens leased together at most.

    Attributes:
        statistics: what it has done so far.

    Raises:
        ConfigurationError: neither a count nor tokens.
    """

    def __init__(
        self,
        queue: QueueVerbs,
        task: str,
        fields: Sequence[str],
        stage: Stage,
        *,
        count: int | None = None,
        tokens: int | None = None,
    ) -> None:
        if (count is None) == (tokens is None):
            raise ConfigurationError(f"a worker of task {task!r} with count={count}, tokens={tokens}; give one of them")
        self.statistics = WorkerStatistics()
        self._queue = queue
        self._task = task
        self._fields = tuple(fields)
        self._stage = stage
        self._count = count
        self._tokens = tokens

    def run(self, stop: threading.Event | None = None) -> None:
        """Work until the stream ends, or until ``stop`` is set: then the rows that are left are given back.

        Raises:
            QueueUnavailableError: the queue is gone.
        """
        while stop is None or not stop.is_set():
            begin_s = clock.now_s()
            try:
                lease = self._queue.lease(
                    self._task,
                    self._fields,
                    self._count,
                    self._tokens,
                    allow_partial=True,
                    timeout_s=_LOOK_S,
                )
            except LeaseTimeoutError:
                continue
            except EndOfStream:
                return
            finally:
                self.statistics.idle_s += clock.now_s() - begin_s
            self._work(lease, stop)

    def _work(self, lease: Lease, stop: threading.Event | None) -> None:
        batch, begin_s = _Batch(lease), clock.now_s()
        left = set(lease.rows)
        try:
            for result in self._stage(lease):
                if result is not None:
                    left.discard(result.row)
                    batch.results.append(result)
                if clock.now_s() > batch.written_s + _HOLD_S:
                    self._write(batch)
                if stop is not None and stop.is_set():
                    break
                self._renew(batch)
            self._write(batch)
        finally:
            self.statistics.busy_s += clock.now_s() - begin_s
            if left:
                with contextlib.suppress(LeaseLostError):
                    self._queue.release(batch.lease, rows=sorted(left))

    def _renew(self, batch: _Batch) -> None:
        if clock.now_s() > batch.lease.deadline_s - batch.lease.timeout_s / 2:
            with contextlib.suppress(LeaseLostError):  # noticed again when it is committed
                batch.lease = self._queue.renew(batch.lease)

    # ------------------------------------------------------------------ results
    def _write(self, batch: _Batch) -> None:
        results, batch.results = batch.results, []
        batch.written_s = clock.now_s()
        failed = [result for result in results if result.data is None]
        if failed:
            self.statistics.last_failure = failed[-1].why
            self._fail(batch.lease, [result.row for result in failed])
        self._commit(batch.lease, [result for result in results if result.data is not None])

    def _fail(self, lease: Lease, rows: list[int]) -> None:
        """Forget rows for good; their prompt groups go on without them."""
        self.statistics.num_failed += len(rows)
        for row in rows:
            with contextlib.suppress(UnknownRowError):  # cleared meanwhile
                self._queue.clear([row])
        with contextlib.suppress(LeaseLostError):
            self._queue.release(lease, rows=rows)

    def _commit(self, lease: Lease, results: list[Result]) -> None:
        gone: set[int] = set()
        while done := [result for result in results if result.row not in gone]:
            names = dict.fromkeys(name for result in done for name in result.data or ())
            data = {name: [(result.data or {})[name] for result in done] for name in names}
            try:
                self._queue.commit(lease, data, rows=[result.row for result in done])
            except UnknownRowError as error:  # cleared meanwhile
                gone.update(error.rows)
            except LeaseLostError:
                gone.update(result.row for result in done)
            else:
                self.statistics.num_completions += len(done)
                self.statistics.num_tokens += sum(result.num_tokens for result in done)
                break
        self.statistics.num_lost += len(gone)
        if gone:
            with contextlib.suppress(LeaseLostError):
                self._queue.release(lease, rows=sorted(gone))
