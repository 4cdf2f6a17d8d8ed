"""The host of a run in a process of its own, which outlives any rank, and how ranks reach it.

Rank 0 starts it; the agent of this node adopts it. It ends when it is told to, or with the agent.

======================  =====================================  ==========================
who                     waits for                              unblocked by
======================  =====================================  ==========================
the host's main thread  the order to end                       rank 0, the agent's end
======================  =====================================  ==========================
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
from typing import Any, TypeVar

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.host import HostSettings, HostView, StreamHost
from lightning_flashrl.engines.process import Surroundings
from lightning_flashrl.errors import ConfigurationError, FlashRLError, QueueUnavailableError
from lightning_flashrl.streaming import TransferQueueClient
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.process import die_with_parent
from lightning_flashrl.supervisor.service import free_port

_FIND_TIMEOUT_S = 1.0
_POLL_S = 0.01
_READY = b"ready"
_AnswerT = TypeVar("_AnswerT")


class HostAddress(msgspec.Struct, frozen=True):
    """Where a host is, or will be.

    Attributes:
        port: of its queue, on this machine.
        secret: of its queue.
    """

    port: int
    secret: str

    @property
    def endpoint(self) -> str:
        """Of its queue."""
        return f"tcp://127.0.0.1:{self.port}"


# --------------------------------------------------------------------------- what ranks ask
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

    count: int


class EndPrompts(_Call, frozen=True):
    """See :meth:`StreamHost.end_prompts`."""


class StepDone(_Call, frozen=True):
    """See :meth:`StreamHost.step_done`."""

    version: int


class Finish(_Call, frozen=True):
    """See :meth:`StreamHost.finish`."""

    version: int


class View(_Call, frozen=True):
    """See :meth:`StreamHost.view`."""


class End(_Call, frozen=True):
    """The run is over: end the workers."""


class AskLast(_Call, frozen=True):
    """How did the run stand when the last worker had ended? A list of one view; empty before that."""


class Leave(_Call, frozen=True):
    """Nobody will ask any more."""


_decode = msgspec.msgpack.Decoder(
    AskSurroundings | Resume | AskRoom | Begin | EndPrompts | StepDone | Finish | View | End | AskLast | Leave
).decode
_encode = msgspec.msgpack.Encoder().encode


class RemoteHost:
    """A host in another process, as :class:`~lightning_flashrl.asyncrl.host.StreamHost` is one in this.

    Args:
        address: of the host.

    Attributes:
        queue: a client of its queue.
        surroundings: what clients must know.

    Raises:
        QueueUnavailableError: there is none.
    """

    def __init__(self, address: HostAddress, answer_timeout_s: float = 10.0) -> None:
        self.queue = TransferQueueClient(address.endpoint, address.secret, answer_timeout_s=answer_timeout_s)
        self.surroundings = self._ask(AskSurroundings(), Surroundings)
        self._last: HostView | None = None

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

    def begin(self, count: int) -> tuple[int, int]:
        """See :meth:`StreamHost.begin`."""
        return self._ask(Begin(count), tuple[int, int])

    def end_prompts(self) -> None:
        """See :meth:`StreamHost.end_prompts`."""
        self._ask(EndPrompts(), type(None))

    def step_done(self, version: int) -> None:
        """See :meth:`StreamHost.step_done`."""
        self._ask(StepDone(version), type(None))

    def finish(self, version: int) -> None:
        """See :meth:`StreamHost.finish`."""
        self._ask(Finish(version), type(None))

    def view(self) -> HostView:
        """See :meth:`StreamHost.view`."""
        return self._last or self._ask(View(), HostView)

    def close(self) -> None:
        """End the host, and wait until it has ended its workers."""
        if self._last is None:
            self._ask(End(), type(None))
            while not (last := self._ask(AskLast(), list[HostView])):
                clock.sleep(_POLL_S)
            [self._last] = last
            self._ask(Leave(), type(None))
            self.queue.disconnect()


class HostHome:
    """Where the host of a fit is written down, so that rank 0's successor finds it.

    Args:
        client: of the rank.
        fit: number of the fit.
    """

    def __init__(self, client: RankClient, fit: int) -> None:
        self._client = client
        self._key = f"asyncrl/{fit}"

    def find(self) -> RemoteHost | None:
        """Return the host that this rank's predecessor has left, if there is one.

        When the whole job starts again, from a checkpoint, the host of its last life is ended.
        """
        client = self._client
        if not client.incarnation:
            return None
        try:
            found = client.store_get(self._key, _FIND_TIMEOUT_S)
            host = RemoteHost(msgspec.json.decode(found, type=HostAddress))
        except (TimeoutError, QueueUnavailableError):
            return None
        if client.is_newcomer:
            return host
        host.close()
        return None

    def start(self, settings: HostSettings) -> RemoteHost:
        """Start a host.

        Raises:
            ConfigurationError: it does not come up.
        """
        address = HostAddress(free_port(), secrets.token_hex(16))
        self._client.store_set(self._key, msgspec.json.encode(address))
        failure = _start(address, settings)
        if failure:
            raise ConfigurationError(f"the process of the queue did not come up: {failure}")
        return RemoteHost(address)


def _start(address: HostAddress, settings: HostSettings) -> str:
    """Start the process as a child of the agent; return once it serves, or why it does not."""
    payload_fd = os.memfd_create("flashrl-host")
    os.write(payload_fd, pickle.dumps((address, settings, sys.path)))
    read_fd, write_fd = os.pipe()
    agent_pid = os.getppid()  # a rank's parent
    command = [sys.executable, "-m", __name__, str(agent_pid), str(payload_fd), str(write_fd)]
    try:
        # The shell leaves at once: the agent, a subreaper, becomes the parent. Ctrl-C is for who started the job.
        shell = ["/bin/sh", "-c", '"$@" &', "sh", *command]
        subprocess.run(shell, pass_fds=[payload_fd, write_fd], start_new_session=True, check=True)
    finally:
        os.close(payload_fd)
        os.close(write_fd)
    with os.fdopen(read_fd, "rb") as told:
        word = told.read()
    if word == _READY:
        return ""
    return word.decode() or "it died; its output says why"


# --------------------------------------------------------------------------- the host's process
class _Service:
    """Answers what ranks ask of a host."""

    def __init__(self, host: StreamHost) -> None:
        self.is_ending = threading.Event()
        self.may_leave = threading.Event()
        self.last: list[HostView] = []
        self._host = host

    def answer(self, payload: bytes) -> bytes:
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
            case Begin(count=count):
                return host.begin(count)
            case EndPrompts():
                host.end_prompts()
            case StepDone(version=version):
                host.step_done(version)
            case Finish(version=version):
                host.finish(version)
            case View():
                return host.view()
            case End():
                self.is_ending.set()
            case AskLast():
                return self.last
            case Leave():
                self.may_leave.set()
        return None


def main() -> None:
    """Be a host until the run or the agent ends."""
    agent_pid, payload_fd, told_fd = map(int, sys.argv[1:])
    die_with_parent(agent_pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent stops ranks; then this process, in its own way
    with os.fdopen(payload_fd, "rb") as file:
        file.seek(0)
        address, settings, sys.path[:] = pickle.load(file)
    try:
        host = StreamHost(settings, port=address.port, secret=address.secret, keeps_weights=True)
    except FlashRLError as error:
        os.write(told_fd, str(error).encode())
        sys.exit(1)
    service = _Service(host)
    host.server.answer_call = service.answer
    os.write(told_fd, _READY)
    os.close(told_fd)
    service.is_ending.wait()
    host.end_workers()
    service.last = [host.view()]
    service.may_leave.wait()
    host.close()


if __name__ == "__main__":
    main()
