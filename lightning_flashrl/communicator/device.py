"""Collectives that run on a device, made waitable for the host.

A native device collective returns before it has run, and waiting for it only puts its stream before the program's: the
host goes on, and the stream of a survivor would stand behind a collective that never ends. Here the host looks at the
collective until it has run and puts the streams in order only then. So a survivor never runs ahead of a collective that
may have to be done again, its own kernels never stand behind a hung one, and giving up a wait needs no device.

This file owns two loops:

| thread                | waits for                                      | unblocked by                |
|-----------------------|------------------------------------------------|-----------------------------|
| who calls ``wait``    | its collective                                 | the device, or ``abort``    |
| ``flashrl-device``    | collectives whose future was asked for         | the device, or ``abort``    |
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
from torch._C._distributed_c10d import Backend, BarrierOptions, Store, Work

from lightning_flashrl import clock
from lightning_flashrl.communicator.base import Transport
from lightning_flashrl.communicator.collectives import COLLECTIVES, TRANSFERS, flatten
from lightning_flashrl.errors import ConfigurationError

_ABORTED = "the collective was aborted: a member of its group was lost"
_FAILED = "the collective was aborted by the native library"
MUST_BE_REPLACED = "this rank must be replaced"
"""Ends the text of an error after which waiting for a new quorum is of no use."""
_NO_TIMEOUT = timedelta(0)
_SHORTEST_PAUSE_S = 2e-5
_LONGEST_PAUSE_S = 1e-3
_LINGER_S = 0.5
_OFF = frozenset({"0", "false", "f", "no", "n", "off"})


def require_off(
    environ: MutableMapping[str, str], reasons: Mapping[str, str], *, default_on: Iterable[str] = ()
) -> None:
    """Make sure that switches which must be off are off before a native group reads them.

    Args:
        environ: usually ``os.environ``.
        reasons: name of a switch → what it would do.
        default_on: those that are on unless they are set, so they are set here.

    Raises:
        ConfigurationError: somebody turned a switch on.
    """
    for name, reason in reasons.items():
        value = environ.get(name)
        if value is not None and value.lower() not in _OFF:
            raise ConfigurationError(f"{name}={value}: {reason}; unset it or set it to 0")
    for name in default_on:
        environ.setdefault(name, "0")


class GroupStore(Store):
    """What a native group keeps of its rendezvous store: another quorum's store can take its place.

    Args:
        target: where values are stored and looked up now.
    """

    def __init__(self, target: Store) -> None:
        super().__init__()
        self.target = target

    def set(self, key: str, value: str | bytes) -> None:
        """Store ``value`` under ``key``."""
        self.target.set(key, cast(str, value))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, waiting for it."""
        return self.target.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when every key has a value."""
        if timeout is None:
            self.target.wait(keys)
        else:
            self.target.wait(keys, timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long :meth:`get` waits."""
        self.target.set_timeout(timeout)

    def check(self, keys: list[str]) -> bool:
        """Native monitors look here for wishes of peers to dump their state; no such wish is ever passed on."""
        return False

    def delete_key(self, key: str) -> bool:
        """Nothing needs to be deleted: each quorum has keys of its own."""
        return False


@dataclass(slots=True, eq=False)
class Epoch:
    """The native groups made between two aborts.

    Attributes:
        broken: set when the groups were given up.
        natives: the groups.
    """

    broken: threading.Event = field(default_factory=threading.Event)
    natives: list[Any] = field(default_factory=list)


