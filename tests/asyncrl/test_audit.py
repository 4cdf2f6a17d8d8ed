"""The auditor finds what it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_flashrl.asyncrl.audit import audit
from lightning_flashrl.asyncrl.recording import StepRecord
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import Batch, Lease, Ragged


def write(
    folder: Path, steps: dict[int, list[tuple[list[int], list[int], list[int]]]], told: list[int] | None = None
) -> None:
    """Write a run: rows, groups and versions of each rank's micro-batch, by step."""
    for version, ranks in steps.items():
        for rank, (rows, groups, versions) in enumerate(ranks):
            record = StepRecord(folder / "record", rank, len(ranks))
            record.begin()
            sampled = Ragged.of([torch.tensor([oldest, oldest + 1]) for oldest in versions])
            batch = Batch({"prompt.group_id": groups, "response.versions": sampled})
            record.write(version, [Lease(0, "update", tuple(rows), batch, 0.0, 0.0)])
    lines = [
        {"kind": "step", "step": version + 1, "rows": told[index] if told else sum(len(rows) for rows, _, _ in ranks)}
        for index, (version, ranks) in enumerate(steps.items())
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


GOOD = {
    0: [([0, 1], [0, 0], [0, 0]), ([2, 3], [1, 1], [0, 0])],
    1: [([4, 5], [2, 2], [0, 1]), ([6, 7], [3, 3], [1, 1])],
}


def test_a_run_in_which_all_is_well(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    found = audit(tmp_path, 1)
    assert (found.num_steps, found.num_rows, found.staleness_max, found.faults) == (2, 8, 1, [])


def _twice(run: dict[int, list[tuple[list[int], list[int], list[int]]]]) -> None:
    run[1][0] = ([4, 3], [2, 2], [0, 1])


def _late(run: dict[int, list[tuple[list[int], list[int], list[int]]]]) -> None:
    run[2] = [([8, 9], [4, 4], [0, 2])]


def _cut(run: dict[int, list[tuple[list[int], list[int], list[int]]]]) -> None:
    run[1][1] = ([6, 7], [3, 1], [1, 1])


def _missing(run: dict[int, list[tuple[list[int], list[int], list[int]]]]) -> None:
    run[3] = [([8, 9], [4, 4], [3, 3])]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_twice, "1 rows were trained more than once: 3"),
        (_late, "step 2 trained row 8, which was sampled under version 0"),
        (_cut, "1 prompt groups were cut over several steps: 1"),
        (_missing, "steps are missing: 2"),
    ],
)
def test_what_should_not_be_is_found(tmp_path: Path, spoil: Callable[[object], None], said: str) -> None:
    run = {version: [*ranks] for version, ranks in GOOD.items()}
    spoil(run)
    write(tmp_path, run)
    assert audit(tmp_path, 1).faults == [said]


def test_rows_of_which_only_the_history_tells_are_missed(tmp_path: Path) -> None:
    write(tmp_path, GOOD, told=[4, 6])
    assert audit(tmp_path).faults == ["the history tells of 10 trained rows, the record has 8"]
    with pytest.raises(ConfigurationError, match="holds no steps"):
        audit(tmp_path / "elsewhere")


def test_a_row_that_was_put_and_is_nowhere_is_missed(tmp_path: Path) -> None:
    write(tmp_path, {0: GOOD[0], 1: [([4, 5], [2, 2], [0, 1]), ([8, 9], [4, 4], [1, 1])]})
    assert audit(tmp_path, 1).faults == []  # the run has not ended: they may come
    (tmp_path / "summary.json").write_text(json.dumps({"rows_dropped": 0, "rows_left": 0}))
    assert audit(tmp_path, 1).faults == ["2 rows are missing: 6, 7"]
    (tmp_path / "summary.json").write_text(json.dumps({"rows_dropped": 2, "rows_left": 0}))
    assert audit(tmp_path, 1).faults == []
