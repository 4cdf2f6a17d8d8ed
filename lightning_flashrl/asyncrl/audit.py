"""A recorded run's rows, checked one by one from its files alone: nothing of the run's own books is believed."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_flashrl.asyncrl.history import read_history, read_kills
from lightning_flashrl.errors import ConfigurationError

_UPDATE = "update"
_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Audit:
    """What the files of a run say of its rows.

    Attributes:
        num_steps: steps in the record.
        num_rows: rows that these trained.
        num_kills: processes that were killed on purpose.
        staleness_max: of a trained row: the step's version minus the oldest version that its tokens were sampled under.
        faults: what should not be, each in a sentence; empty if all is well.
    """

    num_steps: int
    num_rows: int
    num_kills: int
    staleness_max: int
    faults: list[str] = field(default_factory=list)


def audit(output_dir: Path, max_staleness: int | None = None) -> Audit:
    """Check that each step of a recorded run trained its rows once, in whole prompt groups, and none too late.

    Args:
        output_dir: of a run with ``record=true``.
        max_staleness: the bound; ``None`` to check none.

    Raises:
        ConfigurationError: the run was not recorded.
    """
    record = output_dir / "record"
    steps = sorted(record.glob("step-*"))
    if not steps:
        raise ConfigurationError(f"{record} holds no steps; give the folder of a run with record=true")
    faults: list[str] = []
    rows: collections.Counter[int] = collections.Counter()
    groups: dict[int, set[int]] = collections.defaultdict(set)
    versions = [int(re.sub(r"\D", "", step.name)) for step in steps]
    stalest = 0
    for version, step in zip(versions, steps, strict=True):
        in_step = 0
        for row, group, oldest in _trained(step):
            rows[row] += 1
            groups[group].add(version)
            in_step += 1
            stalest = max(stalest, version - oldest)
            if max_staleness is not None and version - oldest > max_staleness:
                faults.append(f"step {version} trained row {row}, which was sampled under version {oldest}")
        if not in_step:
            faults.append(f"step {version} trained nothing")
    expected = list(range(versions[0], versions[0] + len(versions)))
    if versions != expected:
        faults.append(f"steps are missing: {_some(sorted(set(range(versions[0], versions[-1])) - set(versions)))}")
    _add(faults, "rows were trained more than once", [row for row, count in rows.items() if count > 1])
    _look_for_missing(output_dir, rows, faults)
    _add(faults, "prompt groups were cut over several steps", [g for g, where in groups.items() if len(where) > 1])
    _compare_with_history(output_dir, versions, sum(rows.values()), faults)
    return Audit(len(steps), sum(rows.values()), len(read_kills(output_dir)), stalest, faults)


def _trained(step: Path) -> list[tuple[int, int, int]]:
    """Return row, group and oldest version of each row that all ranks trained in a step."""
    found = []
    for path in sorted(step.glob("rank-*.pt")):
        for task, rows, columns in torch.load(path, weights_only=True):
            if task == _UPDATE:
                found += list(zip(rows, columns["prompt.group_id"], _oldest(columns), strict=True))
    return found


def _oldest(columns: dict[str, Any]) -> list[int]:
    values, lengths = columns["response.versions"]
    return [int(part.min()) for part in values.split(lengths.tolist())]


def _compare_with_history(output_dir: Path, versions: list[int], num_rows: int, faults: list[str]) -> None:
    steps, _ = read_history(output_dir)
    told = [int(step["step"]) for step in steps]
    if told != [version + 1 for version in versions]:
        faults.append(f"the history tells of {len(told)} steps, up to {told[-1] if told else 0}, the record of others")
    counted = int(sum(step["rows"] for step in steps))
    if counted != num_rows:
        faults.append(f"the history tells of {counted} trained rows, the record has {num_rows}")


def _look_for_missing(output_dir: Path, rows: Iterable[int], faults: list[str]) -> None:
    """Rows are numbered as they are put: each is trained, or left out on purpose, or still in the queue at the end."""
    known = set(rows)
    missing = sorted(set(range(min(known, default=0), max(known, default=0))) - known)
    path = output_dir / "summary.json"
    if missing and path.exists():
        summary = json.loads(path.read_text())
        if len(missing) > summary["rows_dropped"] + summary["rows_left"]:
            _add(faults, "rows are missing", missing)


def _add(faults: list[str], what: str, numbers: list[int]) -> None:
    if numbers:
        faults.append(f"{len(numbers)} {what}: {_some(numbers)}")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_MOST_SHOWN])) + (", …" if len(numbers) > _MOST_SHOWN else "")
