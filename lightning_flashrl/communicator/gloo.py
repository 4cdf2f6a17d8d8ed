"""gloo groups that can be unblocked: their own connected sockets are shut.

``ProcessGroup.abort`` does nothing on gloo, and a rank that is not a neighbour of the dead one waits for the full
time-out. Shutting the connected sockets of the group ends every pending operation within milliseconds. The listening
socket must not be touched: gloo ends the process with an uncaught C++ exception when its accept fails.
"""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from typing import cast

from torch._C._distributed_c10d import Backend, ProcessGroupGloo, Store

from lightning_flashrl.communicator.base import Transport
from lightning_flashrl.communicator.gloo_group import GlooGroup, release

_CONNECT_TIMEOUT = timedelta(seconds=30)


def _open_sockets() -> dict[int, str]:
    """Descriptor → kernel name of every socket of this process."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found[int(entry)] = target
    return found


def _local_port(fd: int) -> int | None:
    """Local port of an internet socket, or ``None`` for any other descriptor."""
    try:
        with socket.socket(fileno=os.dup(fd)) as probe:
            name = probe.getsockname()
    except OSError:
        return None
    return name[1] if isinstance(name, tuple) and len(name) >= 2 else None


class GlooTransport(Transport):
    """One gloo device for the life of the process; groups come and go on it.

    Args:
        hostname: address that other members can reach; the default is what gloo finds for this host.
    """

    backend = "gloo"
    device_type = "cpu"

    def __init__(self, hostname: str | None = None) -> None:
        before = set(_open_sockets().values())
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        if interface:
            self._device = ProcessGroupGloo.create_device(interface=interface.split(",")[0])
        elif hostname:
            self._device = ProcessGroupGloo.create_device(hostname=hostname)
        else:
            self._device = ProcessGroupGloo.create_default_device()
        ports = {_local_port(fd) for fd, name in _open_sockets().items() if name not in before}
        self._own_ports: set[int] = {port for port in ports if port}
        self._peer_ports: dict[str, set[int]] = {}
        self._groups: list[GlooGroup] = []
        self._groups_lock = threading.Lock()

    def connect(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Backend:
        """Form a native group; see :meth:`Transport.connect`. Members tell each other their ports first."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._threads = 2
        options._timeout = _CONNECT_TIMEOUT
        store.set(f"port/{rank}", ",".join(map(str, sorted(self._own_ports))))
        told = [store.get(f"port/{other}").decode() for other in range(size)]
        self._peer_ports[name] = {int(port) for peer in told for port in peer.split(",") if port}
        native = ProcessGroupGloo(store, rank, size, options)
        native._set_default_timeout(timedelta(seconds=timeout_s))
        group = GlooGroup(native)
        with self._groups_lock:
            self._groups.append(group)
        return cast(Backend, group)

    def abort(self) -> None:
        """End every pending operation of every group; see :meth:`Transport.abort`."""
        with self._groups_lock:
            groups, self._groups = self._groups, []
        self._shut_connections()
        release([native for group in groups if (native := group.give_up()) is not None])

    def close(self) -> None:
        """Let go of all groups; see :meth:`Transport.close`."""
        with self._groups_lock:
            self._groups = []

    def _shut_connections(self) -> None:
        """Shut the connected sockets of all groups, never the listener."""
        peer_ports = set().union(*self._peer_ports.values())
        for fd in _open_sockets():
            try:
                with socket.socket(fileno=os.dup(fd)) as connection:
                    if connection.family not in (socket.AF_INET, socket.AF_INET6):
                        continue
                    local, peer = connection.getsockname()[1], connection.getpeername()[1]
                    if local in self._own_ports or peer in peer_ports:
                        connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # not connected (the listener), or closed meanwhile
