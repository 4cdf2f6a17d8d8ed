"""Whole programs, started as users start them (`python program.py`), struck inside and outside of `fit`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = Path(__file__).parents[1] / "jobs" / "program.py"
GROUPS = PROGRAM.with_name("groups.py")


def _run(
    out: Path, where: str = "", victims: str = "[1]", program: Path = PROGRAM, **more: str
) -> tuple[int, str, list[Any]]:
    out.mkdir()
    environment = {
        key: value for key, value in os.environ.items() if not re.match("RANK|WORLD_SIZE|LOCAL_|FLASHRL_|MASTER_", key)
    }
    environment |= {
        "PROGRAM_OUT": str(out),
        "PROGRAM_WHERE": where,
        "PROGRAM_VICTIMS": victims,
        "OMP_NUM_THREADS": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, str(program), str(out)], env=environment, cwd=out, capture_output=True, text=True, timeout=100
    )
    results = [json.loads(path.read_text()) for path in sorted(out.glob("result*.json"))]
    return done.returncode, done.stdout + done.stderr, results


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    returncode, output, results = _run(tmp_path_factory.mktemp("program") / "out")
    assert returncode == 0, output
    assert len(results) == 2
    return results


_EVERYWHERE = [
    (where, victims) for where in ("fit0", "between", "fit1", "after", "test", "end") for victims in ("[1]", "[0]")
]
_QUICK = [("fit1", "[0]"), ("test", "[1]")]


@pytest.mark.parametrize(
    ("where", "victims"),
    [pytest.param(*case, marks=[] if case in _QUICK else pytest.mark.slow) for case in _EVERYWHERE],
)
def test_a_program_with_a_kill_ends_like_one_without(
    tmp_path: Path, expected: list[Any], where: str, victims: str
) -> None:
    returncode, output, results = _run(tmp_path / "out", where, victims)
    assert returncode == 0, output
    assert "killed by SIGKILL" in output
    assert results == expected


def test_the_job_dies_with_the_program_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    marker = f"PROGRAM_OUT={tmp_path / 'out'}"
    environment = os.environ | {"PROGRAM_OUT": str(tmp_path / "out"), "PROGRAM_ENDLESS": "1", "OMP_NUM_THREADS": "1"}
    program = subprocess.Popen([sys.executable, str(PROGRAM)], env=environment, stdout=subprocess.DEVNULL)

    def family() -> list[int]:
        return [process.pid for process in psutil.process_iter() if _has_variable(process, marker)]

    deadline_s = time.monotonic() + 60
    while not (tmp_path / "out" / "trains1").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert len(family()) >= 4
    program.kill()
    program.wait()
    deadline_s = time.monotonic() + 10
    while left := family():
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


def _has_variable(process: psutil.Process, marker: str) -> bool:
    try:
        name, _, value = marker.partition("=")
        return process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_callbacks_hear_of_a_recovery(tmp_path: Path) -> None:
    returncode, output, _ = _run(tmp_path / "out", "fit1")
    assert returncode == 0, output
    assert (tmp_path / "out" / "start0").read_text() == "[1]\n"
    told = (tmp_path / "out" / "end0").read_text()
    assert told.startswith("[1] ")
    assert "'transfer'" in told
    assert "any 1 of 2 ranks" in output
    record = json.loads((tmp_path / "out" / "recovery.jsonl").read_text())
    assert record["lost"] == [1]
    assert record["donors"] == {"1": 0}


def test_an_exception_stops_the_job_once_with_its_traceback(tmp_path: Path) -> None:
    returncode, output, results = _run(tmp_path / "out", "raise")
    assert returncode != 0
    assert output.count("ValueError: the user's own mistake") <= 2
    assert "rank 1 raised" in output
    assert "is replaced" not in output
    assert results == []


def test_without_a_donor_the_error_names_the_newest_checkpoint(tmp_path: Path) -> None:
    chaos = json.dumps(["kill rank=0 step=4 phase=forward", "kill rank=1 step=4 phase=forward"])
    returncode, output, _ = _run(tmp_path / "out", "everybody", "[]", FLASHRL_CHAOS=chaos)
    assert returncode != 0
    assert "NoDonorError" in output
    assert re.search(r"newest checkpoint \S*step=4\.ckpt", output), output


def test_fallback_restarts_from_the_newest_checkpoint(tmp_path: Path) -> None:
    chaos = json.dumps(["kill rank=0 step=4 phase=forward", "kill rank=1 step=4 phase=forward"])
    returncode, output, results = _run(
        tmp_path / "out", "everybody", "[]", FLASHRL_CHAOS=chaos, PROGRAM_FALLBACK="last"
    )
    assert returncode == 0, output
    assert [result["steps"] for result in results] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("places", [["after_collective"], ["setup", "step"]])
def test_groups_made_by_the_user_recover(tmp_path: Path, places: list[str]) -> None:
    returncode, output, expected = _run(tmp_path / "unfailed", program=GROUPS)
    assert returncode == 0, output
    assert len(expected) == 4
    for where in places:
        returncode, output, results = _run(tmp_path / where, where, program=GROUPS)
        assert returncode == 0, output
        assert "killed by SIGKILL" in output
        assert results == expected
