"""What other processes ask of a run's host, and how it answers: calls beside the verbs of its queue."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.host import HostAddress, HostView, StreamHost
from lightning_flashrl.engines.process import Surroundings
from lightning_flashrl.errors import QueueUnavailableError
from lightning_flashrl.streaming import TransferQueueClient

_POLL_S = 0.01
_AnswerT = TypeVar("_AnswerT")


class _Call(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of what rank 0 asks; the class name is the tag, and each does what the method of that name does."""


class AskSurroundings(_Call, frozen=True):
    """What must a client know?"""


class Resume(_Call, frozen=True):
    """See :meth:`StreamHost.resume`."""


class AskRoom(_Call, frozen=True):
    """How many groups may begin now?"""


class Begin(_Call, frozen=True):
    """See :meth:`StreamHost.begin`."""

    first_group: int
    count: int


class EndPrompts(_Call, frozen=True):
    """See :meth:`StreamHost.end_prompts`."""


class StepDone(_Call, frozen=True):
    """See :meth:`StreamHost.step_done`."""

    version: int


class Finish(_Call, frozen=True):
    """See :meth:`StreamHost.finish`."""

    version: int


class Scale(_Call, frozen=True):
    """See :meth:`StreamHost.scale`."""

    role: str
    num_workers: int


class View(_Call, frozen=True):
    """See :meth:`StreamHost.view`."""


class TakeSnapshot(_Call, frozen=True):
    """See :meth:`StreamHost.snapshot`."""


class AskFailure(_Call, frozen=True):
    """Has a worker's failure ended the run? Its name and reason, if so."""


class End(_Call, frozen=True):
    """The run is over: end the workers."""


class AskLast(_Call, frozen=True):
    """How did the run stand when the last worker had ended? A list of one view; empty before that."""


class Leave(_Call, frozen=True):
    """Nobody will ask any more."""


_decode = msgspec.msgpack.Decoder(
    AskSurroundings
    | Resume
    | AskRoom
    | Begin
    | EndPrompts
    | StepDone
    | Finish
    | Scale
    | View
    | TakeSnapshot
    | AskFailure
    | End
    | AskLast
    | Leave
).decode
_encode = msgspec.msgpack.Encoder().encode


class RemoteHost:
    """A host in another process, as :class:`~lightning_flashrl.asyncrl.host.StreamHost` is one in this.

    Args:
        address: of the host.
        on_lost: starts the next host when this one is gone; ``None`` waits for who does.
        connect_timeout_s: how long to look for it at first: it may have died, and the next one may be about to come.

    Attributes:
        address: of the host.
        queue: a client of its queue.
        surroundings: what clients must know.

    Raises:
        QueueUnavailableError: there is none.
    """

    def __init__(
        self, address: HostAddress, on_lost: Callable[[], None] | None = None, *, connect_timeout_s: float = 0.0
    ) -> None:
        self.address = address
        self.queue = TransferQueueClient(
            address.endpoint, address.secret, on_lost=on_lost, connect_timeout_s=connect_timeout_s
        )
        self.ask_surroundings()
        self._last: HostView | None = None

    def ask_surroundings(self) -> Surroundings:
        """Ask again: the next host has other weights."""
        self.surroundings = self._ask(AskSurroundings(), Surroundings)
        return self.surroundings

    def _ask(self, call: _Call, expected: type[_AnswerT]) -> _AnswerT:
        return msgspec.msgpack.decode(self.queue.call(_encode(call)), type=expected)

    def resume(self) -> int:
        """See :meth:`StreamHost.resume`."""
        return self._ask(Resume(), int)

    def wait_for_room(self, timeout_s: float) -> int:
        """See :meth:`StreamHost.wait_for_room`."""
        deadline_s = clock.now_s() + timeout_s
        while not (room := self._ask(AskRoom(), int)) and clock.now_s() < deadline_s:
            clock.sleep(_POLL_S)
        return room

    def begin(self, first_group: int, count: int) -> int:
        """See :meth:`StreamHost.begin`."""
        return self._ask(Begin(first_group, count), int)

    def end_prompts(self) -> None:
        """See :meth:`StreamHost.end_prompts`."""
        self._ask(EndPrompts(), type(None))

    def step_done(self, version: int) -> None:
        """See :meth:`StreamHost.step_done`."""
        self._ask(StepDone(version), type(None))

    def finish(self, version: int) -> None:
        """See :meth:`StreamHost.finish`."""
        self._ask(Finish(version), type(None))

    def scale(self, role: str, num_workers: int) -> None:
        """See :meth:`StreamHost.scale`."""
        self._ask(Scale(role, num_workers), type(None))

    def view(self) -> HostView:
        """See :meth:`StreamHost.view`."""
        return self._last or self._ask(View(), HostView)

    def snapshot(self) -> bytes:
        """See :meth:`StreamHost.snapshot`."""
        return self._ask(TakeSnapshot(), bytes)

    def end_workers(self) -> None:
        """Wait until the host has ended its workers; it stays, for others that ask."""
        last: list[HostView] = []
        while not last:
            self._ask(End(), type(None))  # again and again: perhaps to its successor
            last = self._ask(AskLast(), list[HostView])
            clock.sleep(_POLL_S)
        [self._last] = last

    def close(self) -> None:
        """End the host, whose workers have ended."""
        self.queue.reconnect_timeout_s = 0.0
        with contextlib.suppress(QueueUnavailableError):
            self._ask(Leave(), type(None))
        self.queue.disconnect()


def find_failure(queue: TransferQueueClient) -> tuple[str, str] | None:
    """Return name and reason of a worker's failure that ends the run of a host; ``None`` if all is well."""
    return msgspec.msgpack.decode(queue.call(_encode(AskFailure())), type=tuple[str, str] | None)


class HostService:
    """Answers what other processes ask of a host.

    Args:
        host: the host; the server of its queue passes calls on.

    Attributes:
        is_ending: somebody wants the run's workers to end.
        may_leave: nobody will ask any more.
        last: how the run stood when the last worker had ended; empty before that.
    """

    def __init__(self, host: StreamHost) -> None:
        self.is_ending = threading.Event()
        self.may_leave = threading.Event()
        self.last: list[HostView] = []
        self._host = host
        host.server.answer_call = self.answer
        host.server.start()  # not before: a call would find nobody

    def answer(self, payload: bytes) -> bytes:
        """Answer a call."""
        return _encode(self._answer(_decode(payload)))

    def _answer(self, call: Any) -> Any:
        host = self._host
        match call:
            case AskSurroundings():
                return host.surroundings
            case Resume():
                return host.resume()
            case AskRoom():
                return host.wait_for_room(0.0)
            case Begin(first_group=first_group, count=count):
                return host.begin(first_group, count)
            case EndPrompts():
                host.end_prompts()
            case StepDone(version=version):
                host.step_done(version)
            case Finish(version=version):
                host.finish(version)
            case Scale(role=role, num_workers=num_workers):
                host.scale(role, num_workers)
            case View():
                return host.view()
            case TakeSnapshot():
                return host.snapshot()
            case AskFailure():
                return host.failure
            case End():
                self.is_ending.set()
            case AskLast():
                return self.last
            case Leave():
                self.may_leave.set()
        return None
