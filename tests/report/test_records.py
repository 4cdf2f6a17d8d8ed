"""What a run left behind, read back: torn lines, repeated steps, overtaken recoveries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightning_flashrl.report import Recovery, Step, read_recoveries, read_steps
from lightning_flashrl.report.records import STAGES, absences
from lightning_flashrl.supervisor.protocol import RecoveryRecord

RECORD: dict[str, Any] = {
    "quorum_id": 1,
    "lost": [1],
    "reasons": {"1": "killed by SIGKILL"},
    "donors": {"1": 0},
    "plan_reason": "rank 1 enters at commit of batch 8 with state of rank 0",
    "timings_ms": {"detect": 100.0, "report": 200.0, "rendezvous": 50.0, "transfer": 150.0, "total": 900.0},
    "is_complete": True,
    "wall_s": 1001.0,
}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def recovery(**changes: Any) -> Recovery:
    lost = changes.get("lost", (1,))
    values: dict[str, Any] = {
        "quorum_id": 1,
        "lost": lost,
        "reasons": dict.fromkeys(lost, "killed by SIGKILL"),
        "donors": dict.fromkeys(lost, 0),
        "plan": "",
        "timings_ms": {"total": 1000.0},
        "is_complete": True,
        "wall_s": 10.0,
    }
    return Recovery(**(values | changes))


def test_a_step_that_was_written_again_counts_once_when_it_was_first_there(tmp_path: Path) -> None:
    path = write(
        tmp_path / "progress.jsonl",
        {"step": 1, "loss": 5.0, "wall_s": 10.0},
        {"step": 2, "loss": 4.0, "wall_s": 11.0},
        {"step": 2, "loss": 4.0, "wall_s": 13.0},
        {"step": 3, "loss": 3.0, "wall_s": 14.0},
    )
    assert read_steps(path) == [Step(1, 5.0, 10.0), Step(2, 4.0, 11.0), Step(3, 3.0, 14.0)]


def test_lines_about_supervisors_are_no_recoveries(tmp_path: Path) -> None:
    path = write(tmp_path / "recovery.jsonl", RECORD, RECORD | {"lost": [], "reasons": {}, "donors": {}})
    assert [found.lost for found in read_recoveries(path)] == [(1,)]


def test_lines_that_a_killed_process_left_unfinished_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "p", '{"step": 1, "lo{"step": 2, "loss": 4.0, "wall_s": 1.0}', "7", '{"step": 3', "")
    assert read_steps(path) == []
    assert read_steps(write(path, {"step": 1, "loss": 1.0, "wall_s": 2.0}, '{"step"')) == [Step(1, 1.0, 2.0)]


def test_files_that_are_not_there_yet_are_empty(tmp_path: Path) -> None:
    assert read_steps(tmp_path / "none") == []
    assert read_recoveries(tmp_path / "none") == []


def test_recoveries_come_in_the_order_in_which_they_ended(tmp_path: Path) -> None:
    later = RECORD | {"quorum_id": 2, "wall_s": 1010.0}
    found = read_recoveries(write(tmp_path / "recovery.jsonl", later, RECORD))
    assert [recovery.quorum_id for recovery in found] == [1, 2]
    first = found[0]
    assert (first.lost, first.donors, first.cause) == ((1,), {1: 0}, "killed by SIGKILL")
    assert first.duration_ms == 1000.0
    assert first.began_s == 1000.0


def test_every_field_that_the_controller_writes_is_read(tmp_path: Path) -> None:
    record = RecoveryRecord(
        3, (0, 2), {0: "killed by SIGKILL", 2: "hung: x"}, {0: 1, 2: 1}, "why", {"total": 1.0}, True, 5.0
    )
    text = msgspec.json.encode(msgspec.structs.asdict(record)).decode()
    [found] = read_recoveries(write(tmp_path / "recovery.jsonl", text))
    assert found == Recovery(
        3, (0, 2), {0: "killed by SIGKILL", 2: "hung: x"}, {0: 1, 2: 1}, "why", {"total": 1.0}, True, 5.0
    )


@pytest.mark.parametrize(
    "timings_ms",
    [
        {"detect": 100.0, "report": 200.0, "rendezvous": 50.0, "transfer": 150.0, "total": 900.0},
        {"report": 500.0, "rendezvous": 300.0, "transfer": 900.0, "total": 700.0},
        {"total": 3.0},
        {},
    ],
)
def test_stages_add_up_to_the_duration(timings_ms: dict[str, float]) -> None:
    found = recovery(timings_ms=timings_ms)
    stages_ms = found.stages_ms()
    assert tuple(stages_ms) == STAGES
    assert sum(stages_ms.values()) == pytest.approx(found.duration_ms)
    assert min(stages_ms.values()) >= 0


def test_a_rank_is_absent_from_its_loss_until_its_replacement_is_through() -> None:
    recoveries = [recovery(wall_s=10.0), recovery(lost=(2,), wall_s=15.0), recovery(wall_s=20.0)]
    assert absences(recoveries, 1) == [(9.0, 10.0), (19.0, 20.0)]
    assert absences(recoveries, 2) == [(14.0, 15.0)]
    assert absences(recoveries, 0) == []


def test_an_overtaken_recovery_and_the_one_that_overtook_it_are_one_absence() -> None:
    overtaken = recovery(is_complete=False, wall_s=10.0, timings_ms={"total": 500.0})
    recoveries = [overtaken, recovery(lost=(1, 2), wall_s=11.0)]
    assert absences(recoveries, 1) == [(9.5, 11.0)]
    assert absences(recoveries, 2) == [(10.0, 11.0)]
