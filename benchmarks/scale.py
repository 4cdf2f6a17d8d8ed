"""How long the decision takes in a job of up to 100,000 ranks.

The real controller, planner and guarded sockets of ``flashrun``, against simulated agents (one per 8 ranks, one
connection each, no torch anywhere). Measured: from the moment an agent reports a dead rank to the moment the last agent
of the job has the plan. Before that every agent hears of the new quorum and sends the reports of its ranks.

A plan needs the report of the replacement, which exists only once it was born. So each size is measured twice: with a
replacement that reports at once (``controller``: what the controller and the messages cost) and with one that needs
``--birth-ms`` (``job``: what a job waits; survivors' reports are taken in meanwhile). A replacement forked from standby
reports 45 to 60 ms after the death in a Lightning job of three ranks on two cores.

Everything runs on this one machine: all simulated agents share its cores with the controller, so the figures are upper
bounds for the controller's part and contain no network.

    python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from rich.console import Console
from rich.table import Table

from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.controller import JobSettings
from lightning_flashrl.supervisor.protocol import Failure, LostRank
from lightning_flashrl.supervisor.service import ControllerService, free_port
from lightning_flashrl.types import RankReport, ResumeKind, ResumePoint

RANKS_PER_NODE = 8
SIZES = (32, 128, 512, 1024, 2048, 4800, 10_000, 25_000, 50_000, 100_000)
KEYS = JobKeys.derive("benchmark")
VICTIM = 5
AGENTS_PER_WAVE = 100


# --------------------------------------------------------------------------- simulated agents
def reports_of(node_rank: int, quorum_id: int) -> bytes:
    point = ResumePoint(ResumeKind.COMMIT, batch=8, version=8, seqs={"default": 40, "metrics": 3}, buffer=0)
    reports = tuple(
        RankReport(rank, quorum_id, True, resume_points=(point,))
        if rank == VICTIM
        else RankReport(rank, quorum_id, False, first_incomplete={"default": 41, "metrics": 3}, version=8)
        for rank in range(node_rank * RANKS_PER_NODE, (node_rank + 1) * RANKS_PER_NODE)
    )
    return protocol.encode(protocol.NodeReports(quorum_id, reports))


def simulate_agents(port: int, first: int, last: int) -> None:
    """Serve the nodes ``first`` … ``last - 1``; commands on stdin, times on stdout."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 60_000)
    sockets: list[zmq.Socket[bytes]] = []
    for node_rank in range(first, last):
        sock = context.socket(zmq.DEALER)
        sock.linger = 0
        sock.sndhwm = sock.rcvhwm = 0
        KEYS.guard_client(sock)
        sock.connect(f"tcp://127.0.0.1:{port}")
        sock.send(protocol.encode(protocol.AgentHello(node_rank, RANKS_PER_NODE, "simulated")))
        sockets.append(sock)
        if len(sockets) % AGENTS_PER_WAVE == 0:
            time.sleep(0.05)
    for sock in sockets:
        assert isinstance(protocol.decode_to_agent(sock.recv()), protocol.Launch)
    say({"is_ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        say(one_recovery(sockets, first, command["quorum_id"], command["birth_s"]))
    for sock in sockets:
        sock.close()
    context.term()


def one_recovery(sockets: list[zmq.Socket[bytes]], first: int, quorum_id: int, birth_s: float) -> dict[str, int]:
    nodes = range(first, first + len(sockets))
    reports = [reports_of(node_rank, quorum_id) for node_rank in nodes]
    restored = [
        protocol.encode(
            protocol.NodeRestored(
                quorum_id, tuple(range(node_rank * RANKS_PER_NODE, (node_rank + 1) * RANKS_PER_NODE)), {"redo": 1.0}
            )
        )
        for node_rank in nodes
    ]
    is_victims = first == 0
    time.sleep(0.3)  # all simulations are prepared
    began_ns = time.monotonic_ns()
    if is_victims:
        lost = Failure(LostRank(VICTIM, "killed by SIGKILL", began_ns), 137)
        sockets[0].send(protocol.encode(protocol.RanksFailed((lost,))))
    for sock, report in reversed(list(zip(sockets, reports, strict=True))):
        sock.recv()
        if is_victims and sock is sockets[0]:
            time.sleep(max(0.0, birth_s - (time.monotonic_ns() - began_ns) / 1e9))
        sock.send(report)
    for sock in sockets:
        payload = sock.recv()
    ended_ns = time.monotonic_ns()
    message = protocol.decode_to_agent(payload)
    assert isinstance(message, protocol.PlanReady)
    assert message.plan.donors == {VICTIM: 0}
    for sock, done in zip(sockets, restored, strict=True):
        sock.send(done)
    for sock in sockets:
        assert isinstance(protocol.decode_to_agent(sock.recv()), protocol.RecoveryRecord)
    return {"began_ns": began_ns if is_victims else 0, "ended_ns": ended_ns}


def say(message: dict[str, object] | dict[str, int]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


# --------------------------------------------------------------------------- the controller's side
class Simulation:
    """A controller in this process, agents in others."""

    def __init__(self, num_ranks: int, num_processes: int) -> None:
        num_nodes = num_ranks // RANKS_PER_NODE
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._loop = EventLoop()
        port = free_port()
        settings = JobSettings(num_nodes=num_nodes, uses_flash=True, max_restarts=1_000_000)
        self._service = ControllerService(
            self._context, self._loop, settings, lambda _: None, endpoint=f"tcp://127.0.0.1:{port}", keys=KEYS
        )
        bounds = [round(i * num_nodes / num_processes) for i in range(num_processes + 1)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--agents", str(port), str(first), str(last)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for first, last in itertools.pairwise(bounds)
            if last > first
        ]
        self._answers: list[dict[str, int]] = []
        for process in self._processes:
            assert process.stdout is not None
            fd = process.stdout.fileno()
            self._loop.add_reader(fd, self._reader(fd))
        self._gather()

    def _reader(self, fd: int) -> Callable[[], None]:
        def read() -> None:
            data = os.read(fd, 4096)
            assert data, "a simulation ended"
            self._answers.append(json.loads(data))

        return read

    def _gather(self) -> list[dict[str, int]]:
        self._loop.run_until(lambda: len(self._answers) == len(self._processes))
        answers, self._answers = self._answers, []
        return answers

    def measure_ms(self, birth_s: float) -> float:
        command = {"quorum_id": self._service.controller.quorum_id + 1, "birth_s": birth_s}
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        answers = self._gather()
        return (max(a["ended_ns"] for a in answers) - max(a["began_ns"] for a in answers)) / 1e6

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        self._service.close()
        self._context.term()


def main() -> None:
    parser = argparse.ArgumentParser(description="How long the decision takes in a job of up to 100,000 ranks.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--birth-ms", type=float, default=50.0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    parser.add_argument("--agents", type=int, nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.agents is not None:
        simulate_agents(*arguments.agents)
        return
    rows = []
    for num_ranks in arguments.sizes:
        simulation = Simulation(num_ranks, num_processes=2)
        simulation.measure_ms(0.0)  # the first one warms up
        bare = [simulation.measure_ms(0.0) for _ in range(arguments.repeats)]
        born = [simulation.measure_ms(arguments.birth_ms / 1000) for _ in range(arguments.repeats)]
        simulation.close()
        rows.append(
            {
                "ranks": num_ranks,
                "agents": num_ranks // RANKS_PER_NODE,
                "controller_ms": round(statistics.median(bare), 2),
                "controller_max_ms": round(max(bare), 2),
                "job_ms": round(statistics.median(born), 2),
                "job_max_ms": round(max(born), 2),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    show(rows, arguments.birth_ms)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "scale", "birth_ms": arguments.birth_ms, "repeats": arguments.repeats, "rows": rows}
    arguments.json.write_text(json.dumps(result | {"cpus": os.cpu_count()}, indent=2) + "\n")


def show(rows: list[dict[str, float]], birth_ms: float) -> None:
    table = Table(title="failure report → last agent has the plan, ms (median, worst)")
    for column in ("ranks", "agents", "controller", "worst", f"job ({birth_ms:g} ms birth)", "worst", "× of smallest"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['ranks']:,}",
            f"{row['agents']:,}",
            f"{row['controller_ms']:.1f}",
            f"{row['controller_max_ms']:.1f}",
            f"{row['job_ms']:.1f}",
            f"{row['job_max_ms']:.1f}",
            f"{row['job_ms'] / rows[0]['job_ms']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
