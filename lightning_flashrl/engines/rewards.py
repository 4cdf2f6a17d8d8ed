"""Rewards in processes of their own, each with a time limit: whatever a reward does costs its own row only.

=======================  ============================  ==============================================
who                      waits for                     unblocked by
=======================  ============================  ==============================================
the caller               nothing: it has a future      –
a thread, one a process  a job                         :meth:`RewardPool.submit` · close
… with a job             its process's answer          the answer · its end · ``timeout_s`` · close
=======================  ============================  ==============================================

A worker that takes too long is killed with its process group, and the thread starts another one. Workers end with this
process, however it ends: the kernel kills them when the thread that started them is gone.
"""

from __future__ import annotations

import collections
import pickle
import sys
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import cloudpickle

from lightning_flashrl.engines.reward_process import ProcessEnded, RewardProcess
from lightning_flashrl.engines.reward_worker import READY, REWARD, Settings
from lightning_flashrl.errors import ConfigurationError, RewardError
from lightning_flashrl.tasks import RewardFn

_START_TIMEOUT_S = 120.0


@dataclass(slots=True, eq=False)
class _Job:
    arguments: tuple[str, str, dict[str, Any]]
    future: Future[float]
    is_second_try: bool = False


class _Shared:
    """What the pool and its threads share. Whoever takes a future out of :attr:`open` finishes it."""

    def __init__(self, settings: Settings, timeout_s: float) -> None:
        self.settings = pickle.dumps(tuple(settings))
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.jobs: collections.deque[_Job] = collections.deque()
        self.open: set[Future[float]] = set()
        self.processes: set[RewardProcess] = set()
        self.is_closed = False
        self.has_started = False
        self.num_replaced = 0
        self.start_error: str | None = None

    def serve(self) -> None:
        """Compute rewards in one process after the other, until the pool is closed: a thread's life."""
        process = self._start()
        while (job := self._next()) is not None:
            if process is not None and not process.is_alive:  # it ended in idleness: not the row's fault
                self._end(process)
                process = None
            process = process or self._start()
            if process is None:
                self._fail(job, "start", self.start_error or "the pool is closed")
            elif not self._compute(process, job):
                process = None
        if process is not None:
            self._end(process)

    def _next(self) -> _Job | None:
        with self.changed:
            self.changed.wait_for(lambda: self.jobs or self.is_closed)
            return None if self.is_closed else self.jobs.popleft()

    def _start(self) -> RewardProcess | None:
        """Start a process and let it load the reward; ``None`` if that cannot be."""
        process, text = None, None
        try:
            with self.changed:
                if self.is_closed:
                    return None
                process = RewardProcess()
                self.processes.add(process)
            kind, text = process.ask(self.settings, _START_TIMEOUT_S)
        except OSError as error:
            kind, text = "", str(error)
        except ProcessEnded as ended:
            kind, text = "", f"not loaded after {_START_TIMEOUT_S:g} s" if ended.is_late else None
        if process is not None and kind != READY:
            how = self._end(process)
            process, text = None, text or f"the process {how}"
        with self.changed:
            self.has_started |= kind == READY
            self.start_error = text
            self.changed.notify_all()
        return process

    def _compute(self, process: RewardProcess, job: _Job) -> bool:
        """Compute a reward; return whether the process is still there."""
        if job.future.cancelled():
            self._take(job.future)
            return True
        try:
            message = pickle.dumps(job.arguments)
        except Exception as error:  # noqa: BLE001 - whatever pickle says of a row
            self._fail(job, "raised", f"the row cannot go to another process ({error})")
            return True
        try:
            kind, value = process.ask(message, self.timeout_s)
        except ProcessEnded as ended:
            how = self._end(process)
            with self.changed:
                self.num_replaced += not self.is_closed
            if not ended.has_begun and not job.is_second_try:
                job.is_second_try = True
                with self.changed:
                    self.jobs.appendleft(job)
            elif ended.is_late:
                self._fail(job, "timeout", f"took longer than {self.timeout_s:g} s")
            else:
                self._fail(job, "crash", f"ended its process, which {how}")
            return False
        if kind != REWARD:
            self._fail(job, kind, value)
        elif self._take(job.future):
            job.future.set_result(value)
        return True

    def _end(self, process: RewardProcess) -> str:
        with self.changed:
            self.processes.discard(process)
        return process.close()

    def _take(self, future: Future[float]) -> bool:
        """Take a future to finish it; return whether it wants a result."""
        with self.changed:
            is_mine = future in self.open
            self.open.discard(future)
        return is_mine and future.set_running_or_notify_cancel()

    def _fail(self, job: _Job, kind: str, text: str) -> None:
        if self._take(job.future):
            job.future.set_exception(RewardError(kind, job.arguments[2], text))

    def close(self) -> None:
        """Cancel what is open and kill all processes."""
        with self.changed:
            self.is_closed = True
            self.jobs.clear()
            cancelled, self.open = self.open, set()
            for process in self.processes:
                process.kill()
            self.changed.notify_all()
        for future in cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()


