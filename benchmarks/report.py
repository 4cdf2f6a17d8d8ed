"""What all benchmarks write: where and when a figure was taken, and its spread."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some figures."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """``None`` where nothing was measured."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known), len(known)) if known else None

    def show(self, digits: int = 2) -> str:
        text = f"{self.median:.{digits}f}"
        return text if self.count == 1 else f"{text} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def show(spread: Spread | None, digits: int = 2, missing: str = "–") -> str:
    return missing if spread is None else spread.show(digits)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def save(name: str, path: Path | None, result: dict[str, Any]) -> None:
    """Write a result with its date, command and machine."""
    path = path or RESULTS / f"{name}.json"
    facts = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "lightning": importlib.metadata.version("lightning"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | result, indent=2) + "\n")
