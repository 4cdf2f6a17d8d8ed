"""What passes between the root process and the supervisor below it, and the supervisor's end of it.

::

    supervisor ── RootRequest, descriptor ──▶ root
    supervisor ◀─ ToSupervisor, descriptor ── root

The root is the parent of all processes of a node, so that they outlive the supervisor, and holds what a successor of
the supervisor needs to take them over. It is forked with all of that in its memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.packets import PACKET_BYTES, Assembler, split
from lightning_flashrl.supervisor.process import ExitStatus, Process
from lightning_flashrl.supervisor.protocol import Message


class Spawn(Message, frozen=True):
    """Start a program with one end of a new pair of sockets; hold the other. Answered.

    Attributes:
        name: of the holding.
        number: of the holding.
        argv: the command, as the system has it: bytes that need not be UTF-8.
        environ: its environment, likewise.
        variable: gets the number of the descriptor.
    """

    name: str
    number: int
    argv: list[bytes]
    environ: dict[bytes, bytes]
    variable: str


class Copy(Message, frozen=True):
    """Fork, as :class:`Spawn` starts a program; the copy waits to become a rank. Not held yet. Answered."""


class Hold(Message, frozen=True):
    """Keep this for a successor. A descriptor may come along.

    Attributes:
        name: another holding of that name is dropped, unless it has the same number: then what is given is added.
        number: which one it is.
        pid: a process; 0 for none yet.
        note: what the successor is to read.
    """

    name: str
    number: int
    pid: int = 0
    note: bytes = b""


class Bury(Message, frozen=True):
    """The end of this process was seen: its number may be given to another one."""

    pid: int


class Alive(Message, frozen=True):
    """The supervisor is well.

    Attributes:
        known: processes that it looks after itself; others that have ended can be collected. ``None`` when there may
            be some whose number it does not know yet.
    """

    known: tuple[int, ...] | None


class Writing(Message, frozen=True):
    """The supervisor writes to the user, who may let it wait for long: a pager, a terminal that was stopped.

    Attributes:
        is_begin: it begins; otherwise it is through.
    """

    is_begin: bool


class Done(Message, frozen=True):
    """The job is over.

    Attributes:
        exit_code: status for the root.
    """

    exit_code: int


class Born(Message, frozen=True):
    """The process that was asked for; the descriptor of the supervisor's end of its socket comes along."""

    pid: int


class Unborn(Message, frozen=True):
    """There is no such process, because of this error.

    Attributes:
        number: the system's number of the error.
        text: what the system says.
    """

    number: int
    text: str


class Signalled(Message, frozen=True):
    """Somebody sent a signal to the root."""

    number: int


RootRequest: TypeAlias = Spawn | Copy | Hold | Bury | Alive | Writing | Done
ToSupervisor: TypeAlias = Born | Unborn | Signalled

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[RootRequest] = msgspec.msgpack.Decoder(RootRequest)
_to_supervisor_decoder: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)


@dataclass(slots=True)
class Holding:
    """What the root keeps under a name.

    Attributes:
        number: which one of that name it is.
        pid: a process, or 0.
        fd: the supervisor's end of that process's socket, or -1.
        note: what the supervisor wrote for its successor.
        status: how the process ended, once it is buried.
    """

    number: int
    pid: int = 0
    fd: int = -1
    note: bytes = b""
    status: ExitStatus | None = None


@dataclass(frozen=True, slots=True)
class Takeover:
    """Why there is a new supervisor.

    Attributes:
        reason: how the one before ended, a sentence.
        noticed_ns: when the root saw it.
    """

    reason: str
    noticed_ns: int


class Messages:
    """One end of the pair between root and supervisor: messages, each with at most one descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._assembler = Assembler()

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send a message; a descriptor stays open here."""
        *first, last = split(_encoder.encode(message))
        for packet in first:
            self._socket.send(packet)
        socket.send_fds(self._socket, [last], [] if fd is None else [fd])

    def receive(self) -> tuple[bytes, int] | None:
        """Return a message and its descriptor, or -1; ``None`` when the other end is gone.

        Raises:
            BlockingIOError: there is none yet, and this end does not block.
        """
        while True:
            try:
                packet, fds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES, 1)
            except ConnectionResetError:  # said once, before what is still here: the other end left something unread
                continue
            if not packet:
                return None
            for fd in fds:  # received descriptors are inheritable, unlike others
                os.set_inheritable(fd, False)
            message = self._assembler.feed(packet)
            if message is not None:
                return message, fds[0] if fds else -1

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


