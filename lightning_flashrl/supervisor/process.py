"""Processes of a node: started so that they die with their parent, and watched by descriptor instead of by polling."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing.connection
import multiprocessing.util
import os
import secrets
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from lightning_flashrl import clock
from lightning_flashrl.procfs import all_processes, is_stopped, read_stat

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What a user sends to a job to end it."""
SHORTAGES = (errno.EAGAIN, errno.ENOMEM)
"""Why there may be no process now, and one a second later."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PIDFD_THREAD = os.O_EXCL
_PF_EXITING = 4
_FLAGS, _EXIT_CODE = 6, 49
"""Places in /proc/PID/stat, behind the name."""
_REPARENT_CHECK_S = 0.0005
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def name_process(name: str) -> None:
    """Set the name that the kernel shows for this process, of at most 15 characters."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def become_subreaper(is_on: bool = True) -> None:
    """Make orphaned descendants children of this process, so that it can wait for them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(is_on))


def let_workers_die_with_rank() -> None:
    """Make worker processes that ``multiprocessing`` forks from this process's main thread die with this process.

    The kernel ties such a wish to the parent's *thread*; a worker of another thread would die when that thread ends.
    """
    main_thread = threading.get_ident()
    rank_pid = os.getpid()
    is_from_main = False

    def before_fork() -> None:
        nonlocal is_from_main
        is_from_main = threading.get_ident() == main_thread

    def in_worker(_: object) -> None:
        if is_from_main and os.getppid() == rank_pid:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(before=before_fork)
    multiprocessing.util.register_after_fork(_libc, in_worker)


def let_workers_leave_no_files() -> None:
    """Let the sockets over which worker processes pass descriptors have no name in the file system.

    ``multiprocessing`` makes a folder for each, and a worker that is killed leaves it. Only listeners that ask for a
    key are changed: a folder keeps strangers out, an abstract address does not.
    """
    listener = multiprocessing.connection.Listener
    begin = listener.__init__

    def begin_abstract(
        self: multiprocessing.connection.Listener,
        address: Any = None,
        family: str | None = None,
        backlog: int = 1,
        authkey: bytes | None = None,
    ) -> None:
        if address is None and family in (None, "AF_UNIX") and authkey is not None:
            address = f"\0flashrl-{os.getpid()}-{secrets.token_hex(8)}"
        begin(self, address, family, backlog, authkey)

    listener.__init__ = begin_abstract  # type: ignore[method-assign]


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent dies.

    The process may still be on its way to ``parent_pid`` (its first parent forked it and left); it waits for that.
    """
    while os.getppid() != parent_pid:
        if not os.path.exists(f"/proc/{parent_pid}"):
            os.kill(os.getpid(), signal.SIGKILL)
        clock.sleep(_REPARENT_CHECK_S)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died between the two lines above
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended.

    >>> str(ExitStatus(9, is_signal=True)), ExitStatus(9, is_signal=True).shell_code
    ('killed by SIGKILL', 137)
    """

    number: int
    is_signal: bool

    @property
    def shell_code(self) -> int:
        """The status as a shell shows it."""
        return 128 + self.number if self.is_signal else self.number

    def __str__(self) -> str:
        if not self.is_signal:
            return f"exited with status {self.number} without a report"
        try:
            return f"killed by {signal.Signals(self.number).name}"
        except ValueError:
            return f"killed by signal {self.number}"


class Process:
    """A process, watched through a pidfd; to learn how it ended it must be a child of this one.

    Raises:
        ProcessLookupError: there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._status: ExitStatus | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal; a process that has ended is fine."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def poll(self) -> ExitStatus | None:
        """Return how the process ended, or ``None`` while it runs; its descriptor is closed afterwards."""
        if self._status is None:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            if result is None:
                return None
            os.close(self.pidfd)
            self._status = ExitStatus(result.si_status, result.si_code != os.CLD_EXITED)
        return self._status

    def ending(self) -> ExitStatus | None:
        """Return how the process will have ended, once none of its threads can execute anything any more.

        From then on the kernel only takes its memory apart, which it does before it tells anybody: milliseconds for
        each 100 MB. ``None`` as long as a thread may still run.
        """
        stats = [read_stat(f"/proc/{self.pid}/task/{thread}/stat") for thread in _threads(self.pid)]
        own = read_stat(f"/proc/{self.pid}/stat")
        if not own or any(stat and not int(stat[_FLAGS]) & _PF_EXITING for stat in [own, *stats]):
            return None
        code = int(own[_EXIT_CODE])
        signal_number = code & 0x7F
        return ExitStatus(signal_number or code >> 8, bool(signal_number))

    def end(self) -> None:
        """Kill the process, wait for its end and close the descriptor."""
        if self._status is None:
            self.send_signal(signal.SIGKILL)
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
            self.poll()

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process."""
        return is_stopped(self.pid)


def open_thread(thread: int) -> int | None:
    """Return a descriptor that can be read when a thread ends; ``None`` before Linux 6.9 or when it has ended."""
    try:
        return os.pidfd_open(thread, _PIDFD_THREAD)
    except OSError:
        return None


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []


def spawn(argv: list[str], environ: dict[str, str], fds: tuple[int, ...] = ()) -> int:
    """Start a program in a session of its own and return its number.

    ``fds`` and every inheritable descriptor stay open in it.
    """
    actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds]
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        return os.posix_spawnp(argv[0], argv, environ, file_actions=actions, setsid=True)
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


def fork(live: Callable[[], int]) -> int:
    """Make a copy of this process that runs ``live`` and ends with its status; return the copy's number.

    Whatever happens, the copy never returns into the program that it was copied from. Signals wait in it until it has
    handlers of its own.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the copy has one thread, and misses no other
            pid = os.fork()
        if pid == 0:
            _live_and_end(live)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _live_and_end(live: Callable[[], int]) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)  # else a signal to the copy would be handled by the original's event loop
        status = live()
    except BaseException:  # noqa: BLE001 - nobody above may see it
        traceback.print_exc()
    finally:
        os._exit(status)


def children() -> list[int]:
    """Return the process numbers of all children of this process, adopted ones included."""
    stats = {pid: read_stat(f"/proc/{pid}/stat") for pid in all_processes()}
    return [pid for pid, stat in stats.items() if stat and int(stat[1]) == os.getpid()]


def bury(pid: int) -> ExitStatus | None:
    """Collect a child that has ended and say how; ``None`` while it runs, or when it is no child.

    What it left behind in its process group is ended before its number can be given to another process.
    """
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if result is None:
        return None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return ExitStatus(result.si_status, result.si_code != os.CLD_EXITED)


def reap_strangers(known: set[int]) -> None:
    """Collect adopted children that have ended, up to the first that is one of ``known``."""
    with contextlib.suppress(ChildProcessError):
        while True:
            result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if result is None or result.si_pid in known:
                return
            os.waitpid(result.si_pid, os.WNOHANG)
