"""What only a queue behind a socket can meet: strangers, silence, the death of one side."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq

from lightning_flashrl.errors import ConfigurationError, EndOfStream, QueueUnavailableError, WouldBlock
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.streaming import (
    Field,
    Sampler,
    Task,
    TransferQueue,
    TransferQueueClient,
    TransferQueueServer,
    protocol,
    unit,
)
from lightning_flashrl.streaming.client import Transport

FIELDS = {"x": Field(torch.int64, (None,))}


def test_it_answers_when_it_is_told_to() -> None:
    with TransferQueue(FIELDS, ["t"]) as queue:
        with TransferQueueServer(queue, starts=False) as server:
            with pytest.raises(QueueUnavailableError):
                TransferQueueClient(server.endpoint, server.secret, answer_timeout_s=0.3)
            server.answer_call = bytes.upper
            server.start()
            with TransferQueueClient(server.endpoint, server.secret) as client:
                assert client.call(b"x") == b"X"
        TransferQueueServer(queue, starts=False).close()


def _address(endpoint: str) -> tuple[str, int]:
    host, port = endpoint.removeprefix("tcp://").split(":")
    return host, int(port)


class TestStrangers:
    def test_without_the_secret_nobody_gets_an_answer(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with pytest.raises(QueueUnavailableError, match="same secret"):
                TransferQueueClient(server.endpoint, "guess", answer_timeout_s=1.5)
            with TransferQueueClient(server.endpoint, server.secret) as client:
                client.put({"x": [[1]]})

    def test_garbage_and_floods_do_not_disturb(self) -> None:
        draw = random.Random(9)
        with TransferQueue(FIELDS, ["t"], num_storage_units=1) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                for endpoint in (server.endpoint, queue.unit_specs[0].endpoint):
                    for size in (1, 64, 100_000):
                        with socket.create_connection(_address(endpoint)) as stranger:
                            stranger.sendall(draw.randbytes(size))
                    flood = [socket.create_connection(_address(endpoint)) for _ in range(100)]
                    client.put({"x": [[1, 2]]})
                    assert client.lease("t", count=1)["x"].values.tolist() == [1, 2]
                    for stranger in flood:
                        stranger.close()

    def test_the_unix_socket_wants_the_token(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                door = server._door_local
                for first in (b"", b"x" * 49, b"\xff" * 100_000, struct.pack("<I", 1 << 31)):
                    with socket.socket(socket.AF_UNIX) as stranger:
                        stranger.connect(f"\0{door.address}")
                        stranger.sendall(struct.pack("<I", len(first)) + first)
                        stranger.settimeout(10)
                        assert stranger.recv(1) == b""
                client.put({"x": [[1]]})
                assert len(queue.lease("t", count=1)) == 1
                assert door.num_refused >= 2

    def test_a_member_that_sends_nonsense_is_not_served(self) -> None:
        keys = JobKeys.derive("secret")
        owner = b"o" * 16
        with TransferQueue(FIELDS, ["t"], secret="secret") as queue, TransferQueueServer(queue) as server:
            long = protocol.WrittenSpec("x", 1 << 24, (10**12).to_bytes(8, "little"))
            negative = protocol.WrittenSpec("x", 0, (-8).to_bytes(8, "little", signed=True))
            nowhere = protocol.WrittenSpec("x", -5, (8).to_bytes(8, "little"))
            odd = protocol.WrittenSpec("x", 0, b"\0" * 7)
            nonsense = [
                b"",
                b"\xc1",
                b"\xff" * 500,
                *(protocol.encode(protocol.Put((spec,), None, None, 0.0)) for spec in (long, negative, nowhere, odd)),
                protocol.encode(protocol.Put((protocol.WrittenSpec("y", 0, b""),), None, None, 0.0)),
                protocol.encode(protocol.Put((), None, None, 0.0)),
                protocol.encode(protocol.EndLease(5, "t", True, None)),
                protocol.encode(protocol.EndLease(5, "t", True, b"123")),
                protocol.encode(protocol.Clear(b"123")),
                protocol.encode(protocol.SealExtent(-1)),
                protocol.encode(protocol.SealExtent(1 << 60)),
                protocol.encode(protocol.GrantExtent(-7)),
                protocol.encode(protocol.GrantExtent(1 << 62)),
                protocol.encode(protocol.Cancel(77)),
            ]
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            sock = context.socket(zmq.DEALER)
            keys.guard_client(sock)
            sock.connect(server.endpoint)
            for payload in nonsense:
                sock.send_multipart([b"12345678", owner, payload])
                sock.send_multipart([payload])
            with TransferQueueClient(server.endpoint, server.secret) as client:
                client.put({"x": [[3]]})
                assert client.lease("t", count=1)["x"].values.tolist() == [3]
                assert client.statistics().num_put == 1
            context.destroy(linger=0)


class TestDeath:
    @pytest.mark.parametrize("transport", ["auto", "socket"])
    def test_a_client_notices_that_the_server_is_gone(self, transport: Transport) -> None:
        queue = TransferQueue(FIELDS, ["t"])
        server = TransferQueueServer(queue)
        options: dict[str, Any] = {"transport": transport, "answer_timeout_s": 1.5}
        with TransferQueueClient(server.endpoint, server.secret, **options) as client:
            with pytest.raises(WouldBlock):
                client.lease_nowait("t", count=1)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(client.lease, "t", count=1)
                while not queue.statistics().num_waiting_leases:
                    time.sleep(0.01)
                server.close()
                queue.shutdown()
                with pytest.raises(QueueUnavailableError, match="did not answer"):
                    waiting.result()
            with pytest.raises(QueueUnavailableError, match="did not answer"):
                client.lease("t", count=1)

    def test_rows_of_a_client_that_is_killed_go_to_others_at_once(self) -> None:
        """No need to wait until its lease runs out."""
        with TransferQueue(FIELDS, ["t"], lease_timeout_s=1000) as queue, TransferQueueServer(queue) as server:
            rows = queue.put({"x": [[1], [2]]})
            program = (
                "import sys, time; from lightning_flashrl.streaming import TransferQueueClient;"
                "client = TransferQueueClient(*sys.argv[1:]); client.lease('t', count=1); print('leased', flush=True);"
                "client.lease('t', count=5)"
            )
            command = [sys.executable, "-c", program, server.endpoint, server.secret]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"leased\n"
                while not queue.statistics().num_waiting_leases:
                    time.sleep(0.01)
                process.kill()
            assert queue.lease("t", count=2, timeout_s=20).rows == rows
            assert queue.statistics().num_waiting_leases == 0

    @pytest.mark.parametrize("transport", ["auto", "socket"])
    def test_a_client_that_was_stopped_for_a_while_asks_again(
        self, transport: Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_flashrl.streaming.server._SILENCE_S", 0.6)
        program = (
            "import sys; from lightning_flashrl.streaming import TransferQueueClient;"
            "client = TransferQueueClient(*sys.argv[1:3], transport=sys.argv[3]);"
            "print(client.lease('t', count=1).rows, flush=True); sys.stdin.read()"
        )
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            command = [sys.executable, "-c", program, server.endpoint, server.secret, transport]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                while not queue.statistics().num_waiting_leases:
                    time.sleep(0.01)
                process.send_signal(signal.SIGSTOP)
                while queue.statistics().num_waiting_leases:
                    time.sleep(0.01)
                [row] = queue.put({"x": [[1]]})
                assert queue.lease("t", count=1, timeout_s=5).rows == (row,)
                [row] = queue.put({"x": [[1]]})
                process.send_signal(signal.SIGCONT)
                assert process.stdout is not None
                assert process.stdout.readline() == f"({row},)\n".encode()
                assert process.stdin is not None
                process.stdin.close()

    def test_what_a_client_had_leased_goes_back_when_it_says_goodbye(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            rows = queue.put({"x": [[1]]})
            with TransferQueueClient(server.endpoint, server.secret) as client:
                client.lease("t", count=1)
            assert queue.lease("t", count=1, timeout_s=10).rows == rows

    def test_what_a_silent_client_had_begun_is_given_up(self) -> None:
        queue = TransferQueue(FIELDS, ["t"], lease_timeout_s=1)
        with queue, TransferQueueServer(queue, session_timeout_s=0.5) as server:
            client = TransferQueueClient(server.endpoint, server.secret, transport="socket")
            rows = client.put({"x": [[1]]})
            client.lease("t", count=1)
            lease = queue.lease("t", count=1, timeout_s=10)
            assert lease.rows == rows
            queue.commit(lease)
            while any(extent.owner != "local" for extent in queue.control._allocators[0].extents()):
                time.sleep(0.01)
            assert client.put({"x": [[2]]})  # elsewhere
            assert queue.lease("t", count=1, timeout_s=10)["x"].unbind()[0].tolist() == [2]
            client.disconnect()

    def test_a_client_on_this_host_may_be_silent(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue, session_timeout_s=0.1) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                first = client.put({"x": [[7] * 1000]})
                lease = client.lease("t", count=1)
                time.sleep(0.5)
                with TransferQueueClient(server.endpoint, server.secret) as other:
                    second = other.put({"x": [[8] * 1000]})
                    client.put({"x": [[9] * 1000]})
                    assert other.lease("t", count=1).rows == second
                client.commit(lease)
                assert lease.rows == first

    def test_nobody_is_given_rows_who_is_gone(self) -> None:
        """A client is killed while one of its threads has rows and another one waits for some."""
        program = textwrap.dedent("""
            import os, signal, sys, threading, time
            from lightning_flashrl.streaming import TransferQueueClient
            client = TransferQueueClient(*sys.argv[1:])
            client.lease("t", count=2)
            threading.Thread(target=client.lease, args=("t",), kwargs={"count": 1}, daemon=True).start()
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            for _ in range(3):
                rows = queue.put({"x": [[1], [2]]})
                subprocess.run([sys.executable, "-c", program, server.endpoint, server.secret], check=False)
                lease = queue.lease("t", count=2, timeout_s=10)
                assert lease.rows == rows
                queue.commit(lease)

    def test_a_put_that_waits_ends_with_its_client(self) -> None:
        queue = TransferQueue(FIELDS, ["t"], max_rows=1)
        with queue, TransferQueueServer(queue) as server, ThreadPoolExecutor(1) as pool:
            client = TransferQueueClient(server.endpoint, server.secret)
            client.put({"x": [[1]]})
            waiting = pool.submit(client.put, {"x": [[2]]})
            while not queue.control._puts.tickets:
                time.sleep(0.01)
            client.disconnect()
            with pytest.raises((QueueUnavailableError, zmq.ZMQError)):
                waiting.result(20)
            queue.commit(queue.lease("t", count=1))
            with pytest.raises(WouldBlock):
                queue.lease_nowait("t", count=1)
            assert queue.statistics().num_put == 1

    def test_what_a_user_gave_wrongly_hurts_nobody_else(self) -> None:
        class Strict(Sampler):
            def check(self, demand: Any) -> None:
                raise TypeError("never")

        with TransferQueue(FIELDS, {"t": [], "strict": Task([], Strict())}) as queue:
            with TransferQueueServer(queue) as server, TransferQueueClient(server.endpoint, server.secret) as client:
                with pytest.raises(ConfigurationError, match="TypeError: never"):
                    client.lease("strict", count=1)
                with pytest.raises(ConfigurationError, match="types of its arguments"):
                    client.lease("t", count=1, allow_partial="yes")  # type: ignore[arg-type]
                client.put({"x": [[1]]})
                assert len(client.lease("t", count=1)) == 1

    def test_rows_larger_than_a_message_travel_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unit, "_FRAME_BYTES", 1000)
        numbers = [list(range(start, start + 777)) for start in range(5)]
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret, transport="socket") as client:
                client.put({"x": numbers})
                assert [row.tolist() for row in client.lease("t", count=5)["x"].unbind()] == numbers

    def test_storage_units_end_with_the_process_that_made_them(self, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""
            import time, torch
            from lightning_flashrl.streaming import Field, TransferQueue
            queue = TransferQueue({"x": Field(int)}, ["t"], num_storage_units=2)
            queue.put({"x": [1]})
            print(*(process.pid for process in queue.unit_processes), flush=True)
            time.sleep(60)
            """)
        )
        with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            pids = [int(pid) for pid in process.stdout.readline().split()]
            assert len(pids) == 2
            os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for pid in pids:
            os.waitpid(pid, 0)  # orphans are adopted by the test process

    def test_interrupting_a_wait_gives_up_its_place(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                for waiting in (client, queue):
                    signal.signal(signal.SIGALRM, _interrupt)
                    signal.setitimer(signal.ITIMER_REAL, 0.2)
                    with pytest.raises(KeyboardInterrupt):
                        waiting.lease("t", count=1)
                    rows = queue.put({"x": [[1]]})
                    assert queue.lease("t", count=1, timeout_s=10).rows == rows
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class TestClient:
    def test_it_can_be_pickled(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                with pickle.loads(pickle.dumps(client)) as copy:
                    rows = copy.put({"x": [[1]]})
                assert client.lease("t", count=1).rows == rows

    def test_it_may_ask_the_application_beside_the_queue(self) -> None:
        def answer(payload: bytes) -> bytes:
            if not payload:
                raise ValueError("nothing")
            return payload[::-1]

        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                with pytest.raises(ConfigurationError, match="set its answer_call"):
                    client.call(b"abc")
                server.answer_call = answer
                assert client.call(b"abc") == b"cba"
                with pytest.raises(ConfigurationError, match="ValueError: nothing"):
                    client.call(b"")
                assert client.call(b"de") == b"ed"

    def test_a_fork_is_told_to_make_its_own(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                pid = os.fork()
                if not pid:
                    code = 1
                    try:
                        client.statistics()
                    except ConfigurationError as error:
                        code = 0 if "before a fork" in str(error) else 2
                    os._exit(code)
                assert os.waitpid(pid, 0)[1] == 0

    def test_a_taken_port_is_said(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            port = _address(server.endpoint)[1]
            with pytest.raises(ConfigurationError, match=f"cannot listen on tcp://127.0.0.1:{port}"):
                TransferQueueServer(queue, port)

    def test_a_transport_that_is_none_is_said(self) -> None:
        with pytest.raises(ConfigurationError, match="transport='pigeon'"):
            TransferQueueClient("tcp://127.0.0.1:1", "s", transport="pigeon")  # type: ignore[arg-type]

    def test_waits_of_one_thread_do_not_hold_up_another(self) -> None:
        with TransferQueue(FIELDS, ["t"]) as queue, TransferQueueServer(queue) as server:
            with TransferQueueClient(server.endpoint, server.secret) as client:
                with pytest.raises(WouldBlock):
                    client.lease("t", count=1, timeout_s=0.1)
                client.close()
                with pytest.raises(EndOfStream):
                    client.lease("t", count=1)
