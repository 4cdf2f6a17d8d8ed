"""The host of a run in a process of its own, which outlives any rank, and how ranks reach it.

Rank 0 starts it; the root of this node adopts it. It ends when it is told to, or with the root. When it dies, rank 0,
or its successor, lets the next one begin, which goes on from the journal; everybody else waits for that. One that has
imported all it needs is kept on standby, and is found by its name.

======================  =====================================  ==========================
who                     waits for                              unblocked by
======================  =====================================  ==========================
a host on standby       what it must know                      rank 0; its end; the root's end
the host's main thread  the order to end; the loss of the one  rank 0, the root's end; that loss
                        on standby
======================  =====================================  ==========================
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.host import HostAddress, HostSettings, StreamHost, run_name
from lightning_flashrl.asyncrl.host_calls import HostService, RemoteHost
from lightning_flashrl.asyncrl.processes import STANDBY_NAME
from lightning_flashrl.engines.worker_process import STOPPED_TIMEOUT_S, end_workers
from lightning_flashrl.errors import ConfigurationError, FlashRLError, QueueUnavailableError
from lightning_flashrl.messaging.local import connect_locally, listen_locally, peer_pid
from lightning_flashrl.procfs import all_processes, end_process, is_stopped, read_command_line
from lightning_flashrl.streaming.journal import remove_journal
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.process import die_with_parent, name_process
from lightning_flashrl.supervisor.service import free_port
from lightning_flashrl.weights import WeightsAddress, keep, let_go

_MODULE = __spec__.name
"""Of this file, also where it is the main program."""
_FIND_TIMEOUT_S = 1.0
_LOOK_S = 0.2
_START_TIMEOUT_S = 300.0
"""So long a host may take to import what it needs, where more processes want to run than there are cores."""
_ANSWER_TIMEOUT_S = 5.0
_NUM_ATTEMPTS = 5
_POLL_S = 0.01
_STANDBY_LOOK_S = 0.5
_HERE, _READY = b"here", b"ready"
_HOST = "flashrl-host"
"""What the kernel calls a host that serves, or is about to."""


class HostLeftError(Exception):
    """All steps are trained, and the host has been ended."""


class HostHome:
    """Where the host of a fit is written down, so that rank 0's successor finds it, and who starts it.

    Its journal stays until the program is over: a successor of rank 0 goes through the end of the fit again.

    Args:
        client: of the rank.
        fit: number of the fit.
        at_end: is given what to do when no rank will be replaced any more.

    Attributes:
        settings: returns what the next host must know; ``None`` until that is known.
    """

    def __init__(self, client: RankClient, fit: int, at_end: Callable[[Callable[[], None]], None]) -> None:
        self.settings: Callable[[], HostSettings] | None = None
        self._client = client
        self._at_end = at_end
        self._fit = fit
        self._key = _key(fit)
        self._address: HostAddress | None = None
        self._kept: list[WeightsAddress] = []

    def find(self) -> RemoteHost | None:
        """Return the host that this rank's predecessor has left, if there is one.

        When the whole job has started again, from a checkpoint, the host of its last life is ended, and its workers.
        """
        client = self._client
        if not client.incarnation:
            return None
        if (before := client.store_find(f"before/{self._key}")) is not None:
            _end_life(msgspec.json.decode(before, type=HostAddress))
        if not client.is_newcomer:
            return None
        known = [self._look_up(fit) for fit in range(self._fit + 1)]
        for one in known:
            if one is not None:
                self._remove_at_end(one)
        self._address = address = known[-1]
        if address is None:
            return None
        try:
            socket.create_connection(("127.0.0.1", address.port), _FIND_TIMEOUT_S).close()  # refused at once
            return RemoteHost(address, self._revive)
        except (OSError, QueueUnavailableError):
            return None

    def keep(self, weights: Mapping[str, WeightsAddress]) -> dict[str, WeightsAddress]:
        """Keep the memory of weights in this process until :meth:`let_go`; return where it is now.

        Raises:
            ConfigurationError: it cannot be mapped from here.
        """
        kept = {}
        for name, address in weights.items():
            kept[name] = keep(address)
            self._kept.append(kept[name])
        return kept

    def let_go(self) -> None:
        """Keep nobody's weights any more: the fit is over."""
        while self._kept:
            let_go(self._kept.pop())

    def keep_weights(self, host: RemoteHost) -> None:
        """Keep the memory of the host's weights in this rank, for the case that host and rank 0 die together.

        Raises:
            ConfigurationError: it cannot be mapped from here.
        """
        while True:
            known = host.surroundings
            try:
                kept = self.keep(known.weights)
            except ConfigurationError:  # it was killed when it had just answered; there is another one by now
                if host.ask_surroundings() == known:
                    raise
            else:
                break
        self._client.store_set(self._weights_key(self._client.global_rank), msgspec.json.encode(kept))

    def _look_up(self, fit: int) -> HostAddress | None:
        found = self._client.store_find(_key(fit))
        return None if found is None else msgspec.json.decode(found, type=HostAddress)

    def _remove_at_end(self, address: HostAddress) -> None:
        self._at_end(lambda: remove_journal(Path(address.journal)))

    def note_over(self) -> None:
        """Write down that all steps are trained: the host is about to leave."""
        self._client.store_set(self._over_key, b"")

    def check_not_over(self) -> None:
        """See whether a host may still come.

        Raises:
            HostLeftError: none will.
        """
        if self._client.store_find(self._over_key) is not None:
            raise HostLeftError

    @property
    def _over_key(self) -> str:
        return f"{self._key}/over"

    def find_weights(self) -> dict[str, WeightsAddress] | None:
        """Return the weights that other ranks have kept, if this rank has a predecessor."""
        if not self._client.is_newcomer:
            return None
        for rank in range(self._client.world_size):
            if (found := self._client.store_find(self._weights_key(rank))) is not None:
                kept = msgspec.json.decode(found, type=dict[str, WeightsAddress])
                with contextlib.suppress(ConfigurationError):
                    return self.keep(kept)
        return None

    def _weights_key(self, rank: int) -> str:
        return f"{self._key}/weights/{rank}"

    def start(self, settings: Callable[[], HostSettings]) -> RemoteHost:
        """Start a host, or the next one when this rank's predecessor has left a journal and no host.

        Args:
            settings: returns what it must know, now or when another one must be started.

        Raises:
            ConfigurationError: it does not come up.
        """
        self.settings = settings
        made = settings()
        if self._address is None:
            token = secrets.token_hex(16)
            folder = Path(tempfile.gettempdir()) if made.log_dir is None else made.log_dir.resolve()
            folder.mkdir(parents=True, exist_ok=True)
            journal = str(folder / f"queue-{token[:8]}.journal")
            self._address = HostAddress(f"tcp://127.0.0.1:{free_port()}", token, journal)
            self._remove_at_end(self._address)
            self._client.store_set(self._key, msgspec.json.encode(self._address))
        self._start(made)  # and again, should it be killed as soon as it is there
        return RemoteHost(self._address, self._revive, connect_timeout_s=_START_TIMEOUT_S)

    def _revive(self) -> None:
        """Start the next host: this one is gone, or says nothing any more.

        Raises:
            ConfigurationError: it does not come up.
        """
        if self.settings is None:
            raise QueueUnavailableError("the run's host", 0.0, "go on with it: it is gone, and its weights with it")
        lost_s = clock.now_s()
        self._start(dataclasses.replace(self.settings(), lost_s=lost_s))

    def _start(self, settings: HostSettings) -> None:
        assert self._address is not None
        for _ in range(_NUM_ATTEMPTS):
            if told := self._begin(settings):
                break
            _end_hosts(self._address, but=0)  # it has died just now, or does not move
        if told != _READY:
            why = told.decode() or "it died; its output says why"
            raise ConfigurationError(f"the process of the queue did not come up: {why}")

    def _begin(self, settings: HostSettings) -> bytes:
        """Let the process on standby serve; return what it says then, or why it does not. Empty if it dies."""
        assert self._address is not None
        name = _standby_name(self._address.journal)
        seen = _Stopped(self._address)
        deadline_s = clock.now_s() + _START_TIMEOUT_S
        while (sock := connect_locally(name)) is None:
            if all(called == _HOST for _, called in _processes(self._address)):
                _start_standby(self._address)
            seen.end()
            if clock.now_s() > deadline_s:
                return f"nothing of it was heard in {_START_TIMEOUT_S:g} s".encode()
            clock.sleep(_POLL_S)
        with sock, contextlib.suppress(OSError):  # it has died, or does not move
            sock.settimeout(_ANSWER_TIMEOUT_S)
            if sock.recv(len(_HERE)) == _HERE:
                _end_hosts(self._address, but=peer_pid(sock))
                return _ask(sock, pickle.dumps((self._address, settings, sys.path)), seen)
        return b""

    def close(self) -> None:
        """End the host on standby."""
        if self._address is not None:
            _end_standby(self._address)


