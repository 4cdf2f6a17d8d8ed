"""Strangers at the controller's door."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest
import zmq

from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.controller import JobSettings
from lightning_flashrl.supervisor.service import ControllerService, free_port

KEYS = JobKeys.derive("the secret of the job")


class Door:
    """A controller of a job with two nodes, listening on loopback."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.loop = EventLoop()
        self.port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        self.told: list[str] = []
        self.service = ControllerService(
            self.context, self.loop, JobSettings(num_nodes=2), self.told.append, endpoint=self.endpoint, keys=KEYS
        )
        self.sockets: list[zmq.Socket[bytes]] = []

    def client(self, keys: JobKeys | None) -> zmq.Socket[bytes]:
        sock = self.context.socket(zmq.DEALER)
        sock.linger = 0
        if keys is not None:
            keys.guard_client(sock)
        sock.connect(self.endpoint)
        self.sockets.append(sock)
        return sock

    def serve(self, duration_s: float) -> None:
        is_over: list[bool] = []
        self.loop.call_later(duration_s, lambda: is_over.append(True))
        self.loop.run_until(lambda: bool(is_over))

    def ask(self, sock: zmq.Socket[bytes], payload: bytes, wait_s: float = 0.5) -> bytes | None:
        """Send, serve, and return what comes back."""
        sock.send(payload)
        answers: list[bytes] = []
        self.loop.add_reader(sock, lambda: answers.append(sock.recv()))
        is_over: list[bool] = []
        self.loop.call_later(wait_s, lambda: is_over.append(True))
        self.loop.run_until(lambda: bool(answers or is_over))
        self.loop.remove(sock)
        return answers[0] if answers else None

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.service.close()
        self.context.term()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


HELLO = protocol.encode(protocol.AgentHello(0, 1, "host"))
LAST_HELLO = protocol.encode(protocol.AgentHello(1, 1, "host"))


def is_alive(door: Door) -> bool:
    """Whether an agent with the right key is served."""
    door.client(KEYS).send(HELLO)
    answer = door.ask(door.client(KEYS), LAST_HELLO, wait_s=5.0)
    return answer is not None and isinstance(protocol.decode_to_agent(answer), protocol.Launch)


def test_an_agent_with_the_secret_is_served(door: Door) -> None:
    assert is_alive(door)
    assert door.service.num_refused == 0


@pytest.mark.parametrize(
    "keys",
    [
        None,
        JobKeys.derive("another secret"),
        JobKeys(KEYS.server_public, KEYS.server_secret, *zmq.curve_keypair()),
    ],
    ids=["no key", "keys of another job", "knows the controller's public key"],
)
def test_a_stranger_is_not_served(door: Door, keys: JobKeys | None) -> None:
    assert door.ask(door.client(keys), HELLO) is None
    assert is_alive(door)


def test_an_unknown_key_is_counted(door: Door) -> None:
    door.ask(door.client(JobKeys(KEYS.server_public, KEYS.server_secret, *zmq.curve_keypair())), HELLO)
    assert door.service.num_refused == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)),
        b"\xff" * 4096,
        HELLO,
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f",
    ],
)
def test_raw_bytes_are_ignored(door: Door, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", door.port)) as stranger:
        stranger.sendall(garbage)
        door.serve(0.1)
        assert is_alive(door)


def test_a_flood_is_survived(door: Door) -> None:
    noise = random.Random(0)
    strangers = []
    for _ in range(200):
        stranger = socket.create_connection(("127.0.0.1", door.port))
        stranger.sendall(noise.randbytes(2000))
        strangers.append(stranger)
    assert is_alive(door)
    for stranger in strangers:
        stranger.close()


def test_messages_that_do_not_decode_are_dropped_and_counted(door: Door) -> None:
    insider = door.client(KEYS)
    for payload in (b"", b"\xc1", b"\x92\xa4Nope\x01", HELLO[:-1], b"\x80\x04K\x01."):
        insider.send(payload)
    insider.send_multipart([b"two", b"frames"])
    door.serve(0.3)
    assert door.service.num_undecodable == 6
    assert is_alive(door)


def test_who_did_not_join_is_not_heard(door: Door) -> None:
    assert door.ask(door.client(KEYS), protocol.encode(protocol.StopAsked(2))) == protocol.encode(protocol.WhoAreYou())
    assert is_alive(door)


class Recorder:
    """Sits between an agent and the controller and keeps what the agent sent."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.recorded = b""
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        client, _ = self._server.accept()
        target = socket.create_connection(("127.0.0.1", self._target))
        back = threading.Thread(target=self._pump, args=(target, client, False))
        back.start()
        self._pump(client, target, True)
        back.join()
        client.close()
        target.close()

    def _pump(self, source: socket.socket, sink: socket.socket, is_kept: bool) -> None:
        while data := source.recv(4096):
            self.recorded += data if is_kept else b""
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._threads[0].join()
        self._server.close()


def test_a_replay_is_worth_nothing(door: Door) -> None:
    recorder = Recorder(door.port)
    insider = door.context.socket(zmq.DEALER)
    insider.linger = 0
    KEYS.guard_client(insider)
    insider.connect(f"tcp://127.0.0.1:{recorder.port}")
    insider.send(protocol.encode(protocol.AgentHello(7, 1, "refused")))
    door.serve(0.5)
    assert len(door.told) == 1  # there is no node 7
    insider.close()
    door.serve(0.2)
    with socket.create_connection(("127.0.0.1", door.port)) as stranger:
        stranger.sendall(recorder.recorded)
        door.serve(0.5)
    recorder.close()
    assert len(recorder.recorded) > 300
    assert len(door.told) == 1
    assert is_alive(door)


def test_a_port_that_is_taken_is_a_setting_to_change(door: Door) -> None:
    from lightning_flashrl.errors import ConfigurationError

    with zmq.Context() as context, pytest.raises(ConfigurationError, match="--master-port"):
        ControllerService(context, EventLoop(), JobSettings(), print, endpoint=door.endpoint, keys=KEYS)
