"""gloo groups whose operations end once the group is broken, also those that gloo itself forgets.

A send that gloo's own thread writes at the moment at which the connection breaks is in none of the lists that gloo
looks through for operations to end: whoever waits for it waits for the time-out of the group, half an hour. Nothing can
wake that thread. So a wait here looks up now and then, and once the group is broken it ends as soon as it is certain
that gloo does nothing more with the operation's tensors: they may be used again then.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Work

from lightning_flashrl import clock
from lightning_flashrl.communicator.collectives import COLLECTIVES, TRANSFERS

_LOOK = timedelta(milliseconds=100)
_CLOSE_LOOK = timedelta(milliseconds=10)
_NO_TIMEOUT = timedelta(0)
_NUM_TICKS = 5
_WORKER, _LOOP = "pt_gloo_runloop", "gloo_tcp_loop"
"""Names of the threads in which torch runs collectives, and in which gloo reads and writes."""
_ABORTED = "the gloo group was aborted: it is formed anew without this operation"


class Stillness:
    """Proof that gloo does nothing more for operations on connections that have been shut.

    gloo's loop wakes every 10 ms. When it has done so a few times since they were shut, it has closed all of them and
    reads into no tensor any longer; a worker that sleeps all the while waits for what can no longer come.
    """

    def __init__(self) -> None:
        self._ticks, self._workers = _look_at_threads()

    def is_proven(self) -> bool:
        """Whether everything has been still since the proof began; it begins anew whenever something moves."""
        ticks, workers = _look_at_threads()
        is_asleep = all(state == "S" for state, _ in workers.values())
        if workers != self._workers or not is_asleep or ticks.keys() != self._ticks.keys():
            self._ticks, self._workers = ticks, workers
            return False
        return bool(ticks) and all(count - self._ticks[thread] >= _NUM_TICKS for thread, count in ticks.items())


def _look_at_threads() -> tuple[dict[str, int], dict[str, tuple[str, int]]]:
    """How often each of gloo's loops has slept, and of each worker whether it sleeps and how often it did before."""
    ticks: dict[str, int] = {}
    workers: dict[str, tuple[str, int]] = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/status") as file:
                facts = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
        except OSError:  # it ended
            continue
        if facts["Name"] == _LOOP:
            ticks[thread] = int(facts["voluntary_ctxt_switches"])
        elif facts["Name"] == _WORKER:
            switches = int(facts["voluntary_ctxt_switches"]) + int(facts["nonvoluntary_ctxt_switches"])
            workers[thread] = (facts["State"][:1], switches)
    return ticks, workers


def _wait_until(has_ended: Callable[[timedelta], bool], broken: threading.Event) -> None:
    """Wait for an operation, which is asked again and again; once its group is broken, only until gloo is still."""
    stillness: Stillness | None = None
    while not has_ended(_LOOK if stillness is None else _CLOSE_LOOK):
        if stillness is None:
            stillness = Stillness() if broken.is_set() else None
        elif stillness.is_proven():
            raise RuntimeError(_ABORTED)


class GlooWork(Work):
    """A collective.

    Args:
        native: gloo's handle.
        broken: set when the connections of its group have been shut.
    """

    def __init__(self, native: Work, broken: threading.Event) -> None:
        super().__init__()
        self._native = native
        self._broken = broken

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Block until the collective is over.

        Raises:
            RuntimeError: it failed, took longer than ``timeout``, or was forgotten by gloo when its group broke.
        """
        deadline_s = clock.now_s() + timeout.total_seconds() if timeout > _NO_TIMEOUT else None

        def has_ended(within: timedelta) -> bool:
            try:
                self._native.wait(within)
            except RuntimeError:
                if deadline_s is not None and clock.now_s() > deadline_s and not self._native.is_completed():
                    raise RuntimeError(f"the collective timed out after {timeout.total_seconds():g} s") from None
                return self._native.is_completed()
            return True

        _wait_until(has_ended, self._broken)
        return self._native.wait()

    def is_completed(self) -> bool:
        """Whether it is over."""
        return self._native.is_completed()

    def is_success(self) -> bool:
        """Whether it is over and went well."""
        return self._native.is_completed() and self._native.is_success()

    def get_future(self) -> torch.futures.Future[Any]:
        """The native future; that of a forgotten collective is not resolved."""
        return self._native.get_future()

    def result(self) -> list[torch.Tensor]:
        """The tensors it writes."""
        return self._native.result()

    def synchronize(self) -> None:
        """Same as :meth:`wait`."""
        self.wait()


class GlooTransfer(Work):
    """A send or a receive. gloo waits for these in the thread that asks, so that is another one.

    Args:
        native: gloo's handle.
        broken: set when the connections of its group have been shut.
    """

    def __init__(self, native: Work, broken: threading.Event) -> None:
        super().__init__()
        self._native = native
        self._broken = broken

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Block until the tensor is under way, or has arrived.

        Raises:
            RuntimeError: the peer was lost.
        """
        errors: list[RuntimeError] = []
        ended = threading.Event()

        def run() -> None:
            try:
                self._native.wait(timeout)
            except RuntimeError as error:
                errors.append(error)
            ended.set()

        threading.Thread(target=run, name="flashrl-transfer", daemon=True).start()
        _wait_until(lambda within: ended.wait(within.total_seconds()), self._broken)
        if errors:
            raise errors[0]
        return True


class GlooGroup:
    """A native group whose operations return handles that end; everything else is the native group's.

    Args:
        native: gloo's group.
    """

    def __init__(self, native: ProcessGroupGloo) -> None:
        self.broken = threading.Event()
        self._native: ProcessGroupGloo | None = native

    def give_up(self) -> ProcessGroupGloo | None:
        """Its connections have been shut. Returns the native group, which this object no longer holds."""
        self.broken.set()
        native, self._native = self._native, None
        return native

    def __getattr__(self, name: str) -> Any:
        native = self._native
        if native is None:
            raise RuntimeError(_ABORTED)
        method = getattr(native, name)
        if name in TRANSFERS:
            return lambda *args: GlooTransfer(method(*args), self.broken)
        if name in COLLECTIVES:
            return lambda *args: GlooWork(method(*args), self.broken)
        return method


def release(natives: list[ProcessGroupGloo]) -> None:
    """Let go of broken native groups in a thread of their own: their end waits for that of every operation."""
    left, natives[:] = natives.copy(), []

    def run() -> None:
        nonlocal left
        while left := [native for native in left if sys.getrefcount(native) > _NUM_OWN_REFERENCES]:
            clock.sleep(_LOOK.total_seconds())

    if left:
        threading.Thread(target=run, name="flashrl-release", daemon=True).start()


_NUM_OWN_REFERENCES = 3
"""To an element of a list that is looked at: the list's, the variable's and that of the call which counts."""