def _key(fit: int) -> str:
    return f"kept/asyncrl/{fit}"


class _Stopped:
    """Processes of an address that a signal has stopped, seen by who waits for one of them."""

    def __init__(self, address: HostAddress) -> None:
        self._address = address
        self._since_s: dict[int, float] = {}

    def end(self) -> None:
        """Kill those that have been stopped for a while."""
        now_s = clock.now_s()
        stopped = [pid for pid, _ in _processes(self._address) if is_stopped(pid)]
        self._since_s = {pid: self._since_s.get(pid, now_s) for pid in stopped}
        late = {pid for pid, since_s in self._since_s.items() if now_s - since_s > STOPPED_TIMEOUT_S}
        if late:
            _end(self._address, lambda pid, _: pid in late)


def _ask(sock: socket.socket, request: bytes, seen: _Stopped) -> bytes:
    """Send a request and return all that is answered; nothing if that takes too long.

    Raises:
        OSError: the other end has died.
    """
    deadline_s = clock.now_s() + _START_TIMEOUT_S
    sock.settimeout(_LOOK_S)
    left, found = memoryview(request), b""
    while clock.now_s() < deadline_s:
        try:
            if left:
                left = left[sock.send(left) :]
                if not left:
                    sock.shutdown(socket.SHUT_WR)
                continue
            part = sock.recv(1 << 16)
        except TimeoutError:
            seen.end()
            continue
        if not part:
            return found
        found += part
    return b""


