"""The host of a run in a process of its own, which outlives any rank, and how ranks reach it.

Rank 0 starts it; the root of this node adopts it. It ends when it is told to, or with the root. When it dies, rank 0,
or its successor, lets the next one begin, which goes on from the journal; everybody else waits for that. One that has
imported all it needs is kept on standby.

======================  =====================================  ==========================
who                     waits for                              unblocked by
======================  =====================================  ==========================
a host on standby       what it must know                      rank 0; its end; the root's end
the host's main thread  the order to end                       rank 0, the root's end
======================  =====================================  ==========================
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.host import HostAddress, HostSettings, StreamHost
from lightning_flashrl.asyncrl.host_calls import HostService, RemoteHost
from lightning_flashrl.errors import ConfigurationError, FlashRLError, QueueUnavailableError
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.process import die_with_parent
from lightning_flashrl.supervisor.service import free_port
from lightning_flashrl.weights import WeightsAddress, keep

_FIND_TIMEOUT_S = 1.0
_LOOK_S = 0.2
_KILL_TIMEOUT_S = 10.0
_READY = b"ready"


class HostHome:
    """Where the host of a fit is written down, so that rank 0's successor finds it, and who starts it.

    Args:
        client: of the rank.
        fit: number of the fit.

    Attributes:
        settings: returns what the next host must know; ``None`` until that is known.
    """

    def __init__(self, client: RankClient, fit: int) -> None:
        self.settings: Callable[[], HostSettings] | None = None
        self._client = client
        self._key = f"asyncrl/{fit}"
        self._address: HostAddress | None = None
        self._standby: _Standby | None = None

    def find(self) -> RemoteHost | None:
        """Return the host that this rank's predecessor has left, if there is one.

        When the whole job starts again, from a checkpoint, the host of its last life is ended.
        """
        client = self._client
        if not client.incarnation:
            return None
        try:
            found = client.store_get(self._key, _FIND_TIMEOUT_S)
        except TimeoutError:
            return None
        address = msgspec.json.decode(found, type=HostAddress)
        if client.is_newcomer:
            self._address = address
        try:
            socket.create_connection(("127.0.0.1", address.port), _FIND_TIMEOUT_S).close()  # refused at once
            host = RemoteHost(address, self._revive)
        except (OSError, QueueUnavailableError):
            return None
        if client.is_newcomer:
            return host
        host.close()
        return None

    def keep_weights(self, weights: Mapping[str, WeightsAddress]) -> dict[str, WeightsAddress]:
        """Keep the memory of the weights in this rank, for the case that host and rank 0 die together.

        Raises:
            ConfigurationError: it cannot be mapped from here.
        """
        kept = {name: keep(address) for name, address in weights.items()}
        self._client.store_set(self._weights_key(self._client.global_rank), msgspec.json.encode(kept))
        return kept

    def find_weights(self) -> dict[str, WeightsAddress] | None:
        """Return the weights that other ranks have kept, if this rank has a predecessor."""
        if not self._client.is_newcomer:
            return None
        for rank in range(self._client.world_size):
            with contextlib.suppress(TimeoutError, ConfigurationError):
                found = self._client.store_get(self._weights_key(rank), _LOOK_S)
                kept = msgspec.json.decode(found, type=dict[str, WeightsAddress])
                return {name: keep(address) for name, address in kept.items()}
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
            self._client.store_set(self._key, msgspec.json.encode(self._address))
        self._start(made)
        return RemoteHost(self._address, self._revive)

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
        standby, self._standby = self._standby, None
        told = b"" if standby is None else self._begin(standby, settings)
        if not told:  # there was none, or it has died
            told = self._begin(_Standby(self._address.journal), settings)
        if told != _READY:
            why = told.decode() or "it died; its output says why"
            raise ConfigurationError(f"the process of the queue did not come up: {why}")
        self._standby = _Standby(self._address.journal)

    def _begin(self, standby: _Standby, settings: HostSettings) -> bytes:
        assert self._address is not None
        _end_hosts(self._address, but=standby.pid)
        return standby.begin(self._address, settings)

    def close(self) -> None:
        """Let go of the host on standby."""
        if self._standby is not None:
            self._standby.close()


def _end_hosts(address: HostAddress, but: int) -> None:
    """Kill a host of this address that hangs, or that a predecessor has begun to start; wait until it is gone."""
    mine = {__name__.encode(), address.journal.encode()}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != but]:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if mine.issubset(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], _KILL_TIMEOUT_S)
            finally:
                os.close(pidfd)


class _Standby:
    """A host's process, a child of the root, that does not know yet what to do.

    Args:
        journal: path by which it is known.
    """

    def __init__(self, journal: str) -> None:
        order_fd, self._order_fd = os.pipe()
        told_fd, write_fd = os.pipe()
        try:
            start_below_root(__name__, [str(order_fd), str(write_fd), journal], [order_fd, write_fd])
        finally:
            os.close(order_fd)
            os.close(write_fd)
        self._told = os.fdopen(told_fd, "rb")
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        """Its process, once it is ready; 0 if it has died."""
        if self._pid is None:
            self._pid = int(self._told.readline() or 0)
        return self._pid

    def begin(self, address: HostAddress, settings: HostSettings) -> bytes:
        """Let it serve; return what it says then, or why it does not."""
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._order_fd, "wb") as order:
            pickle.dump((address, settings, sys.path), order)
        with self._told:
            return self._told.read()

    def close(self) -> None:
        """It ends."""
        os.close(self._order_fd)
        self._told.close()


def start_below_root(module: str, arguments: Sequence[str], fds: Sequence[int] = ()) -> None:
    """Start a module as a process that outlives this rank, with the root's number before its arguments."""
    command = [sys.executable, "-m", module, str(os.getppid()), *arguments]  # a rank's parent is the root
    # The shell leaves at once: the root, a subreaper, becomes the parent. Ctrl-C is for who started the job.
    shell = ["/bin/sh", "-c", '"$@" &', "sh", *command]
    subprocess.run(shell, pass_fds=fds, start_new_session=True, check=True)


# --------------------------------------------------------------------------- the host's process
def main() -> None:
    """Be a host until the run or the root ends."""
    root_pid, order_fd, told_fd = map(int, sys.argv[1:-1])  # the last one is for who looks at its command line
    die_with_parent(root_pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ranks are stopped; then this process, in its own way
    with contextlib.suppress(BrokenPipeError):
        os.write(told_fd, b"%d\n" % os.getpid())
    with os.fdopen(order_fd, "rb") as file:
        order = file.read()
    if not order:  # who started it is gone
        return
    address, settings, sys.path[:] = pickle.loads(order)
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
        with contextlib.suppress(BrokenPipeError):  # who started it is gone
            os.write(told_fd, str(error).encode())
        sys.exit(1)
    service = HostService(host)
    with contextlib.suppress(BrokenPipeError):
        os.write(told_fd, _READY)
    os.close(told_fd)
    service.is_ending.wait()
    host.end_workers()
    service.last = [host.view()]
    service.may_leave.wait()
    host.close()
    Path(address.journal).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
