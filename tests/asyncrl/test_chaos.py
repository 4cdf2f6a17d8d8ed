"""Who is killed, when, and what is spared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_flashrl.asyncrl.chaos import Chaos
from lightning_flashrl.asyncrl.history import read_kills
from lightning_flashrl.asyncrl.killer import Killer, Strike
from lightning_flashrl.asyncrl.processes import list_processes, write_processes
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.report.run_report import write_run_report
from tests.asyncrl.test_recovery import check, run
from tests.jobs import rl


class Folder:
    """A run's folder, with processes that do nothing."""

    def __init__(self, path: Path, *roles: tuple[str, int]) -> None:
        self.path = path
        self.children = {
            role: subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for role in roles
        }
        known = {child.pid: (*role, "") for role, child in self.children.items()}
        write_processes(path / "processes.json", list_processes(os.getpid(), known))
        self.step(1)

    def step(self, number: int) -> None:
        with (self.path / "history.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "step", "step": number, "reward": 0.5}) + "\n")

    def begin(self, **settings: Any) -> threading.Thread:
        wishes = {"mtbf_s": None, "strikes": [], "roles": ["trainer"], "seed": 0, "max_kills": None, **settings}
        thread = threading.Thread(target=Killer(self.path, **wishes).run)
        thread.start()
        return thread

    def end(self) -> None:
        (self.path / "summary.json").write_text("{}")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path, ("trainer", 0), ("trainer", 1), ("rollout", 0))
    yield made
    made.end()
    for child in made.children.values():
        child.kill()
        child.communicate()


def test_a_rank_is_spared_until_all_have_gone_on(folder: Folder) -> None:
    strikes = [Strike.parse("trainer 0 at step 1"), Strike.parse("trainer 1 at step 1")]
    thread = folder.begin(strikes=strikes)
    assert folder.children["trainer", 0].wait(10) == -signal.SIGKILL
    time.sleep(0.5)
    assert folder.children["trainer", 1].poll() is None
    folder.step(2)  # which the one that died may have had, too
    time.sleep(0.5)
    assert folder.children["trainer", 1].poll() is None
    folder.step(3)
    assert folder.children["trainer", 1].wait(10) == -signal.SIGKILL
    thread.join(10)
    assert [(kill["step"], kill["rank"]) for kill in read_kills(folder.path)] == [(1, 0), (3, 1)]
    page = write_run_report(folder.path).read_text()
    assert "trainer killed" in page
    assert "process" in page


def test_whom_a_number_belongs_to_now_is_not_killed(folder: Folder) -> None:
    """A process that was listed has ended, and its number is another's."""
    path = folder.path / "processes.json"
    found = json.loads(path.read_text())
    for entry in found["processes"]:
        entry["since_s"] -= 100
    path.write_text(json.dumps(found))
    thread = folder.begin(mtbf_s=0.01, roles=["trainer", "rollout"])
    time.sleep(1)
    folder.end()
    thread.join(10)
    assert all(child.poll() is None for child in folder.children.values())
    assert read_kills(folder.path) == []


def test_kills_at_random_are_of_the_roles_and_as_many_as_asked_for(folder: Folder) -> None:
    folder.begin(mtbf_s=0.01, roles=["rollout"], max_kills=1).join(10)
    assert folder.children["rollout", 0].wait(10) == -signal.SIGKILL
    assert [kill["role"] for kill in read_kills(folder.path)] == ["rollout"]


@pytest.mark.parametrize(
    "wishes",
    [
        {"strikes": [Strike.parse("rollout 0 hangs at step 1")]},
        {"mtbf_s": 0.01, "roles": ["rollout"], "max_kills": 1, "hang_share": 1.0},
    ],
)
def test_one_that_is_to_hang_is_stopped(folder: Folder, wishes: dict[str, Any]) -> None:
    folder.begin(**wishes).join(10)
    child = folder.children["rollout", 0]
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert [(kill["role"], kill["signal"]) for kill in read_kills(folder.path)] == [("rollout", "SIGSTOP")]
    assert "rollout stopped" in write_run_report(folder.path).read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mtbf_s": 0}, "chaos.mtbf_s=0"),
        ({"mtbf_s": 1, "hang_share": 1.5}, "chaos.hang_share=1.5; use a share from 0 to 1"),
        ({}, "kills nothing"),
        ({"mtbf_s": 1, "roles": ["cat"]}, r"chaos.roles=\['cat'\]"),
        ({"schedule": ["trainer at noon"]}, "ROLE RANK at step STEP"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Chaos("somewhere", **settings)


def test_a_run_that_would_not_survive_is_refused(tmp_path: Path) -> None:
    trainer = rl.make_trainer(callbacks=[Chaos(tmp_path, mtbf_s=1)], max_steps=1)
    with pytest.raises(
        ConfigurationError,
        match="kills queue, standby, supervisor, and this run has no such processes",
    ):
        trainer.fit(rl.make_module(rl.make_engine()), rl.make_data())
    trainer = rl.make_trainer(callbacks=[Chaos(tmp_path, mtbf_s=1, roles=["trainer"])], max_steps=1)
    with pytest.raises(ConfigurationError, match="does not survive that; use strategy=flash_ddp"):
        trainer.fit(rl.make_module(rl.make_engine()), rl.make_data())


@pytest.mark.slow
def test_a_run_survives_its_schedule(tmp_path: Path) -> None:
    summary = run(tmp_path, schedule="trainer 1 at step 2,rollout 0 at step 3,trainer 0 at step 5", **{"max-steps": 10})
    check(summary, recoveries=2, steps=10)
    assert summary["kills"] == 3
    assert summary["workers_replaced"] == 1
