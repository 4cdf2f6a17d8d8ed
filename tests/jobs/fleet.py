"""A fleet of one role, until standard input ends; says what is known of its workers, a line of JSON now and then."""

from __future__ import annotations

import json
import select
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from lightning_flashrl.engines.fleet import Succession, Team, WorkerFleet
from lightning_flashrl.engines.process import POLICY, Begin, Job, Surroundings
from lightning_flashrl.engines.worker import WorkerStatistics
from lightning_flashrl.engines.worker_process import WorkerRecord
from lightning_flashrl.streaming import QueueVerbs
from lightning_flashrl.weights import WeightReceiver, WeightsAddress, keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Count(Job):
    """Counts, and leaves the queue alone."""

    role: ClassVar[str] = "counter"
    gate: str = ""

    def prepare(self) -> None:
        """Wait until the gate is there."""
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.01)

    def run(
        self,
        prepared: Any,
        queue: QueueVerbs,
        weights: Mapping[str, WeightsAddress],
        begin: Begin,
        stop: threading.Event,
    ) -> None:
        for address in weights.values():
            WeightReceiver(address).close()
        statistics = WorkerStatistics()
        begin(statistics)
        while not stop.wait(0.01):
            statistics.num_completions += 1


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    weights = {POLICY: keep(msgspec.convert(told["weights"], WeightsAddress))} if told["weights"] else {}
    surroundings = Surroundings(told["endpoint"], told["secret"], weights)
    before = msgspec.convert(told["before"], list[WorkerRecord])
    succession = Succession(told["name"], told["keeper_pid"], before)
    with WorkerFleet(
        Team.of(Count(gate=told["gate"]), told["num_workers"]), surroundings, Path(told["log_dir"]), None, succession
    ) as fleet:
        while not select.select([sys.stdin], [], [], 0.05)[0]:
            view = {"records": fleet.records(), "num_replaced": fleet.num_replaced}
            print(msgspec.json.encode(view).decode(), flush=True)
    print(msgspec.json.encode({"records": fleet.records(), "num_replaced": fleet.num_replaced}).decode(), flush=True)


if __name__ == "__main__":
    main()
