"""The other end of a :mod:`~lightning_flashrl.engines.reward_worker`: two pipes and a descriptor of the process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import Any

from lightning_flashrl import clock
from lightning_flashrl.engines import reward_worker
from lightning_flashrl.engines.reward_worker import BEGUN, LENGTH

_BLOCK_BYTES = 1 << 16
_END_S = 2.0
"""A process that closes its pipes is about to end; so long its own end is waited for, to tell how that was."""


class ProcessEnded(Exception):  # noqa: N818 - no error yet: who asked decides what it means
    """A worker process has ended, or does not answer in time.

    Attributes:
        is_late: whether it is still there.
        has_begun: whether it had begun with a job.
    """

    def __init__(self, *, is_late: bool, has_begun: bool) -> None:
        super().__init__(is_late, has_begun)
        self.is_late = is_late
        self.has_begun = has_begun


class RewardProcess:
    """A worker process, seen from the thread that started it: the two end together.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self._answers, their_end = os.pipe()
        self._has_begun = False
        self._has_hung_up = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", reward_worker.__file__, str(their_end), str(os.getpid())],
                stdin=subprocess.PIPE,
                pass_fds=(their_end,),
                start_new_session=True,  # Ctrl-C is for who started it; and a group of its own can be killed
            )
        except OSError:
            os.close(self._answers)
            raise
        finally:
            os.close(their_end)
        assert self._process.stdin is not None
        self._jobs = self._process.stdin.fileno()
        os.set_blocking(self._jobs, False)
        self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self._has_ended(0.0)

    def _has_ended(self, wait_s: float) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(wait_s * 1000))

    def ask(self, message: bytes, timeout_s: float) -> tuple[str, Any]:
        """Send settings or a job, and return the kind and the value of the answer.

        Raises:
            ProcessEnded: there is none.
        """
        deadline_s = clock.now_s() + timeout_s
        self._has_begun = False
        self._write(message, deadline_s)
        kind, value = self._answer(deadline_s)
        if kind == BEGUN:
            self._has_begun = True
            kind, value = self._answer(deadline_s)
        return kind, value

    def _answer(self, deadline_s: float) -> tuple[str, Any]:
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline_s))
        try:
            kind, value = json.loads(self._read(length, deadline_s))
        except ValueError as error:  # the reward wrote on our pipe
            raise self._end() from error
        return kind, value

    def _end(self, *, is_late: bool = False) -> ProcessEnded:
        return ProcessEnded(is_late=is_late, has_begun=self._has_begun)

    def _write(self, data: bytes, deadline_s: float) -> None:
        while data:
            self._wait(self._jobs, select.POLLOUT, deadline_s)
            try:
                data = data[os.write(self._jobs, data[:_BLOCK_BYTES]) :]
            except BrokenPipeError as error:
                self._has_hung_up = True
                raise self._end() from error

    def _read(self, length: int, deadline_s: float) -> bytes:
        data = b""
        while len(data) < length:
            self._wait(self._answers, select.POLLIN, deadline_s)
            block = os.read(self._answers, length - len(data))
            if not block:
                self._has_hung_up = True
                raise self._end()
            data += block
        return data

    def _wait(self, fd: int, event: int, deadline_s: float) -> None:
        """Wait until a pipe is ready. What an ended process has written is read first."""
        poller = select.poll()
        poller.register(fd, event)
        poller.register(self._pidfd, select.POLLIN)
        ready = dict(poller.poll(max(0.0, deadline_s - clock.now_s()) * 1000))
        if fd not in ready:
            raise self._end(is_late=not ready)

    def kill(self) -> None:
        """End the process and those of its group. Until :meth:`close` has waited, its number is nobody else's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> str:
        """End the process, wait for that, and say how it ended."""
        has_ended = self._has_ended(_END_S if self._has_hung_up else 0.0)
        self.kill()
        code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._answers)
        os.close(self._pidfd)
        if not has_ended:
            return "was killed"
        return f"exited with status {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
