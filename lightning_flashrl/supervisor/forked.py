"""A job whose ranks are forked from the running interpreter, for programs that exist nowhere but in its memory.

::

    interpreter ── fork ──▶ keeper ─fork─┬▶ supervisor: controller and agent
        ▲  ▲                             └▶ ranks, and a process that waits to replace one
        │  └── verdict ──────────────────── supervisor
        └───── output of all (pipes) ────── supervisor, ranks

The keeper (a :class:`~lightning_flashrl.supervisor.root.Root`) never runs the user's code: it stays the copy of the
interpreter that it was when the job began, so a replacement begins with the same objects and random states as the rank
it replaces. What the interpreter waits for:

=================== ==========================================
ready               means
=================== ==========================================
the keeper's pidfd  the job is over and all processes are gone
a pipe              output of the ranks, or of the keeper
=================== ==========================================

Everything dies with the interpreter (the kernel sees to that), and nothing has a name in the file system.
"""

from __future__ import annotations

import atexit
import builtins
import codecs
import contextlib
import errno
import gc
import logging
import multiprocessing
import os
import pickle
import secrets
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TextIO

from lightning_flashrl.errors import FatalError
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.packets import PacketChannel
from lightning_flashrl.recovery.slot import Heartbeat, RankSlot
from lightning_flashrl.supervisor.channel import RankChannel
from lightning_flashrl.supervisor.chronicle import Chronicle
from lightning_flashrl.supervisor.controller import JobSettings
from lightning_flashrl.supervisor.environment import RankEnvironment, slot_region_bytes
from lightning_flashrl.supervisor.pool import Candidate, StandbyPool
from lightning_flashrl.supervisor.process import STOP_SIGNALS, Process, die_with_parent, fork
from lightning_flashrl.supervisor.root import Root
from lightning_flashrl.supervisor.root_link import RootLink
from lightning_flashrl.supervisor.runner import run_reported
from lightning_flashrl.supervisor.seat import AgentSettings
from lightning_flashrl.supervisor.standby import await_order, take_seat
from lightning_flashrl.supervisor.supervise import Supervision

_CHUNK_BYTES = 1 << 16
_RUN_ID = "notebook"
_FIRST_FILL_DELAY_S = 0.1


@dataclass(frozen=True, slots=True)
class _Output:
    """A stream of this interpreter, and the pipe through which the job's processes write to it."""

    name: str
    shown_on: TextIO
    reader: BinaryIO
    writer: BinaryIO