class DeviceWork(Work):
    """A collective on a device.

    Args:
        native: the native handle.
        group: the group it was called on.
        results: the tensors it writes.
    """

    def __init__(self, native: Work, group: DeviceGroup, results: list[torch.Tensor]) -> None:
        super().__init__()
        self._native = native
        self._group = group
        self._results = results
        self._is_done = False
        self._future: torch.futures.Future[Any] | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Block the host until the device has run the collective.

        Raises:
            RuntimeError: it failed, took longer than ``timeout``, or its group was aborted before its end was seen.
        """
        if self._is_done:
            return True
        deadline_s = clock.now_s() + timeout.total_seconds() if timeout > _NO_TIMEOUT else None
        pause_s = _SHORTEST_PAUSE_S
        while not self.is_completed():
            if deadline_s is not None and clock.now_s() > deadline_s:
                raise RuntimeError(f"the collective timed out after {timeout.total_seconds():g} s")
            self._group.epoch.broken.wait(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
        self._conclude()
        return True

    def _conclude(self) -> None:
        if self._group.epoch.broken.is_set():
            raise RuntimeError(_ABORTED)
        self._native.wait()
        if self._group.transport.has_failed(self._native):
            raise RuntimeError(_FAILED)
        self._is_done = True

    def is_completed(self) -> bool:
        """Whether :meth:`wait` returns, or raises, at once."""
        if self._is_done or self._group.epoch.broken.is_set():
            return True
        try:
            return self._native.is_completed()
        except RuntimeError:  # `wait` meets it again and raises it
            return True

    def is_success(self) -> bool:
        """Whether the collective has run and its results are good."""
        if not self.is_completed():
            return False
        try:
            return self.wait()
        except RuntimeError:
            return False

    def get_future(self) -> torch.futures.Future[Any]:
        """A future that is resolved when the device has run the collective, not when it was issued."""
        with self._lock:
            if self._future is not None:
                return self._future
            device = self._group.transport.device
            self._future = torch.futures.Future(devices=None if device.type == "cpu" else [device])
        self._group.transport.watch.add(self)
        return self._future

    def resolve(self) -> None:
        """Tell the future how the collective ended."""
        assert self._future is not None
        try:
            self.wait()
        except RuntimeError as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(self._results)

    def result(self) -> list[torch.Tensor]:
        """The tensors the collective writes."""
        return self._results

    def synchronize(self) -> None:
        """Same as :meth:`wait`."""
        self.wait()


class CompletionWatch:
    """Resolves futures of collectives; its thread ends when there has been nothing to do for a while.

    Args:
        enter_device: makes the device current in the thread.
    """

    def __init__(self, enter_device: Callable[[], None]) -> None:
        self._enter_device = enter_device
        self._pending: list[DeviceWork] = []
        self._added = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, work: DeviceWork) -> None:
        """Call ``work.resolve`` when the collective is over."""
        with self._added:
            self._pending.append(work)
            self._added.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flashrl-device", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        self._enter_device()
        while self._has_pending():
            over = [work for work in list(self._pending) if work.is_completed()]
            for work in over:
                work.resolve()
            with self._added:
                self._pending = [work for work in self._pending if work not in over]
            if not over:
                clock.sleep(_LONGEST_PAUSE_S / 10)

    def _has_pending(self) -> bool:
        with self._added:
            if not self._pending:
                self._added.wait(_LINGER_S)
            if not self._pending:
                self._thread = None
            return bool(self._pending)


class DeviceGroup:
    """A native group whose collectives return :class:`DeviceWork`; everything else is the native group's.

    Args:
        native: the native group.
        transport: who made it.
        epoch: ends with the next abort.
    """

    def __init__(self, native: Any, transport: DeviceTransport, epoch: Epoch) -> None:
        self.native = native
        self.transport = transport
        self.epoch = epoch

    def barrier(self, opts: BarrierOptions | None = None) -> DeviceWork:
        """A barrier on this transport's device; left alone the native group guesses one from the rank."""
        options = BarrierOptions() if opts is None else opts
        if not options.device_ids and self.transport.device.index is not None:
            options.device_ids = [self.transport.device.index]
        return self._follow(self.native.barrier, [], options)

    def _follow(self, method: Callable[..., Work], results: list[torch.Tensor], *args: Any) -> DeviceWork:
        if self.epoch.broken.is_set():
            raise RuntimeError(_ABORTED)
        return DeviceWork(method(*args), self, results)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.native, name)
        if name not in COLLECTIVES | TRANSFERS:
            return method
        return lambda results, *args: self._follow(method, flatten(results), results, *args)


class DeviceTransport(Transport):
    """Makes native groups of one device.

    Waits are given up by the host alone, at once; what the device and the native library hold is cleaned up by
    :meth:`settle`, which the next :meth:`connect` calls.

    Args:
        device: with its index.
    """

    program_error_signs: tuple[str, ...] = ()
    """Parts of error texts that mean wrong arguments, whatever else the text says."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.watch = CompletionWatch(self.enter_device)
        self._epoch = Epoch()
        self._epoch_lock = threading.Lock()

    @abstractmethod
    def enter_device(self) -> None:
        """Make the device current in the calling thread."""

    @abstractmethod
    def _open(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Any:
        """Return a native group whose communicator need not exist yet."""

    @abstractmethod
    def _meet(self, group: DeviceGroup) -> None:
        """Return when the communicator of a group exists on every member."""

    @abstractmethod
    def _give_up(self, natives: list[Any]) -> None:
        """Begin to free what broken groups hold; must not block."""

    def has_failed(self, work: Work) -> bool:
        """Whether a native handle that counts as completed did not succeed, though its ``wait`` did not raise."""
        return False

    def connect(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Backend:
        """Form a native group; see :meth:`Transport.connect`."""
        with self._epoch_lock:
            epoch = self._epoch
        self.settle()
        self.enter_device()
        _await_members(store, rank, size)
        group = DeviceGroup(self._open(store, rank, size, timeout_s, name), self, epoch)
        epoch.natives.append(group.native)
        self._meet(group)
        if epoch.broken.is_set():
            self._give_up([group.native])
            raise RuntimeError(_ABORTED)
        return cast(Backend, group)

    def abort(self) -> None:
        """End every wait of every group made so far with an error."""
        with self._epoch_lock:
            epoch, self._epoch = self._epoch, Epoch()
        epoch.broken.set()
        self._give_up(epoch.natives)

    def is_peer_failure(self, error: BaseException) -> bool:
        """Whether ``error`` of a collective may come from a lost peer (and not from wrong arguments)."""
        text = str(error)
        is_own_fault = any(sign in text for sign in (MUST_BE_REPLACED, *self.program_error_signs))
        return not is_own_fault and super().is_peer_failure(error)


def _await_members(store: Store, rank: int, size: int) -> None:
    """Wait where waiting can be given up: a native library that has begun to connect cannot be stopped."""
    store.set(f"here/{rank}", "1")
    for member in range(size):
        store.get(f"here/{member}")
