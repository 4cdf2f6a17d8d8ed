"""What every transport must do, checked against a real one in real processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from lightning_flashrl import clock
from lightning_flashrl.communicator.base import KeyValueStore, Transport, run_abandonable

_STORE_TIMEOUT_S = 60.0
_PENDING_S = 0.3


def check_transport(
    make_transport: Callable[[], Transport],
    put: Callable[[str, bytes], None],
    fetch: Callable[[str, float, threading.Event], bytes],
    rank: int,
    size: int,
    *,
    limit_s: float = 10.0,
) -> None:
    """Check a transport; call it in ``size`` processes at once.

    Checked are: groups give right results; an abort by another thread ends pending collectives in every process and
    leaves the process alive; groups can be made again, as often as needed; a connect that waits for a missing member
    can be abandoned; errors of lost peers are told from wrong arguments. With one member nothing can be pending or
    missing, and those parts are left out.

    Args:
        make_transport: makes the transport of this process.
        put: stores a rendezvous value that all processes see.
        fetch: waits for such a value, up to a number of seconds, and raises when the event is set.
        rank: of this process among those that check.
        size: how many processes check.
        limit_s: how long an abort may take to be felt.

    Raises:
        AssertionError: the transport does something else; the text says what.
    """
    check = _Check(make_transport(), put, fetch, rank, size, limit_s)
    check.results(check.connect("first"))
    check.wrong_arguments(check.connect("arguments"))
    for attempt in range(2 if size > 1 else 0):
        check.abort_of_pending(check.connect(f"busy{attempt}"), check.connect(f"idle{attempt}"), f"pending{attempt}")
        check.results(check.connect(f"again{attempt}"))
    if size > 1:
        check.missing_member()
    check.transport.abort()
    check.transport.settle()
    check.results(check.connect("last"))


def _require(condition: bool, expectation: str) -> None:
    if not condition:
        raise AssertionError(expectation)


class _Check:
    """One process's part of the check."""

    def __init__(
        self,
        transport: Transport,
        put: Callable[[str, bytes], None],
        fetch: Callable[[str, float, threading.Event], bytes],
        rank: int,
        size: int,
        limit_s: float,
    ) -> None:
        self.transport = transport
        self._put = put
        self._fetch = fetch
        self._rank = rank
        self._size = size
        self._limit_s = limit_s
        self._device: torch.device = getattr(transport, "device", torch.device(transport.device_type))

    def _store(self, prefix: str, abandoned: threading.Event) -> KeyValueStore:
        def fetch(key: str, timeout_s: float) -> bytes:
            return self._fetch(key, timeout_s, abandoned)

        return KeyValueStore(f"{prefix}/", self._put, fetch, _STORE_TIMEOUT_S)

    def connect(self, prefix: str, abandoned: threading.Event | None = None) -> Any:
        """Connect as the communicator does: in a thread of its own that can be left alone."""
        abandoned = abandoned or threading.Event()
        store = self._store(prefix, abandoned)
        name = "0" if prefix.startswith("again") else prefix
        timeout_s = 3 * self._limit_s
        return run_abandonable(
            lambda: self.transport.connect(store, self._rank, self._size, timeout_s, name), abandoned, name
        )

    def _tensor(self, value: float) -> torch.Tensor:
        return torch.full((5,), value, device=self._device)

    def results(self, group: Any) -> None:
        """Each kind of collective that a training job cannot do without gives the right result."""
        summed = self._tensor(self._rank + 1)
        group.allreduce([summed]).wait()
        total = self._size * (self._size + 1) / 2
        _require(bool((summed == total).all()), f"allreduce gives {summed.tolist()}, the sum is {total}")

        sent = self._tensor(7 if self._rank == 0 else -1)
        group.broadcast([sent]).wait()
        _require(bool((sent == 7).all()), f"broadcast gives {sent.tolist()}, rank 0 sent 7")

        gathered = [self._tensor(-1) for _ in range(self._size)]
        group.allgather([gathered], [self._tensor(self._rank)]).wait()
        found = [float(part[0]) for part in gathered]
        _require(found == list(range(self._size)), f"allgather gives {found}, each member sent its rank")

        group.barrier().wait()
        future = group.allreduce([summed]).get_future()
        future.wait()
        _require(
            bool((summed == total * self._size).all()), f"the future's allreduce gives {summed.tolist()}, not {total}"
        )

    def wrong_arguments(self, group: Any) -> None:
        """An error that is the caller's own fault is not taken for a lost peer; the group stays usable."""
        try:
            group.allreduce([]).wait()
        except Exception as error:  # noqa: BLE001 - which type it is, is the native library's choice
            is_peer_failure = self.transport.is_peer_failure(error)
            _require(not is_peer_failure, f"is_peer_failure takes wrong arguments for a lost peer: {error}")
        else:
            raise AssertionError("an allreduce of no tensor is accepted")
        self.results(group)

    def _assemble(self, place: str) -> None:
        """Return when every process is at ``place``."""
        self._put(f"{place}/{self._rank}", b"1")
        for member in range(self._size):
            self._fetch(f"{place}/{member}", _STORE_TIMEOUT_S, threading.Event())

    def abort_of_pending(self, busy: Any, idle: Any, place: str) -> None:
        """Two collectives that can never end do end when another thread aborts."""
        group = idle if self._rank == self._size - 1 else busy  # so each lacks a member
        work = group.allreduce([self._tensor(1)])
        self._assemble(place)
        started_s = clock.now_s()
        timer = threading.Timer(_PENDING_S, self.transport.abort)
        timer.start()
        try:
            work.wait()
        except RuntimeError as error:
            elapsed_s = clock.now_s() - started_s
            _require(elapsed_s > _PENDING_S / 2, f"a collective that lacks a member failed before the abort: {error}")
            _require(elapsed_s < _PENDING_S + self._limit_s, f"the abort was felt after {elapsed_s - _PENDING_S:.1f} s")
            _require(self.transport.is_peer_failure(error), f"is_peer_failure does not recognise an abort: {error}")
        else:
            raise AssertionError("a collective ended well although a member never took part")
        finally:
            timer.join()
        self.transport.settle()

    def missing_member(self) -> None:
        """Members do not wait for one that never connects when nobody needs the group any more."""
        if self._rank == self._size - 1:
            return
        abandoned = threading.Event()
        timer = threading.Timer(_PENDING_S, abandoned.set)
        timer.start()
        started_s = clock.now_s()
        try:
            self.connect("missing", abandoned)
        except RuntimeError:
            elapsed_s = clock.now_s() - started_s
            _require(elapsed_s < _PENDING_S + self._limit_s, f"an abandoned connect returned after {elapsed_s:.1f} s")
        else:
            raise AssertionError("a group was formed although a member never connected")
        finally:
            timer.join()