class ForkedJob:
    """One job; :meth:`run` may be called once.

    Args:
        program: what each rank runs.
        num_ranks: how many there are.
        log_dir: keep the output of all ranks and ``recovery.jsonl`` there, as ``flashrun --log-dir`` does.
    """

    def __init__(self, program: Callable[[], None], num_ranks: int, log_dir: str | None = None) -> None:
        self._program = program
        self._num_ranks = num_ranks
        self._log_dir = None if log_dir is None else os.path.abspath(log_dir)
        self._region_bytes = slot_region_bytes()
        self._slots: list[RankSlot] = []
        self._slots_lock = threading.Lock()
        self._keeper: Process | None = None

    # ------------------------------------------------------------------ in the interpreter
    def run(self) -> None:
        """Run the job to its end, and show what its processes print. An exception that comes up here stops the job.

        Raises:
            UserCodeError: the program raised in a rank.
            FatalError: any other end but the good one.
        """
        with contextlib.ExitStack() as stack:
            outputs = _open_outputs(stack)
            verdict_fd = os.memfd_create("flashrl-verdict")
            stack.callback(os.close, verdict_fd)
            stack.callback(self._close_slots)
            self._make_slots()
            keeper = self._keeper = self._fork_keeper(outputs, verdict_fd)
            stack.callback(keeper.end)
            for output in outputs:
                output.writer.close()
            try:
                _follow(keeper, outputs)
            except BaseException:
                keeper.send_signal(signal.SIGINT)
                _follow(keeper, outputs)
                raise
            keeper.end()
            _judge(os.pread(verdict_fd, os.fstat(verdict_fd).st_size, 0), keeper)

    def stop(self, signal_number: int) -> None:
        """Let the ranks get a signal; they are killed if they do not heed it. May be called by any thread."""
        if self._keeper is not None:
            self._keeper.send_signal(signal_number)

    def heartbeats(self) -> dict[int, Heartbeat]:
        """What each rank is doing now, by global rank; empty before and after the job. May be called by any thread."""
        with self._slots_lock:
            return {rank: slot.heartbeat() for rank, slot in enumerate(self._slots)}

    def _make_slots(self) -> None:
        with self._slots_lock:
            for rank in range(self._num_ranks):
                self._slots.append(RankSlot(RankSlot.create(rank, self._region_bytes), self._region_bytes))

    def _close_slots(self) -> None:
        with self._slots_lock:
            slots, self._slots = self._slots, []
        for slot in slots:
            slot.close()
            os.close(slot.fd)

    def _fork_keeper(self, outputs: list[_Output], verdict_fd: int) -> Process:
        interpreter_pid = os.getpid()

        def keep() -> int:
            die_with_parent(interpreter_pid)
            _leave_session(outputs)
            return self._keep(verdict_fd)

        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        return Process(fork(keep))

    # ------------------------------------------------------------------ in the keeper
    def _keep(self, verdict_fd: int) -> int:
        inherited = _open_fds()
        root_pid = os.getpid()
        settings = AgentSettings(argv=(), num_ranks=self._num_ranks, log_dir=self._log_dir, token=secrets.token_hex(8))
        supervision = Supervision(
            settings=settings,
            environment=RankEnvironment(
                base=os.environ,
                num_local_ranks=self._num_ranks,
                num_nodes=1,
                max_restarts=0,
                slot_fds=[slot.fd for slot in self._slots],
                region_bytes=self._region_bytes,
                log_dir=self._log_dir,
            ),
            slots=self._slots,
            make_pool=_ForkingPool,
            tell=_tell,
            show=_show,
            job=JobSettings(uses_flash=True, run_id=_RUN_ID),
            chronicle=Chronicle(),
            log_dir=self._log_dir,
            on_end=lambda exit_code, error: _write_verdict(verdict_fd, exit_code, error),
        )

        def live_as_rank(sock: socket.socket) -> int:
            return _live_as_rank(sock, root_pid, inherited, self._program)

        return Root(supervision.run, settings.detector, _tell, live_as_rank).run()


# --------------------------------------------------------------------------- output
def _open_outputs(stack: contextlib.ExitStack) -> list[_Output]:
    """Make a pipe for each stream that is not simply a descriptor: a notebook's are objects of the interpreter."""
    outputs: list[_Output] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            read_fd, write_fd = os.pipe()
            reader = stack.enter_context(os.fdopen(read_fd, "rb", 0))
            writer = stack.enter_context(os.fdopen(write_fd, "wb", 0))
            outputs.append(_Output(name, stream, reader, writer))
    return outputs


def _follow(keeper: Process, outputs: list[_Output]) -> None:
    """Show output until the keeper has ended and the pipes are empty."""
    by_fd = {output.reader.fileno(): output for output in outputs}
    decoders = {fd: codecs.getincrementaldecoder("utf-8")("replace") for fd in by_fd}
    poller = select.poll()
    for fd in (keeper.pidfd, *by_fd):
        poller.register(fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        if ready == {keeper.pidfd}:
            return
        for fd in ready & by_fd.keys():
            data = os.read(fd, _CHUNK_BYTES)
            if not data:
                poller.unregister(fd)
            stream = by_fd[fd].shown_on
            stream.write(decoders[fd].decode(data, final=not data))
            stream.flush()


def _tell(text: str) -> None:
    sys.stderr.write("".join(f"[flashrl] {line}\n" for line in text.splitlines()))
    sys.stderr.flush()


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# --------------------------------------------------------------------------- the end
def _write_verdict(verdict_fd: int, exit_code: int, error: FatalError | None) -> None:
    os.pwrite(verdict_fd, pickle.dumps((exit_code, error)), 0)


def _judge(verdict: bytes, keeper: Process) -> None:
    if not verdict:
        raise FatalError(
            f"the process that looks after the ranks ended early ({keeper.poll()}), and they with it; start again"
        )
    exit_code, error = pickle.loads(verdict)  # our own memory, never the network
    if error is not None:
        raise error
    if exit_code:
        raise FatalError(f"the ranks were stopped by {signal.Signals(exit_code - 128).name} before their work was done")


# --------------------------------------------------------------------------- the copy of the interpreter
def _leave_session(outputs: list[_Output]) -> None:
    """Turn a fresh copy of the interpreter into a process of its own, which shares nothing alive with the original."""
    os.setsid()  # Ctrl-C in a terminal is for the interpreter, which passes it on
    gc.disable()
    gc.freeze()
    atexit._clear()
    null_fd = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null_fd, 0)
    os.close(null_fd)
    for output in outputs:
        _redirect(output)
    _look_like_a_program()