class HeldProcess(Process):
    """A child of the root: this process sees its end, and the root then collects it.

    Args:
        pid: its number.
        link: to the root.

    Raises:
        ProcessLookupError: there is no such process.
    """

    def __init__(self, pid: int, link: RootLink) -> None:
        super().__init__(pid)
        self._link = link

    def poll(self) -> ExitStatus | None:
        """Return how the process ended, or ``None`` while it runs; its descriptor is closed afterwards."""
        if self._status is None and _is_over(self.pidfd):
            self._status = self.ending()
            assert self._status is not None  # its last thread has ended, and nobody but the root can collect it
            os.close(self.pidfd)
            self._link.bury(self.pid)
        return self._status


def _is_over(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


class RootLink:
    """The supervisor's way to the root.

    Attributes:
        root_pid: the root's number.
        holdings: what the root held when this supervisor began.
        takeover: how the supervisor before this one ended, if there was one.
        asked_signal: the first signal that the job got so far, or 0.

    Args:
        sock: this end; it blocks.
    """

    def __init__(
        self,
        sock: socket.socket,
        root_pid: int,
        holdings: Mapping[str, Holding],
        takeover: Takeover | None,
        asked_signal: int,
    ) -> None:
        self.root_pid = root_pid
        self.holdings = dict(holdings)
        self.takeover = takeover
        self.asked_signal = asked_signal
        self._messages = Messages(sock)
        self._signals: list[int] = []
        self._on_signal: Callable[[int], None] = self._signals.append

    def listen(self, loop: EventLoop, on_signal: Callable[[int], None]) -> None:
        """From now on call back for each signal that the root gets."""

        def later(number: int) -> None:  # not in the middle of what waits for an answer
            loop.call_later(0.0, lambda: on_signal(number))

        def on_readable() -> None:
            self._receive()

        self._on_signal = later
        for number in self._signals:
            later(number)
        loop.add_reader(self._messages.fileno(), on_readable)

    def spawn(
        self, name: str, number: int, argv: list[str], environ: dict[str, str], variable: str
    ) -> tuple[HeldProcess, socket.socket]:
        """Let the root start a program, and return it with our end of its socket.

        Raises:
            OSError: it cannot be started.
        """
        self._messages.send(Spawn(name, number, list(map(os.fsencode, argv)), encode_environ(environ), variable))
        return self._born()

    def copy(self) -> tuple[HeldProcess, socket.socket]:
        """Let the root fork, and return the copy with our end of its socket.

        Raises:
            OSError: the machine has no room for one more.
        """
        self._messages.send(Copy())
        return self._born()

    def _born(self) -> tuple[HeldProcess, socket.socket]:
        while (received := self._receive()) is None:
            pass
        answer, fd = received
        if isinstance(answer, Unborn):
            raise OSError(answer.number, answer.text)
        return HeldProcess(answer.pid, self), socket.socket(fileno=fd)

    def _receive(self) -> tuple[Born | Unborn, int] | None:
        """Wait for a message; return it unless it tells of a signal."""
        received = self._messages.receive()
        if received is None:
            raise BrokenPipeError("the root process is gone")
        payload, fd = received
        message = _to_supervisor_decoder.decode(payload)
        if not isinstance(message, Signalled):
            return message, fd
        self._on_signal(message.number)
        return None

    def hold(self, name: str, number: int, *, pid: int = 0, note: bytes = b"", fd: int | None = None) -> None:
        """Let the root keep something for a successor, see :class:`Hold`."""
        self._messages.send(Hold(name, number, pid, note), fd)

    def process(self, pid: int) -> HeldProcess:
        """Watch a process that the root holds or adopted.

        Raises:
            ProcessLookupError: there is none of that number.
        """
        return HeldProcess(pid, self)

    def bury(self, pid: int) -> None:
        """Let the root collect a process that has ended."""
        self._messages.send(Bury(pid))

    def say_alive(self, known: set[int] | None) -> None:
        """See :class:`Alive`."""
        self._messages.send(Alive(None if known is None else tuple(known)))

    def patiently(self, write: Callable[[str], None]) -> Callable[[str], None]:
        """Return what does the same as ``write``, and is no hang however long the user does not read."""

        def write_patiently(text: str) -> None:
            self._messages.send(Writing(is_begin=True))
            try:
                write(text)
            finally:
                self._messages.send(Writing(is_begin=False))

        return write_patiently

    def end(self, exit_code: int) -> None:
        """The job is over."""
        with contextlib.suppress(BrokenPipeError):
            self._messages.send(Done(exit_code))


def encode_environ(environ: Mapping[str, str]) -> dict[bytes, bytes]:
    """Return an environment as the system has it."""
    return {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}


def decode_request(payload: bytes) -> RootRequest:
    """Read what a supervisor sent."""
    return _request_decoder.decode(payload)
