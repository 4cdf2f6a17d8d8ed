"""One queue put through its paces, in the environment of whoever made it. Prints one JSON object at the end.

python queue_job.py flash|flash-journal|flash-socket|transferqueue [--quick]

Producers and consumers are processes of their own, the queue and its storage units too, whatever the system. All
systems get the same rows from the same loops; `Flash` and `Peer` only translate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
PROMPT, RESPONSE = 256, 1024
FIELDS = ("prompt", "response", "logprobs")
_POLL_S = 0.002


def rows(count: int, seed: int, prompt: int = PROMPT, response: int = RESPONSE) -> dict[str, list[torch.Tensor]]:
    """Rows of the real shape unless said: 2 kB, 8 kB and 4 kB."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "prompt": [torch.randint(0, 32000, (prompt,), generator=draw) for _ in range(count)],
        "response": [torch.randint(0, 32000, (response,), generator=draw) for _ in range(count)],
        "logprobs": [torch.randn(response, generator=draw) for _ in range(count)],
    }


class Flash:
    """lightning_flashrl: a server process, one storage unit process, a client here."""

    polls = False
    serve = "serve"

    def __init__(self, address: str, transport: str = "auto") -> None:
        from lightning_flashrl.streaming import TransferQueueClient

        endpoint, secret = address.split()
        self._client = TransferQueueClient(endpoint, secret, transport=transport)  # type: ignore[arg-type]

    @classmethod
    @contextlib.contextmanager
    def serving(cls) -> Any:
        with subprocess.Popen(
            [sys.executable, __file__, cls.serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.pid
            process.stdin.close()

    def prepare(self, data: dict[str, list[torch.Tensor]]) -> Any:
        return data

    def put(self, data: Any, _part: str) -> None:
        self._client.put(data)

    def get(self, count: int, _part: str, task: str = "train") -> int:
        lease = self._client.lease(task, count=count)
        self._client.commit(lease)
        return sum(len(lease[name].values) for name in FIELDS)

    def wait_for_nothing(self, part: str) -> None:
        self._client.lease("train", ["never"], count=1)

    def clear(self, _part: str) -> None:
        self._client.clear()


class FlashWithJournal(Flash):
    """The same, with every change written to a file before it counts, rows included."""

    serve = "serve-journal"


class FlashOverSockets(Flash):
    """The same, with rows over sockets too, as from another host."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "socket")


class Peer:
    """The published transferqueue package: a controller and two storage units, as Ray actors."""

    polls = True

    def __init__(self, _address: str) -> None:
        import transfer_queue

        transfer_queue.init()
        self._client = transfer_queue.get_client()

    @staticmethod
    @contextlib.contextmanager
    def serving() -> Any:
        os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0", TQ_LOGGING_LEVEL="ERROR")
        import ray
        import transfer_queue
        from omegaconf import OmegaConf

        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        settings = {
            "controller": {"polling_mode": True},
            "backend": {"SimpleStorage": {"num_data_storage_units": 2}},
        }
        transfer_queue.init(OmegaConf.create(settings, flags={"allow_objects": True}))
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        yield os.environ["RAY_ADDRESS"], os.getpid()
        transfer_queue.close()
        ray.shutdown()

    def prepare(self, data: dict[str, list[torch.Tensor]]) -> Any:
        from tensordict import TensorDict

        def jagged(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

        return TensorDict({name: jagged(column) for name, column in data.items()}, batch_size=len(data["prompt"]))

    def put(self, data: Any, part: str) -> None:
        self._client.put(data, partition_id=part)

    def get(self, count: int, part: str, task: str = "train") -> int:
        while True:
            meta = self._client.get_meta(list(FIELDS), count, part, task_name=task)
            if meta.size:
                break
            time.sleep(_POLL_S)
        data = self._client.get_data(meta)
        return sum(data[name].values().numel() for name in FIELDS)

    def wait_for_nothing(self, part: str) -> None:
        while not self._client.get_meta(["never"], 1, part, task_name="never").size:
            time.sleep(_POLL_S)

    def clear(self, part: str) -> None:
        self._client.clear_partition(part)


SYSTEMS: dict[str, type[Any]] = {
    "flash": Flash,
    "flash-journal": FlashWithJournal,
    "flash-socket": FlashOverSockets,
    "transferqueue": Peer,
}


# --------------------------------------------------------------------------- measuring
def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def quantiles(times_s: list[float]) -> dict[str, float]:
    times_s = sorted(times_s)
    at = lambda share: times_s[min(len(times_s) - 1, round(share * (len(times_s) - 1)))] * 1e3  # noqa: E731
    return {"n": len(times_s), "p50_ms": at(0.5), "p99_ms": at(0.99)}


def bulk(queue: Any, count: int, repeats: int) -> dict[str, float]:
    """Rows a second of one client that puts and then gets a batch."""
    puts, gets = [], []
    expected = count * (PROMPT + 2 * RESPONSE)
    data = queue.prepare(rows(count, 1))
    for number in range(repeats):
        part = f"bulk{count}_{number}"
        puts.append(timed(lambda part=part: queue.put(data, part)))
        begin = time.perf_counter()
        got = queue.get(count, part)
        gets.append(time.perf_counter() - begin)
        assert got == expected
        queue.clear(part)
    put, get = quantiles(puts), quantiles(gets)
    return {"put_rows_s": count / put["p50_ms"] * 1e3, "get_rows_s": count / get["p50_ms"] * 1e3, "n": repeats}


def resident(queue: Any, num_rows: int, limit_s: float) -> dict[str, float] | None:
    """Time of a micro-batch of 32 small rows while so many are there; ``None`` if filling takes too long."""
    part = f"resident{num_rows}"
    batch = min(num_rows, 4096)
    data = queue.prepare(rows(batch, 2, 4, 8))
    begin = time.perf_counter()
    for _ in range(0, num_rows, batch):
        queue.put(data, part)
        if time.perf_counter() - begin > limit_s:
            queue.clear(part)
            return None
    times = [timed(lambda: queue.get(32, part)) for _ in range(min(200, num_rows // 64))]
    queue.clear(part)
    return quantiles(times)


def _produce(system: str, address: str, count: int, batch: int, part: str, gate: Any, out: Any) -> None:
    torch.set_num_threads(1)
    queue = SYSTEMS[system](address)
    data = queue.prepare(rows(batch, os.getpid()))
    queue.put(data, "warm")
    gate.wait()
    times = [timed(lambda: queue.put(data, part)) for _ in range(count // batch)]
    out.put(times)


def _consume(system: str, address: str, count: int, batch: int, part: str, gate: Any, out: Any) -> None:
    torch.set_num_threads(1)
    queue = SYSTEMS[system](address)
    gate.wait()
    for _ in range(count // batch):
        queue.get(batch, part)
    out.put([])


def _wait(system: str, address: str, part: str, gate: Any) -> None:
    torch.set_num_threads(1)
    queue = SYSTEMS[system](address)
    gate.wait()
    queue.wait_for_nothing(part)


def stream(system: str, address: str, pairs: int, count: int) -> float:
    """Rows a second through so many producers and as many consumers at the same time."""
    context = multiprocessing.get_context("spawn")
    gate, out = context.Barrier(2 * pairs + 1), context.Queue()
    arguments = (system, address, count, 32, f"stream{pairs}", gate, out)
    processes = [
        context.Process(target=target, args=arguments) for target in (_produce, _consume) for _ in range(pairs)
    ]
    for process in processes:
        process.start()
    gate.wait()
    begin = time.perf_counter()
    for _ in processes:
        out.get()
    duration_s = time.perf_counter() - begin
    for process in processes:
        process.join()
    return pairs * count / duration_s


def producer_times(system: str, address: str, num_waiting: int, count: int) -> dict[str, float]:
    """Times of a producer's puts of 8 rows while so many consumers wait for what never comes."""
    context = multiprocessing.get_context("spawn")
    gate, out = context.Barrier(num_waiting + 2), context.Queue()
    part = f"waiting{num_waiting}"
    waiting = [context.Process(target=_wait, args=(system, address, part, gate)) for _ in range(num_waiting)]
    producer = context.Process(target=_produce, args=(system, address, count * 8, 8, part, gate, out))
    for process in (*waiting, producer):
        process.start()
    gate.wait()
    times = out.get()
    producer.join()
    for process in waiting:
        process.kill()
        process.join()
    return quantiles(times)


def memcpy_rows_s() -> float:
    """Rows a second of a bare copy in memory: what no queue that copies can pass."""
    data = rows(512, 3)
    source = torch.cat([torch.cat([column.view(torch.uint8) for column in data[name]]) for name in FIELDS])
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(30)]
    return 512 / (quantiles(times)["p50_ms"] / 1e3)


def _send(endpoint: str, num_bytes: int, count: int) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PUSH) as sock:
        sock.connect(endpoint)
        payload = bytes(num_bytes)
        for _ in range(count):
            sock.send(payload, copy=False)