def _redirect(output: _Output) -> None:
    """Let a standard stream, and loggers that write to it, use the pipe."""
    fd = {"stdout": 1, "stderr": 2}[output.name]
    os.dup2(output.writer.fileno(), fd)
    output.writer.close()
    output.reader.close()
    stream = open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    setattr(sys, output.name, stream)
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler) and handler.stream is output.shown_on:
            handler.stream = stream


def _look_like_a_program() -> None:
    """Forget what makes libraries draw with a notebook's widgets, which only the original can show."""
    sys.excepthook = sys.__excepthook__
    vars(builtins).pop("get_ipython", None)
    if "rich" in sys.modules:
        vars(sys.modules["rich"])["_console"] = None
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):  # of an earlier cell
        vars(sys).pop(name, None)


class _ForkingPool(StandbyPool):
    """Gives out copies of the root.

    Args:
        loop: calls this object back.
        link: to the root.
        tell: shows a line to the user.
    """

    def __init__(self, loop: EventLoop, link: RootLink, tell: Callable[[str], None]) -> None:
        super().__init__(loop, link, 1, (), (), "", tell)

    def start(self, environ: object, when_settled: Callable[[], None]) -> None:
        """Ready from the beginning."""
        when_settled()
        self._loop.call_later(_FIRST_FILL_DELAY_S, self._refill)

    def take(self) -> Candidate:
        """Return a process that will become a rank.

        Raises:
            OSError: the machine has no room for one more.
        """
        candidate = super().take()
        if candidate is None:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return candidate

    def _fork(self) -> Candidate | None:
        try:
            process, sock = self._link.copy()
        except OSError:
            return None
        return Candidate(PacketChannel(sock), process)


# --------------------------------------------------------------------------- copies
def _live_as_rank(sock: socket.socket, root_pid: int, inherited: set[int], program: Callable[[], None]) -> int:
    os.setsid()
    die_with_parent(root_pid)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    fd = sock.detach()
    for opened in _open_fds() - inherited - {fd}:
        with contextlib.suppress(OSError):
            os.close(opened)
    channel = RankChannel(fd)
    order = await_order(channel)
    if order is None:
        return 0
    gc.enable()
    take_seat(channel, order)
    return _run_to_the_end(program)


def _open_fds() -> set[int]:
    """Return what is open, without the descriptor that it takes to look."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def _run_to_the_end(program: Callable[[], None]) -> int:
    """Run the program as an interpreter does that ends after it: also with what was registered for the end."""

    def run() -> None:
        error: BaseException | None = None
        try:
            run_reported(program)
        except BaseException as raised:  # noqa: BLE001 - it has been reported
            error = raised
        exit_code = error.code if isinstance(error, SystemExit) else int(error is not None)
        if exit_code:
            sys.last_value = error
        atexit._run_exitfuncs()
        raise SystemExit(exit_code)

    process = multiprocessing.Process(target=run)
    exit_code: int = process._bootstrap()  # type: ignore[attr-defined]
    return exit_code
