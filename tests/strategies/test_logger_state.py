"""Loggers of a replacement go on where the lost rank's stood, byte for byte."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger

from lightning_flashrl.recovery.slot import Region
from lightning_flashrl.strategies.logger_state import capture_loggers, keep_versions, restore_loggers

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")  # the lost rank's, and it stays


class Slot:
    """The regions of a slot."""

    def __init__(self) -> None:
        self._regions: dict[Region, bytes] = {}

    def read(self, region: Region) -> bytes | None:
        return self._regions.get(region)

    def write(self, region: Region, parts: list[bytes]) -> None:
        self._regions[region] = b"".join(parts)


class Process:
    """Rank 0 with one CSV logger, from its set-up on."""

    def __init__(
        self, folder: Path, slot: Slot, facts: dict[str, Any] | None = None, rank: int = 0, number: int = 0
    ) -> None:
        self.logger = CSVLogger(folder, flush_logs_every_n_steps=1000)
        self.trainer: Any = SimpleNamespace(loggers=[self.logger], is_global_zero=rank == 0)
        runtime: Any = SimpleNamespace(facts=facts or {}, slot=slot)
        keep_versions(self.trainer, runtime, number)
        if rank == 0:
            _ = self.logger.experiment  # Lightning makes it in the set-up

    @property
    def file(self) -> Path:
        return Path(self.logger.log_dir) / "metrics.csv"

    def log(self, step: int, **values: float) -> None:
        self.logger.log_metrics(values, step)

    def publish(self) -> dict[str, Any]:
        return {"trainer": 0, "loggers": copy.deepcopy(capture_loggers(self.trainer))}

    def replaced(self, facts: dict[str, Any], slot: Slot, newest: dict[str, Any] | None = None) -> Process:
        """This process is gone; its replacement sets itself up and enters at the published point.

        Args:
            facts: of the point at which it enters.
            slot: of the rank.
            newest: of the newest point, which its set-up goes by.
        """
        newcomer = Process(Path(self.logger.save_dir), slot, copy.deepcopy(newest or facts))
        restore_loggers(newcomer.trainer, facts["loggers"])
        return newcomer


def _steps(process: Process, *steps: int, **more: float) -> None:
    for step in steps:
        process.log(step, loss=1 / (step + 1), **more)
    process.logger.save()


@pytest.fixture
def expected(tmp_path: Path) -> str:
    """What a rank writes that is never lost: two saves, a column that comes later, a last save."""
    process = Process(tmp_path / "expected", Slot())
    _steps(process, 0, 1)
    _steps(process, 2, 3, accuracy=0.25)
    process.logger.finalize("success")
    return process.file.read_text()


def test_a_log_goes_on_where_it_stood(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    _steps(lost, 0, 1)
    facts = lost.publish()
    _steps(lost, 2)  # written after the published point: done again
    newcomer = lost.replaced(facts, slot)
    assert newcomer.file == lost.file
    _steps(newcomer, 2, 3, accuracy=0.25)
    newcomer.logger.finalize("success")
    assert newcomer.file.read_text() == expected


def test_rows_that_were_held_back_are_written_once(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    _steps(lost, 0, 1)
    lost.log(2, loss=1 / 3, accuracy=0.25)
    facts = lost.publish()
    lost.log(3, loss=1 / 4, accuracy=0.25)
    lost.logger.save()
    newcomer = lost.replaced(facts, slot)
    newcomer.log(3, loss=1 / 4, accuracy=0.25)
    newcomer.logger.save()
    assert newcomer.file.read_text() == expected


def test_a_column_that_came_after_the_published_point_goes_and_comes_again(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    _steps(lost, 0, 1)
    before = lost.file.read_text()
    facts = lost.publish()
    _steps(lost, 2, accuracy=0.25)  # rewrites the file with another header
    assert lost.file.read_text().splitlines()[0] != before.splitlines()[0]
    newcomer = Process(tmp_path, slot, facts)
    restore_loggers(newcomer.trainer, facts["loggers"])
    assert newcomer.file.read_text() == before
    _steps(newcomer, 2, 3, accuracy=0.25)
    assert newcomer.file.read_text() == expected


def test_a_log_that_was_empty_at_the_published_point_is_empty_again(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    facts = lost.publish()
    _steps(lost, 0, 1, 2)
    newcomer = lost.replaced(facts, slot)
    assert not newcomer.file.exists()
    _steps(newcomer, 0, 1)
    _steps(newcomer, 2, 3, accuracy=0.25)
    assert newcomer.file.read_text() == expected


def test_a_replacement_may_enter_at_an_older_point(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    _steps(lost, 0, 1)
    older = lost.publish()
    _steps(lost, 2, accuracy=0.25)
    newcomer = lost.replaced(older, slot, newest=lost.publish())
    _steps(newcomer, 2, 3, accuracy=0.25)
    assert newcomer.file.read_text() == expected


def test_a_replacement_may_die_in_its_set_up(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    _steps(lost, 0, 1)
    facts = lost.publish()
    _steps(lost, 2, accuracy=0.25)
    for _ in range(2):
        dies = Process(tmp_path, slot, copy.deepcopy(facts))
        dies.file.write_text("half a log")
    newcomer = lost.replaced(facts, slot)
    _steps(newcomer, 2, 3, accuracy=0.25)
    assert newcomer.file.read_text() == expected
    assert [path.name for path in newcomer.file.parent.iterdir()] == ["metrics.csv"]


def test_a_rank_may_be_lost_while_the_whole_log_is_written_anew(
    tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LostError(Exception):
        pass

    def lose(writer: Any, _: list[str]) -> None:
        Path(writer.metrics_file_path).write_text("")
        raise LostError

    slot = Slot()
    with monkeypatch.context() as patch:
        patch.setattr(_ExperimentWriter, "_rewrite_with_new_header", lose)
        lost = Process(tmp_path, slot)
        _steps(lost, 0, 1)
        facts = lost.publish()
        with pytest.raises(LostError):
            _steps(lost, 2, accuracy=0.25)
    newcomer = lost.replaced(facts, slot)
    _steps(newcomer, 2, 3, accuracy=0.25)
    assert newcomer.file.read_text() == expected


def test_a_half_written_row_is_cut_off(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    lost = Process(tmp_path, slot)
    _steps(lost, 0, 1)
    facts = lost.publish()
    with lost.file.open("a") as file:
        file.write("0.333")
    newcomer = lost.replaced(facts, slot)
    _steps(newcomer, 2, 3, accuracy=0.25)
    assert newcomer.file.read_text() == expected


def test_several_replacements_keep_one_log(tmp_path: Path, expected: str) -> None:
    slot = Slot()
    process = Process(tmp_path, slot)
    _steps(process, 0, 1)
    for _ in range(3):
        facts = process.publish()
        _steps(process, 2, accuracy=0.25)
        process = process.replaced(facts, slot)
    _steps(process, 2, 3, accuracy=0.25)
    assert process.file.read_text() == expected
    assert [path.name for path in process.file.parent.iterdir()] == ["metrics.csv"]


def test_the_first_process_decides_the_version_for_its_replacements(tmp_path: Path) -> None:
    slot = Slot()
    first = Process(tmp_path, slot)
    _steps(first, 0)
    assert first.logger.version == 0
    assert Process(tmp_path, slot).logger.version == 0
    assert Process(tmp_path, Slot()).logger.version == 1


def test_each_trainer_of_a_program_has_a_version_of_its_own(tmp_path: Path) -> None:
    slot = Slot()
    for _ in range(2):
        trainers = [Process(tmp_path, slot, number=number) for number in range(2)]
        assert [process.logger.version for process in trainers] == [0, 1]
    facts = trainers[0].publish()
    _steps(trainers[1], 0)
    assert Process(tmp_path, slot, facts, number=1).logger.version == 1


def test_the_log_of_a_trainer_that_is_over_is_not_written_again(tmp_path: Path) -> None:
    slot = Slot()
    over, lost = (Process(tmp_path, slot, number=number) for number in range(2))
    _steps(over, 0, 1)
    _steps(over, 2, test=0.5)
    expected = over.file.read_text()
    _steps(lost, 0)
    facts = {**lost.publish(), "trainer": 1}
    again = Process(tmp_path, slot, facts, number=0)
    _steps(again, 2, test=0.5)  # its fit is past, its test runs once more
    newcomer = Process(tmp_path, slot, facts, number=1)
    restore_loggers(newcomer.trainer, facts["loggers"])
    assert over.file.read_text() == expected
    assert len(newcomer.file.read_text().splitlines()) == 2


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    process = Process(tmp_path, Slot(), rank=1)
    states = capture_loggers(process.trainer)
    assert states == [{"version": 0}]
    restore_loggers(process.trainer, states)
    assert not process.file.exists()


def test_a_logger_without_versions_or_files_is_left_alone() -> None:
    trainer: Any = SimpleNamespace(loggers=[object()], is_global_zero=True)
    runtime: Any = SimpleNamespace(facts={}, slot=Slot())
    keep_versions(trainer, runtime, 0)
    restore_loggers(trainer, capture_loggers(trainer))