def _start_standby(address: HostAddress) -> None:
    start_below_root(_MODULE, [address.journal])


def _keep_standby(address: HostAddress, is_over: threading.Event) -> None:
    """Start a host on standby whenever there is none, until it is over."""
    pid = 0
    while True:
        if not pid or not Path(f"/proc/{pid}").exists():
            pid = next((found for found, called in _processes(address) if called != _HOST), 0)
            if not pid:
                _start_standby(address)
        if is_over.wait(_STANDBY_LOOK_S):
            return _end_standby(address)


def _end_standby(address: HostAddress) -> None:
    _end(address, lambda _, called: called != _HOST)


def _read(sock: socket.socket) -> bytes:
    """Return all that the other end says before it is gone, or is silent for too long."""
    found = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(1 << 16):
            found += part
    return found


def _processes(address: HostAddress) -> Iterator[tuple[int, str]]:
    """Numbers of the hosts of an address, on standby or not, and what they are called."""
    for pid in all_processes():
        called = None
        with contextlib.suppress(OSError):  # gone meanwhile
            called = _look_at(pid, address)
        if called is not None:
            yield pid, called


def _look_at(pid: int, address: HostAddress) -> str | None:
    """What a process is called, if it is a host of an address; else ``None``."""
    if {_MODULE, address.journal}.issubset(read_command_line(pid)):
        return Path(f"/proc/{pid}/comm").read_text().rstrip()
    return None


def _end_hosts(address: HostAddress, but: int) -> None:
    """Kill a host of this address that hangs, or that a predecessor has begun to start; wait until it is gone."""
    _end(address, lambda pid, _: pid != but)


def _end(address: HostAddress, is_meant: Callable[[int, str], bool]) -> None:
    def is_it(pid: int) -> bool:
        called = _look_at(pid, address)
        return called is not None and is_meant(pid, called)

    for pid, _ in _processes(address):
        end_process(pid, is_it)


def _end_life(address: HostAddress) -> None:
    """End all that is left of a host: itself, who would follow it, its workers."""
    _end_hosts(address, but=0)
    end_workers(run_name(address.secret))
    remove_journal(Path(address.journal))


def _standby_name(journal: str) -> str:
    return f"flashrl-standby-{Path(journal).stem}"


def start_below_root(module: str, arguments: Sequence[str]) -> None:
    """Start a module as a process that outlives this rank, with the root's number before its arguments."""
    command = [sys.executable, "-m", module, str(os.getppid()), *arguments]  # a rank's parent is the root
    # The shell leaves at once: the root, a subreaper, becomes the parent. Ctrl-C is for who started the job.
    shell = ["/bin/sh", "-c", '"$@" &', "sh", *command]
    subprocess.run(shell, start_new_session=True, check=True)


# --------------------------------------------------------------------------- the host's process
def main() -> None:
    """Be a host until the run or the root ends."""
    root_pid, journal = int(sys.argv[1]), sys.argv[2]
    name_process(STANDBY_NAME)
    die_with_parent(root_pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ranks are stopped; then this process, in its own way
    try:
        listener = listen_locally(_standby_name(journal))
    except OSError:  # another one is there
        return
    with listener:
        while not peer_pid(sock := listener.accept()[0]):
            sock.close()
    name_process(_HOST)
    try:
        sock.sendall(_HERE)
        address, settings, sys.path[:] = pickle.loads(_read(sock))
    except (OSError, EOFError, pickle.UnpicklingError):  # rank 0 died while it said that
        return
    try:
        host = StreamHost(
            settings,
            port=address.port,
            secret=address.secret,
            keeps_weights=True,
            journal=Path(address.journal),
            keeper_pid=root_pid,
        )
    except FlashRLError as error:
        with contextlib.suppress(OSError):  # rank 0 is gone
            sock.sendall(str(error).encode())
        sys.exit(1)
    service = HostService(host)
    with contextlib.suppress(OSError):
        sock.sendall(_READY)
    sock.close()
    _keep_standby(address, service.is_ending)
    host.end_workers()
    service.last = [host.view()]
    service.may_leave.wait()
    host.close()


if __name__ == "__main__":
    main()
