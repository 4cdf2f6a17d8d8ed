"""Carries the controller's decisions out: its socket, its log file, its lines on stderr.

What the controller is told goes into a chronicle before it takes effect anywhere: now and then the whole controller,
then message by message, with a mark wherever the user has been told all that came of them. A successor in another
process reads it, and is the same controller. What its predecessor decided and did not carry out any more is carried out
when the agents, which it does not know yet, say hello again; what the user was not told any more is told first of all.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable

import msgspec
import zmq

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.security import DoorKeeper, JobKeys
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.chronicle import Chronicle
from lightning_flashrl.supervisor.controller import Action, Controller, JobSettings, JobState, Keep, Send, Tell

LOCAL_ENDPOINT = "inproc://flashrl-controller"
"""How the agent in the controller's own process reaches it; there is no port that others could use."""
_TICK_S = 1.0
_BACKLOG = 4096
"""Agents of a large job connect at the same moment."""
_STRANGER = -1
_HEARD = struct.Struct("<qq")
"""When, and from which node (or :data:`_STRANGER`)."""
_TOLD = b""
"""In the place of a message: the user has been told all that came of those before."""
_CHRONICLE_BYTES = 1 << 20
"""A longer chronicle is begun anew, unless it is not twice as long as at its last beginning."""


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
        chronicle: what a predecessor was told, if there was one, and where a successor reads what this one is told.

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
        chronicle: Chronicle | None = None,
    ) -> None:
        self.num_undecodable = 0
        self._loop = loop
        self._tell = tell
        self._log_path = None if log_dir is None else os.path.join(log_dir, "recovery.jsonl")
        self._chronicle = chronicle
        self._most_bytes = _CHRONICLE_BYTES
        self._untold: list[str] = []
        records = [] if chronicle is None else chronicle.records()
        if records:
            self.controller = self._resume(records)
        else:
            self.controller = Controller(settings, free_port)
            if self._log_path is not None and os.path.exists(self._log_path):
                os.remove(self._log_path)
            self._keep_whole()  # from now on there may be a successor, and lines that are ours
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

    def _resume(self, records: list[bytes]) -> Controller:
        """Tell a controller what its predecessor was told; write what that one had no time to write."""
        controller: Controller
        controller, self._untold = pickle.loads(records[0])  # our own memory, never the network
        told: list[protocol.RecoveryRecord] = []
        for record in records[1:]:
            if record == _TOLD:
                self._untold.clear()
                continue
            now_ns, node_rank = _HEARD.unpack_from(record)
            message = protocol.decode_agent_message(record[_HEARD.size :])
            if isinstance(message, protocol.AgentHello):
                _, actions = controller.join(now_ns, message)
            else:
                actions = controller.handle(now_ns, node_rank, message)
            told += [action.record for action in actions if isinstance(action, Keep)]
            self._note_lines(actions)
        num_missing = controller.num_records - self._num_logged()
        for told_record in told[len(told) - num_missing :] if 0 < num_missing <= len(told) else []:
            self._keep(told_record)
        return controller

    def _num_logged(self) -> int:
        """Recoveries that are in the log; a change of the supervisor, of which it also tells, replaced nobody."""
        if self._log_path is None or not os.path.exists(self._log_path):
            return 0
        with open(self._log_path, "r+b") as file:
            lines = file.readlines()
            if lines and not lines[-1].endswith(b"\n"):  # the predecessor died while it wrote
                file.truncate(file.tell() - len(lines.pop()))
        return sum(bool(msgspec.json.decode(line)["lost"]) for line in lines)

    def note_takeover(self, reason: str, duration_ms: float) -> None:
        """Write to the log that this service took over, and tell what the one that ended did not."""
        self._tell_rest()
        quorum_id, stages = self.controller.quorum_id, {"total": round(duration_ms, 3)}
        self._keep(protocol.RecoveryRecord(quorum_id, (), {}, {}, reason, stages, True, clock.wall_s()))

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
        state = self.controller.state
        self._carry_out(self.controller.tick(clock.now_ns()), state)

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
            self._on_message(peer, message, payload)

    def _on_message(self, peer: bytes, message: protocol.AgentMessage, payload: bytes) -> None:
        now_ns = clock.now_ns()
        state = self.controller.state
        if isinstance(message, protocol.AgentHello):
            self._write_down(now_ns, _STRANGER, payload)
            node_rank, actions = self.controller.join(now_ns, message)
            if node_rank < 0:
                self._tell(f"a node offered itself as number {message.node_rank} ({message.host}) and was refused")
                refusal = protocol.StopAll(1, 15, 0.0, "the job has all its nodes, or one of this rank already")
                self._socket.send_multipart([peer, protocol.encode(refusal)])
                return
            self._nodes.pop(self._peers.get(node_rank, b""), None)
            self._peers[node_rank] = peer
            self._nodes[peer] = node_rank
        elif peer in self._nodes:
            if not isinstance(message, protocol.AgentBeat):
                self._write_down(now_ns, self._nodes[peer], payload)
            actions = self.controller.handle(now_ns, self._nodes[peer], message)
        else:
            self._socket.send_multipart([peer, protocol.encode(protocol.WhoAreYou())])
            return
        self._carry_out(actions, state)

    def _carry_out(self, actions: list[Action], old_state: JobState) -> None:
        """Perform actions. What chance decided, at a change of the state, is kept before anybody hears of it."""
        self._note_lines(actions)
        if self.controller.state is not old_state:
            self._keep_whole()
        self._perform(actions)
        self._tell_rest()
        if self._is_long and not self.controller.is_recovering:
            self._keep_whole()

    # ------------------------------------------------------------------ what a successor must know
    def _write_down(self, now_ns: int, node_rank: int, payload: bytes) -> None:
        if self._chronicle is not None:
            self._chronicle.append(_HEARD.pack(now_ns, node_rank) + payload)

    def _keep_whole(self) -> None:
        if self._chronicle is not None:
            self._chronicle.begin(pickle.dumps((self.controller, self._untold)))
            self._most_bytes = max(_CHRONICLE_BYTES, 2 * self._chronicle.size_bytes)

    @property
    def _is_long(self) -> bool:
        return self._chronicle is not None and self._chronicle.size_bytes > self._most_bytes

    def _note_lines(self, actions: list[Action]) -> None:
        self._untold += [action.text for action in actions if isinstance(action, Tell)]

    def _tell_rest(self) -> None:
        if not self._untold:
            return
        for text in self._untold:
            self._tell(text)
        self._untold.clear()
        if self._chronicle is not None:
            self._chronicle.append(_TOLD)

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(node_rank=None, message=message):
                    payload = protocol.encode(message)
                    for peer in self._peers.values():
                        self._socket.send_multipart([peer, payload])
                case Send(node_rank=int(node_rank), message=message):
                    if node_rank in self._peers:  # else its agent has yet to say hello, and is told then
                        self._socket.send_multipart([self._peers[node_rank], protocol.encode(message)])
                case Keep(record=record):
                    self._keep(record)

    def _keep(self, record: protocol.RecoveryRecord) -> None:
        if self._log_path is not None:
            os.makedirs(os.path.dirname(self._log_path), exist_ok=True)
            with open(self._log_path, "ab") as file:
                file.write(msgspec.json.encode(msgspec.structs.asdict(record)) + b"\n")
