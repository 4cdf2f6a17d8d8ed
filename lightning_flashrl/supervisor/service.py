"""Carries the controller's decisions out: its socket, its log file, its lines on stderr."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.security import DoorKeeper, JobKeys
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.controller import Action, Controller, JobSettings, JobState, Keep, Send, Tell

LOCAL_ENDPOINT = "inproc://flashrl-controller"
"""How the agent in the controller's own process reaches it; there is no port that others could use."""
_TICK_S = 1.0
_BACKLOG = 4096
"""Agents of a large job connect at the same moment."""


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


class ControllerService:
    """The controller behind a ROUTER socket.

    Args:
        context: ZeroMQ context shared with the local agent.
        loop: calls this object back.
        settings: of the job.
        tell: shows a line to the user.
        endpoint: ``tcp://…`` for agents of other nodes; needs ``keys``. ``None`` for a job on one node.
        keys: who may connect over TCP.
        log_dir: where ``recovery.jsonl`` is written.

    Raises:
        ConfigurationError: the address is taken.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: EventLoop,
        settings: JobSettings,
        tell: Callable[[str], None],
        *,
        endpoint: str | None = None,
        keys: JobKeys | None = None,
        log_dir: str | None = None,
    ) -> None:
        self.controller = Controller(settings, free_port)
        self.num_undecodable = 0
        self._loop = loop
        self._tell = tell
        self._log_path = None if log_dir is None else os.path.join(log_dir, "recovery.jsonl")
        if self._log_path is not None and os.path.exists(self._log_path):
            os.remove(self._log_path)
        self._peers: dict[int, bytes] = {}
        self._nodes: dict[bytes, int] = {}
        self._door = None if keys is None else DoorKeeper(context, loop, keys)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.bind(LOCAL_ENDPOINT)
        if endpoint is not None and keys is not None:
            keys.guard_server(self._socket)
            try:
                self._socket.bind(endpoint)
            except zmq.ZMQError as error:
                self.close()
                raise ConfigurationError(
                    f"the controller cannot listen on {endpoint} ({error}); free that port or choose another "
                    "--master-port, and start node 0 on the host of --master-addr"
                ) from error
        loop.add_reader(self._socket, self._on_readable)
        loop.call_every(_TICK_S, self._on_tick)

    @property
    def num_refused(self) -> int:
        """Strangers that the handshake turned away."""
        return 0 if self._door is None else self._door.num_refused

    @property
    def is_done(self) -> bool:
        """Whether the job is over on all nodes."""
        return self.controller.state is JobState.DONE

    def close(self) -> None:
        """Close sockets; what was sent still leaves."""
        self._loop.remove(self._socket)
        self._socket.close()
        if self._door is not None:
            self._door.close()

    def _on_tick(self) -> None:
        self._perform(self.controller.tick(clock.now_ns()))

    def _on_readable(self) -> None:
        while True:
            try:
                peer, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:  # another number of frames than an agent sends
                self.num_undecodable += 1
                continue
            try:
                message = protocol.decode_agent_message(payload)
            except msgspec.MsgspecError:
                self.num_undecodable += 1
                continue
            self._on_message(peer, message)

    def _on_message(self, peer: bytes, message: protocol.AgentMessage) -> None:
        now_ns = clock.now_ns()
        if isinstance(message, protocol.AgentHello) and peer not in self._nodes:
            node_rank, actions = self.controller.join(now_ns, message)
            if node_rank < 0:
                self._tell(f"a node offered itself as number {message.node_rank} ({message.host}) and was refused")
                refusal = protocol.StopAll(1, 15, 0.0, "the job has all its nodes, or one of this rank already")
                self._socket.send_multipart([peer, protocol.encode(refusal)])
                return
            self._peers[node_rank] = peer
            self._nodes[peer] = node_rank
            self._perform(actions)
        elif peer in self._nodes:
            self._perform(self.controller.handle(now_ns, self._nodes[peer], message))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(node_rank=None, message=message):
                    payload = protocol.encode(message)
                    for peer in self._peers.values():
                        self._socket.send_multipart([peer, payload])
                case Send(node_rank=int(node_rank), message=message):
                    self._socket.send_multipart([self._peers[node_rank], protocol.encode(message)])
                case Tell(text=text):
                    self._tell(text)
                case Keep(record=record):
                    self._keep(record)

    def _keep(self, record: protocol.RecoveryRecord) -> None:
        if self._log_path is not None:
            os.makedirs(os.path.dirname(self._log_path), exist_ok=True)
            with open(self._log_path, "ab") as file:
                file.write(msgspec.json.encode(msgspec.structs.asdict(record)) + b"\n")
