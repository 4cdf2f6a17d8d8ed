"""What becomes of rows when a process of a queue is killed, beside the published transferqueue package.

python benchmarks/queue_faults.py

32 rows are put; then a consumer that has taken 8 of them is killed, or all storage units, or the queue's own process
(ours: the next one is started from the journal). Another consumer asks for all rows: how many does it get, or which
error, or nothing for a minute?
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers import TRANSFER_QUEUE
from report import save
from rich.console import Console
from rich.table import Table

JOB = Path(__file__).resolve().parent / "jobs" / "queue_faults_job.py"
FAULTS = {"consumer": "a consumer with 8 rows", "unit": "all storage units", "queue": "the queue's process"}
_TIMEOUT_S = 300


def run(system: str, python: str, fault: str) -> dict[str, Any]:
    """One kill."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, str(JOB), system, fault]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{system}, {fault}: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def told(result: dict[str, Any]) -> str:
    match result["outcome"]:
        case "rows":
            return f"{result['rows']} of 32 rows in {result['after_s']} s"
        case "error":
            return f"{result['error']} after {result['after_s']} s"
    return f"nothing in {result['after_s']:.0f} s"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    systems = {"flash": sys.executable, "flash-socket": sys.executable, "transferqueue": str(TRANSFER_QUEUE.python)}
    found = {name: {fault: run(name, python, fault) for fault in FAULTS} for name, python in systems.items()}
    table = Table("who is killed", "shared memory", "sockets", "TransferQueue 0.1.11")
    for fault, who in FAULTS.items():
        table.add_row(who, *(told(results[fault]) for results in found.values()))
    Console(width=150).print(table)
    save("queue_faults", None, {"found": found})


if __name__ == "__main__":
    main()
