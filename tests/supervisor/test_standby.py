"""A forked rank looks like a freshly started one, and both ways to start a rank look the same to the program."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.parametrize("standby", [0, 1])
def test_a_script_sees_itself_as_under_python(start, standby: int) -> None:
    job = start("--standby", standby, PROGRAMS / "plain.py", "arguments", "--x", "-m")
    assert job.wait() == 0
    seen = json.loads(job.out)
    script = str(PROGRAMS / "plain.py")
    assert seen == {
        "argv": [script, "arguments", "--x", "-m"],
        "name": "__main__",
        "path": str(PROGRAMS),
        "file": script,
    }


@pytest.mark.parametrize("standby", [0, 1])
def test_a_module_sees_itself_as_under_python(start, standby: int) -> None:
    job = start("--standby", standby, "-m", "plain", "arguments", cwd=PROGRAMS)
    assert job.wait() == 0
    seen = json.loads(job.out)
    script = str(PROGRAMS / "plain.py")
    assert seen == {"argv": [script, "arguments"], "name": "__main__", "path": str(PROGRAMS), "file": script}


@pytest.mark.parametrize("standby", [0, 1])
def test_lines_of_ranks_do_not_mix_without_buffering_either(start, monkeypatch, standby: int) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    job = start("--standby", standby, "--nproc-per-node", 2, PROGRAMS / "plain.py", "lines")
    assert job.wait() == 0
    assert sorted(job.out.splitlines()) == sorted(f"line {n} of rank {rank}" for n in range(300) for rank in (0, 1))


@pytest.mark.parametrize("standby", [0, 1])
def test_ranks_get_the_variables_of_torchrun(start, standby: int) -> None:
    job = start("--standby", standby, "--nproc-per-node", 2, "--rdzv-id", "name", PROGRAMS / "plain.py", "environment")
    assert job.wait() == 0
    first, second = sorted(map(json.loads, job.out.splitlines()), key=lambda seen: seen["RANK"])
    assert int(first.pop("MASTER_PORT")) == int(second["MASTER_PORT"])
    assert first == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "ROLE_RANK": "0",
        "GROUP_RANK": "0",
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "name",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "OMP_NUM_THREADS": "1",
    }
    assert (second["RANK"], second["LOCAL_RANK"], second["ROLE_RANK"]) == ("1", "1", "1")


def test_forked_ranks_have_imported_torch_and_share_no_randomness(start, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, random, sys, numpy, torch\n"
        "print(len(os.listdir('/proc/self/task')), random.random(), numpy.random.rand(), torch.rand(1).item(),\n"
        "      torch.initial_seed(), torch.get_num_threads(), hash('x'),\n"
        "      sys.modules['__main__'].__file__, flush=True)\n"
    )
    job = start("--nproc-per-node", 3, program)
    assert job.wait() == 0
    rows = [line.split() for line in job.out.splitlines()]
    threads, *randoms, num_torch_threads, hashes, files = zip(*rows, strict=True)
    assert set(threads) == {"1"}
    assert all(len(set(values)) == 3 for values in randoms)
    assert set(num_torch_threads) == {"1"}
    assert len(set(hashes)) == 1
    assert set(files) == {str(program)}


def test_a_module_that_starts_a_thread_makes_way_for_torch_alone(start, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os\nprint(os.getppid(), flush=True)\n")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, threading\n"
        "if 'FLASHRL_STANDBY_FD' in os.environ:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    job = start(program, PYTHONPATH=os.pathsep.join([str(site), *filter(None, sys.path)]))
    assert job.wait() == 0
    assert "ranks are started cold" in job.err


def test_exceptions_show_the_users_frames_only(start) -> None:
    for standby in (0, 1):
        job = start("--standby", standby, PROGRAMS / "plain.py", "raise")
        assert job.wait() == 1
        assert job.err.count("RuntimeError: rank 0, restart 0") == 2  # by the rank, and by flashrun
        assert "lightning_flashrl/supervisor" not in job.err


def test_any_command_can_be_a_rank(start) -> None:
    job = start("--nproc-per-node", 2, "--no-python", "sh", "-c", "echo $RANK of $WORLD_SIZE; exit $RANK")
    assert job.wait() == 1
    assert "1 of 2" in job.out


def test_nobody_writes_to_a_missing_program(start) -> None:
    job = start("-m", "no_such_module")
    assert job.wait() == 1
    assert "No module named 'no_such_module'" in job.err