class RewardPool:
    """Computes rewards in worker processes, each call with a time limit.

    A call that raises, returns no finite number, takes too long, or ends its process fails its own row and no other:
    its future raises :class:`~lightning_flashrl.errors.RewardError`. The worker is then killed, with all processes of
    its group, and replaced. Rows are begun in the order in which they come, by whichever worker is free: each row that
    hangs costs one worker ``timeout_s`` seconds.

    A pool makes rewards bearable that hang or crash. It does not lock anything up: a reward may do all that this
    process may.

    Args:
        reward: the function, defined anywhere; it holds no open files, locks or processes. What it keeps between calls
            is kept until its worker is replaced.
        num_workers: processes.
        timeout_s: for each call, from when a worker begins it.
        max_memory_bytes: what a worker may allocate beyond what it has when the reward is loaded: a call that goes
            beyond that fails with ``MemoryError``. ``None`` for no limit.

    Raises:
        ConfigurationError: a setting that cannot be, or a reward that another process cannot load.

    >>> from lightning_flashrl.tasks import DigitSort
    >>> with RewardPool(DigitSort().reward, num_workers=1, timeout_s=60) as pool:
    ...     pool.submit("312>", "123", {}).result()
    1.0
    """

    def __init__(
        self,
        reward: RewardFn,
        *,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        max_memory_bytes: int | None = None,
    ) -> None:
        self._is_closed = True  # as long as there is nothing to close
        if num_workers < 1 or not timeout_s > 0:
            raise ConfigurationError(
                f"reward.num_workers={num_workers}, reward.timeout_s={timeout_s}; use 1 or more, and a time above 0"
            )
        if max_memory_bytes is not None and max_memory_bytes < 1:
            raise ConfigurationError(f"reward.max_memory_bytes={max_memory_bytes}; use 1 or more, or null for no limit")
        try:
            pickled = cloudpickle.dumps(reward)
        except Exception as error:
            raise _not_loadable(reward, str(error)) from error
        self._shared = _Shared(Settings(pickled, list(sys.path), max_memory_bytes), timeout_s)
        self._threads = [
            threading.Thread(target=self._shared.serve, name=f"flashrl-reward-{number}", daemon=True)
            for number in range(num_workers)
        ]
        self._is_closed = False
        for thread in self._threads:
            thread.start()
        with self._shared.changed:
            self._shared.changed.wait_for(lambda: self._shared.has_started or self._shared.start_error)
            error_text = None if self._shared.has_started else self._shared.start_error
        if error_text is not None:
            self.close()
            raise _not_loadable(reward, error_text)

    @property
    def num_replaced(self) -> int:
        """Workers that were replaced so far."""
        return self._shared.num_replaced

    def submit(self, prompt: str, completion: str, row: Mapping[str, Any]) -> Future[float]:
        """Begin to compute a reward as soon as a worker is free.

        Args:
            prompt: what the model read.
            completion: what it wrote.
            row: the problem's ``data`` and ``answer``.

        Returns:
            The reward, or a :class:`~lightning_flashrl.errors.RewardError`. Cancelling it drops a row that has not
            begun; one that has is computed and forgotten.

        Raises:
            ConfigurationError: the pool is closed.
        """
        job = _Job((prompt, completion, dict(row)), Future())
        with self._shared.changed:
            if self._shared.is_closed:
                raise ConfigurationError("the reward pool is closed; submit before close()")
            self._shared.open.add(job.future)
            self._shared.jobs.append(job)
            self._shared.changed.notify()
        return job.future

    def close(self) -> None:
        """Cancel what is not finished and end all workers."""
        if self._is_closed:
            return
        self._is_closed = True
        self._shared.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed:
            warnings.warn("a RewardPool was not closed; use it in a with statement", ResourceWarning, stacklevel=2)
            self.close()


def _not_loadable(reward: object, text: str) -> ConfigurationError:
    return ConfigurationError(
        f"the reward {reward!r} cannot be loaded in another process ({text}); give a function or an object "
        "that holds no open files, locks or processes, and whose module the other process can import"
    )
