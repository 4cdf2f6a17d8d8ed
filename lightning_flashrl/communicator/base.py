"""What a native backend must offer so that its groups can be broken and made again inside a living process."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Backend, Store


class KeyValueStore(Store):
    """The rendezvous store of native groups, over two functions that reach the controller.

    Nothing of ours listens on an unauthenticated port: keys travel over the authenticated control channel.

    Args:
        prefix: put in front of every key; contains the quorum and the group.
        put: stores a value.
        fetch: returns a value, waiting up to the given number of seconds.
        timeout_s: how long :meth:`get` and :meth:`wait` wait.
    """

    def __init__(
        self, prefix: str, put: Callable[[str, bytes], None], fetch: Callable[[str, float], bytes], timeout_s: float
    ) -> None:
        super().__init__()
        self._prefix = prefix
        self._put = put
        self._fetch = fetch
        self._timeout_s = timeout_s

    def set(self, key: str, value: str | bytes) -> None:
        """Store ``value`` under ``key``."""
        self._put(self._prefix + key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, waiting for it."""
        return self._fetch(self._prefix + key, self._timeout_s)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when every key has a value."""
        for key in keys:
            self._fetch(self._prefix + key, self._timeout_s if timeout is None else timeout.total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long :meth:`get` waits."""
        self._timeout_s = timeout.total_seconds()


class Transport(ABC):
    """Makes native groups and breaks them.

    A broken group is never used again; its pending operations end with an error in every thread that waits for them.
    """

    backend: str
    """Name that ``torch.distributed.get_backend`` reports, e.g. ``"gloo"``."""
    device_type: str
    """``"cpu"``, ``"cuda"`` or ``"npu"``."""

    @abstractmethod
    def connect(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Backend:
        """Form a native group of ``size`` members; blocks until all have arrived.

        Raises:
            RuntimeError: a member did not arrive in time or was lost meanwhile.
        """

    @abstractmethod
    def abort(self) -> None:
        """End every pending operation of every group made so far with an error. Called from another thread."""

    def settle(self) -> None:  # noqa: B027 - most transports have nothing to do here
        """Clean up after :meth:`abort`: called when the program waits or connects, before groups are made anew.

        Raises:
            RuntimeError: the device cannot be used again; this rank must be replaced.
        """

    def close(self) -> None:  # noqa: B027 - most transports keep none
        """Let go of the groups made so far: nothing is pending on them, and they are not used again."""

    def is_peer_failure(self, error: BaseException) -> bool:
        """Whether ``error`` of a collective may come from a lost peer (and not from wrong arguments)."""
        text = str(error)
        return any(sign in text for sign in self.peer_failure_signs)

    peer_failure_signs: tuple[str, ...] = (
        "closed by peer",
        "remote worker",
        "gloo",
        "Connection",
        "reset by peer",
        "Broken pipe",
        "Timed out",
        "timed out",
        "Read error",
        "Write error",
        "writev",
        "Socket",
        "socket",
        "abort",
    )

    def synchronize(self, tensors: list[torch.Tensor]) -> None:  # noqa: B027 - only devices need it
        """Block until the tensors' values are final on the device."""


def run_abandonable(function: Callable[[], Backend], abandoned: threading.Event, name: str) -> Backend:
    """Run a blocking connect that cannot be interrupted; stop waiting for it when ``abandoned`` is set.

    Raises:
        RuntimeError: it failed, or nobody waits for it any longer.
    """
    outcome: list[Backend | BaseException] = []
    finished = threading.Condition()

    def run() -> None:
        try:
            result: Backend | BaseException = function()
        except Exception as error:  # noqa: BLE001 - the thread that waits raises it
            result = error
        with finished:
            outcome.append(result)
            finished.notify_all()

    threading.Thread(target=run, name=f"flashrl-connect-{name}", daemon=True).start()
    with finished:
        while not outcome:
            finished.wait(0.01)
            if abandoned.is_set() and not outcome:
                raise RuntimeError(f"connecting group {name} was abandoned: the quorum changed meanwhile")
    if isinstance(outcome[0], BaseException):
        raise RuntimeError(f"connecting group {name} failed: {outcome[0]}") from outcome[0]
    return outcome[0]