def socket_rows_s() -> float:
    """Rows a second in batches of 32 that one local TCP socket carries, without encryption and without a queue."""
    import zmq

    row_bytes, count = 8 * (PROMPT + RESPONSE) + 4 * RESPONSE, 400
    with zmq.Context() as context, context.socket(zmq.PULL) as sock:
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        sender = multiprocessing.get_context("spawn").Process(
            target=_send, args=(f"tcp://127.0.0.1:{port}", 32 * row_bytes, count)
        )
        sender.start()
        sock.recv(copy=False)
        begin = time.perf_counter()
        for _ in range(count - 1):
            sock.recv(copy=False)
        duration_s = time.perf_counter() - begin
        sender.join()
    return 32 * (count - 1) / duration_s


def serve(journal: Path | None) -> None:
    """Be the server process of lightning_flashrl."""
    from lightning_flashrl.streaming import Field, TransferQueue, TransferQueueServer

    fields = {
        "prompt": Field(torch.int64, (None,)),
        "response": Field(torch.int64, (None,)),
        "logprobs": Field(torch.float32, (None,)),
        "never": Field(int),
    }
    with (
        TransferQueue(fields, {"train": FIELDS}, num_storage_units=1, journal=journal) as queue,
        TransferQueueServer(queue) as server,
    ):
        print(server.endpoint, server.secret, flush=True)
        sys.stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=[*SYSTEMS, Flash.serve, FlashWithJournal.serve])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.system == Flash.serve:
        serve(None)
        return
    if options.system == FlashWithJournal.serve:
        with tempfile.TemporaryDirectory() as folder:
            serve(Path(folder) / "queue.journal")
        return
    system: str = options.system
    scale = 4 if options.quick else 1
    is_ours = system != "transferqueue"
    with SYSTEMS[system].serving() as (address, _pid):
        queue = SYSTEMS[system](address)
        bulk(queue, 64, 60)  # memory is touched, caches are warm
        result: dict[str, Any] = {
            "bulk": {count: bulk(queue, count, repeats // scale) for count, repeats in ((1, 400), (64, 80), (512, 24))},
            "resident": {
                count: resident(queue, count, 60.0 / scale)
                for count in (512, 4096, 65_536, 1_000_000)
                if is_ours or count <= 65_536
            },
            "stream_rows_s": {pairs: stream(system, address, pairs, 8192 // scale) for pairs in (1, 2)},
            "producer": {waiting: producer_times(system, address, waiting, 400 // scale) for waiting in (0, 4)},
        }
    if system == "flash":
        result["memcpy_rows_s"] = memcpy_rows_s()
        result["socket_rows_s"] = socket_rows_s()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
