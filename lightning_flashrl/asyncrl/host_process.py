"""The host of a run in a process of its own, which outlives any rank, and how ranks reach it.

Rank 0 starts it; the root of this node adopts it. It ends when it is told to, or with the root.

======================  =====================================  ==========================
who                     waits for                              unblocked by
======================  =====================================  ==========================
the host's main thread  the order to end                       rank 0, the root's end
======================  =====================================  ==========================
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from lightning_flashrl.asyncrl.host import HostSettings, StreamHost
from lightning_flashrl.asyncrl.host_calls import HostAddress, HostService, RemoteHost
from lightning_flashrl.errors import ConfigurationError, FlashRLError, QueueUnavailableError
from lightning_flashrl.supervisor.client import RankClient
from lightning_flashrl.supervisor.process import die_with_parent
from lightning_flashrl.supervisor.service import free_port

_FIND_TIMEOUT_S = 1.0
_READY = b"ready"


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
        address = HostAddress(f"tcp://127.0.0.1:{free_port()}", secrets.token_hex(16))
        self._client.store_set(self._key, msgspec.json.encode(address))
        failure = _start(address, settings)
        if failure:
            raise ConfigurationError(f"the process of the queue did not come up: {failure}")
        return RemoteHost(address)


def _start(address: HostAddress, settings: HostSettings) -> str:
    """Start the process as a child of the root; return once it serves, or why it does not."""
    payload_fd = os.memfd_create("flashrl-host")
    os.write(payload_fd, pickle.dumps((address, settings, sys.path)))
    read_fd, write_fd = os.pipe()
    try:
        start_below_root(__name__, [str(payload_fd), str(write_fd)], [payload_fd, write_fd])
    finally:
        os.close(payload_fd)
        os.close(write_fd)
    with os.fdopen(read_fd, "rb") as told:
        word = told.read()
    if word == _READY:
        return ""
    return word.decode() or "it died; its output says why"


def start_below_root(module: str, arguments: Sequence[str], fds: Sequence[int] = ()) -> None:
    """Start a module as a process that outlives this rank, with the root's number before its arguments."""
    command = [sys.executable, "-m", module, str(os.getppid()), *arguments]  # a rank's parent is the root
    # The shell leaves at once: the root, a subreaper, becomes the parent. Ctrl-C is for who started the job.
    shell = ["/bin/sh", "-c", '"$@" &', "sh", *command]
    subprocess.run(shell, pass_fds=fds, start_new_session=True, check=True)


# --------------------------------------------------------------------------- the host's process
def main() -> None:
    """Be a host until the run or the root ends."""
    root_pid, payload_fd, told_fd = map(int, sys.argv[1:])
    die_with_parent(root_pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ranks are stopped; then this process, in its own way
    with os.fdopen(payload_fd, "rb") as file:
        file.seek(0)
        address, settings, sys.path[:] = pickle.load(file)
    try:
        host = StreamHost(
            settings, port=int(address.endpoint.rpartition(":")[2]), secret=address.secret, keeps_weights=True
        )
    except FlashRLError as error:
        os.write(told_fd, str(error).encode())
        sys.exit(1)
    service = HostService(host)
    os.write(told_fd, _READY)
    os.close(told_fd)
    service.is_ending.wait()
    host.end_workers()
    service.last = [host.view()]
    service.may_leave.wait()
    host.close()


if __name__ == "__main__":
    main()
