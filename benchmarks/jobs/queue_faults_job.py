"""What becomes of rows when a process of a queue is killed. Prints one line of JSON.

queue_faults_job.py SYSTEM consumer|unit|queue [--transport T]
queue_faults_job.py SYSTEM take ADDRESS COUNT                       be the consumer that is killed
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from queue_job import FIELDS, SYSTEMS, rows

NUM_ROWS, TAKEN = 32, 8
WAIT_S = 60.0
PART = "faults"


def attempt(call: Callable[[], int]) -> dict[str, Any]:
    """Call with a bound; say how many rows it got, or which error, and after how long."""
    found: dict[str, Any] = {"outcome": "hangs"}

    def run() -> None:
        try:
            found.update(outcome="rows", rows=call())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
            found.update(outcome="error", error=f"{type(error).__name__}: {str(error)[:120]}")

    thread = threading.Thread(target=run, daemon=True)
    begin = time.perf_counter()
    thread.start()
    thread.join(WAIT_S)
    return {**found, "after_s": round(time.perf_counter() - begin, 2)}


def count_rows(queue: Any, limit: int) -> int:
    """Get rows one by one until there are none for some seconds."""
    found = 0
    while found < limit and take(queue, 1, 5.0):
        found += 1
    return found


def take(queue: Any, count: int, timeout_s: float) -> bool:
    """Get rows if there are any in time."""
    if queue.polls:
        deadline = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline:
            meta = queue._client.get_meta(list(FIELDS), count, PART, task_name="train")
            if meta.size:
                queue._client.get_data(meta)
                return True
            time.sleep(0.01)
        return False
    from lightning_flashrl.errors import WouldBlock

    try:
        queue._client.commit(queue._client.lease("train", count=count, timeout_s=timeout_s))
    except WouldBlock:
        return False
    return True


def be_consumer(system: str, address: str, count: int) -> None:
    queue = SYSTEMS[system](address)
    if queue.polls:
        meta = queue._client.get_meta(list(FIELDS), count, PART, task_name="train")
        queue._client.get_data(meta)
    else:
        queue._client.lease("train", count=count)
    print("taken", flush=True)
    signal.pause()


def kill_consumer(system: str, address: str) -> None:
    command = [sys.executable, __file__, system, "take", address, str(TAKEN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "taken" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()


def kill_named(names: tuple[str, ...]) -> int:
    """Kill processes whose command lines have one of these; return how many."""
    victims = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if any(name in line for name in names) and process.pid != os.getpid():
            victims.append(process)
    for process in victims:
        process.kill()
    return len(victims)


SERVER = """
import sys
import torch
from lightning_flashrl.streaming import Field, TransferQueue, TransferQueueServer

port, secret, journal = sys.argv[1:]
fields = {"prompt": Field(torch.int64, (None,)), "response": Field(torch.int64, (None,))}
fields |= {"logprobs": Field(torch.float32, (None,)), "never": Field(int)}
with TransferQueue(fields, {"train": list(fields)[:3]}, num_storage_units=2, secret=secret, journal=journal) as queue:
    with TransferQueueServer(queue, int(port)):
        print("ready", flush=True)
        sys.stdin.read()
"""


class FlashHome:
    """Our queue's process, started again when it dies, as a run's rank 0 does."""

    def __init__(self, folder: str) -> None:
        from lightning_flashrl.supervisor.service import free_port

        self._arguments = [str(free_port()), "of this benchmark", str(Path(folder) / "journal")]
        self.address = f"tcp://127.0.0.1:{self._arguments[0]} {self._arguments[1].replace(' ', '_')}"
        self._arguments[1] = self._arguments[1].replace(" ", "_")
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, *self._arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure_flash(system: str, fault: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        home = FlashHome(folder)
        queue = SYSTEMS[system](home.address)
        queue.put(rows(NUM_ROWS, 1), PART)
        if fault == "consumer":
            kill_consumer(system, home.address)
        elif fault == "unit":
            for child in psutil.Process(home.process.pid).children():
                child.kill()
        else:
            home.kill()
            threading.Thread(target=home.start).start()
        result = {"fault": fault, **attempt(lambda: count_rows(queue, NUM_ROWS))}
        home.kill()
    return result


def measure_peer(system: str, fault: str) -> dict[str, Any]:
    with SYSTEMS[system].serving() as (address, _):
        queue = SYSTEMS[system](address)
        queue.put(queue.prepare(rows(NUM_ROWS, 1)), PART)
        if fault == "consumer":
            kill_consumer(system, address)
        else:
            names = ("ray::SimpleStorageUnit",) if fault == "unit" else ("ray::TransferQueueController",)
            assert kill_named(names), f"no process of {names}"
        result = {"fault": fault, **attempt(lambda: count_rows(queue, NUM_ROWS))}
        print(json.dumps(result), flush=True)
        os._exit(0)  # what is left of it may hang


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("fault", choices=["consumer", "unit", "queue", "take"])
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fault == "take":
        be_consumer(options.system, options.rest[0], int(options.rest[1]))
    elif options.system == "transferqueue":
        measure_peer(options.system, options.fault)
    else:
        print(json.dumps(measure_flash(options.system, options.fault)), flush=True)


if __name__ == "__main__":
    main()
