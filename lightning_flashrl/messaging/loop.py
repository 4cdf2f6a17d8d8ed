"""One thread that waits for many things: descriptors, ZeroMQ sockets, timers and signals."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeAlias

import zmq

from lightning_flashrl import clock

Source: TypeAlias = "int | zmq.Socket[bytes]"


class Timer:
    """A callback that is due at some time; :meth:`cancel` forgets it."""

    def __init__(self, due_s: float, callback: Callable[[], None]) -> None:
        self.due_s = due_s
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call it."""
        self.callback = None


class EventLoop:
    """Calls back when something is ready. Callbacks run in the thread of :meth:`run_until` and must not block."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._readers: dict[Source, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    # ------------------------------------------------------------------ sources
    def add_reader(self, source: Source, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``source`` can be read."""
        self._readers[source] = callback
        self._register(source)

    def remove(self, source: Source) -> None:
        """Forget a source; unknown ones are fine."""
        self._readers.pop(source, None)
        if isinstance(source, int):
            self._writers.pop(source, None)
        self._register(source)

    def set_writer(self, fd: int, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` whenever ``fd`` can be written; ``None`` stops that."""
        if callback is not None:
            self._writers[fd] = callback
        else:
            self._writers.pop(fd, None)
        self._register(fd)

    def _register(self, source: Source) -> None:
        flags = zmq.POLLIN if source in self._readers else 0
        if isinstance(source, int) and source in self._writers:
            flags |= zmq.POLLOUT
        if flags:
            self._poller.register(source, flags)
        else:
            with contextlib.suppress(KeyError):
                self._poller.unregister(source)

    # ------------------------------------------------------------------ timers
    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once, ``delay_s`` from now."""
        timer = Timer(clock.now_s() + delay_s, callback)
        heapq.heappush(self._timers, (timer.due_s, next(self._order), timer))
        return timer

    def call_every(self, interval_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` again and again."""

        def again() -> None:
            self.call_later(interval_s, again)
            callback()

        self.call_later(interval_s, again)

    # ------------------------------------------------------------------ running
    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Serve until ``is_done()``, which is asked after every round of callbacks."""
        while not is_done():
            self.run_once()

    def run_once(self) -> None:
        """Wait for something and serve it."""
        for source, flags in self._poller.poll(self._timeout_ms()):
            if flags & zmq.POLLOUT and isinstance(source, int):
                writer = self._writers.get(source)
                if writer is not None:
                    writer()
            if flags & ~zmq.POLLOUT:
                reader = self._readers.get(source)
                if reader is not None:
                    reader()
        now_s = clock.now_s()
        while self._timers and self._timers[0][0] <= now_s:
            _, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()

    def _timeout_ms(self) -> int | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0, int((self._timers[0][0] - clock.now_s()) * 1000 + 0.999))

    @contextlib.contextmanager
    def catch_signals(self, numbers: tuple[signal.Signals, ...], callback: Callable[[int], None]) -> Iterator[None]:
        """Turn signals into callbacks while the context lasts. Main thread only."""
        read, write = socket.socketpair()
        read.setblocking(False)
        write.setblocking(False)

        def on_readable() -> None:
            with contextlib.suppress(BlockingIOError):
                for number in read.recv(64):
                    if number in numbers:
                        callback(number)

        def ignore(_number: int, _frame: FrameType | None) -> None:
            """Python writes the number into the wake-up descriptor by itself."""

        old_handlers: dict[signal.Signals, Any] = {number: signal.signal(number, ignore) for number in numbers}
        old_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self.add_reader(read.fileno(), on_readable)
        try:
            yield
        finally:
            self.remove(read.fileno())
            signal.set_wakeup_fd(old_fd)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            read.close()
            write.close()
