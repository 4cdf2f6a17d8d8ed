"""``flash_ddp_notebook``: ranks forked from a real interpreter; what comes back is exact, and nothing else stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies import FlashDDPNotebookStrategy, make_strategy

JOB = Path(__file__).parents[1] / "jobs" / "notebook.py"
_TIMEOUT_S = 110
_MARKER = "FLASHRL_TEST_NOTEBOOK"


def _processes_with(marker: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{_MARKER}={marker}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it ended while we looked
                continue
    return found


def run_cells(folder: Path, *cells: str, launcher: tuple[str, ...] = ()) -> tuple[dict[str, Any], int]:
    """Run cells in one interpreter. Returns what each printed, and the exit status; checks that nothing is left."""
    marker, tmp = uuid.uuid4().hex, folder / "tmp"
    tmp.mkdir()
    environ = {key: value for key, value in os.environ.items() if not re.match("FLASHRL_|RANK|WORLD_SIZE|LOCAL_", key)}
    environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp), _MARKER: marker, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, *launcher, str(JOB), str(folder), *cells],
        env=environ,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 3.0
    while (left := _processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
    # torch makes a folder, and so does ddp_notebook
    of_others = ("torchinductor_", "tmp") if "stock" in cells else ("torchinductor_",)
    assert [path.name for path in tmp.iterdir() if not path.name.startswith(of_others)] == []
    lines = [json.loads(line.removeprefix("CELL ")) for line in done.stdout.splitlines() if line.startswith("CELL ")]
    assert [line["cell"] for line in lines] == [cell for cell in cells if cell != "dies"], done.stdout + done.stderr
    for line in lines:
        assert line["left"] == [], line["cell"]
    return {line["cell"]: line["outcome"] for line in lines}, done.returncode


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cells = ("plain", "stock", "scheduled", "at_the_end", "killed_by_hand", "supervisor_killed", "in_a_thread")
    cells += ("after_thread_pools",)
    return run_cells(tmp_path_factory.mktemp("fits"), *cells)[0]


@pytest.fixture(scope="module")
def uses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cells = ("other_functions", "after_the_fit", "output", "kept_logs", "with_workers")
    return run_cells(tmp_path_factory.mktemp("uses"), *cells)[0]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cells(tmp_path_factory.mktemp("ends"), "mistake", "interrupted", "keeper_killed", "all_die", "refusals")[
        0
    ]


# --------------------------------------------------------------------------- what comes back
@pytest.mark.parametrize("key", ["weights", "callback_metrics", "state", "optimizers", "csv", "is_training", "devices"])
def test_the_same_comes_back_as_from_ddp_notebook(fits: dict[str, Any], key: str) -> None:
    assert fits["plain"][key] == fits["stock"][key]


def test_progress_scores_and_log_folder_come_back_too(fits: dict[str, Any]) -> None:
    plain = fits["plain"]
    assert (plain["global_step"], plain["epoch"]) == (18, 3)
    assert plain["best"] == ["epoch=2-step=18.ckpt", plain["callback_metrics"]["val_loss"]]
    assert plain["log_dir"] == "lightning_logs/version_0"
    assert set(plain["logged_metrics"]) == {"accuracy", "loss_step", "loss_epoch", "val_loss"}
    assert set(plain["progress_bar_metrics"]) == {"loss_step", "loss_epoch"}


@pytest.mark.parametrize("cell", ["scheduled", "at_the_end", "killed_by_hand", "supervisor_killed", "in_a_thread"])
def test_the_same_comes_back_after_faults(fits: dict[str, Any], cell: str) -> None:
    assert fits[cell] == fits["plain"]


def test_used_thread_pools_do_no_harm(fits: dict[str, Any]) -> None:
    assert fits["after_thread_pools"] == {"weights": fits["plain"]["weights"], "threads": 2}


def test_workers_of_loaders_die_with_their_rank_and_come_back(uses: dict[str, Any]) -> None:
    undisturbed, killed = uses["with_workers"]
    assert killed == undisturbed


def test_the_interpreter_goes_on_with_the_trained_model(uses: dict[str, Any]) -> None:
    after = uses["after_the_fit"]
    assert (after["step"], after["same"]) == (18, True)
    assert after["validated"] == after["best"]  # the last epoch was the best
    assert "make a new Trainer" in after["refused"]


def test_results_of_validate_come_back_and_shares_of_predictions_do_not(uses: dict[str, Any]) -> None:
    other = uses["other_functions"]
    assert list(other["validated"][0]) == other["metrics"] == ["val_loss"]
    assert other["predicted"] is None
    assert "BasePredictionWriter" in other["refused"]


def test_output_of_ranks_appears_in_the_cell(uses: dict[str, Any]) -> None:
    stdout, stderr = uses["output"]["stdout"], uses["output"]["stderr"]
    for rank, times in ((0, 1), (1, 2)):  # rank 1 was replaced, and its replacement began anew
        assert stdout.count(f"hello from {rank}\n") == times
        assert stderr.count(f"grüße von {rank}\n") == stderr.count(f"log of {rank}\n") == times
    assert stdout.count("written\n") == 3
    assert "[flashrl] rank 1 lost: killed by SIGKILL" in stderr
    assert "[flashrl] rank(s) 1 back after" in stderr


def test_logs_are_kept_where_the_user_wants_them(uses: dict[str, Any]) -> None:
    files = ["rank0/incarnation0.log", "rank1/incarnation0.log", "rank1/incarnation1.log"]
    assert uses["kept_logs"] == {"files": files, "lost": [1]}


# --------------------------------------------------------------------------- other ends
def test_an_exception_of_a_rank_is_raised_in_the_cell(ends: dict[str, Any]) -> None:
    mistake = ends["mistake"]
    assert (mistake["kind"], mistake["rank"]) == ("UserCodeError", 1)
    assert mistake["text"].startswith("rank 1 raised:\nTraceback")
    assert mistake["text"].endswith("ValueError: a mistake of the user")


def test_ctrl_c_ends_the_cell_and_the_next_one_works(ends: dict[str, Any]) -> None:
    interrupted = ends["interrupted"]
    assert interrupted["kind"] == "SystemExit"  # what Lightning makes of it
    assert interrupted["status"] == "TrainerStatus.INTERRUPTED"
    assert interrupted["took_s"] < 15.0


def test_the_loss_of_the_keeper_is_said(ends: dict[str, Any]) -> None:
    assert ends["keeper_killed"]["kind"] == "FatalError"
    assert "killed by SIGKILL" in ends["keeper_killed"]["text"]


def test_the_loss_of_all_ranks_is_said_or_restarted_from(ends: dict[str, Any]) -> None:
    assert ends["all_die"]["kind"] == "NoDonorError"
    assert "last.ckpt" in ends["all_die"]["text"]
    assert ends["all_die"]["again"]["global_step"] == 18


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("devices", "set Trainer(devices=2) or more, it is 1"),
        ("cuda", "CUDA is initialized in it, which no fork survives; restart the kernel"),
        ("nodes", "Trainer(num_nodes=2) does not work"),
    ],
)
def test_what_cannot_work_is_refused(ends: dict[str, Any], what: str, text: str) -> None:
    assert text in ends["refusals"][what]


def test_ranks_do_not_outlive_a_killed_interpreter(tmp_path: Path) -> None:
    _, returncode = run_cells(tmp_path, "dies")
    assert returncode == -signal.SIGKILL


def test_under_flashrun_it_is_flash_ddp(tmp_path: Path) -> None:
    launcher = ("-m", "lightning_flashrl.cli.flashrun", "--nproc-per-node", "1")
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(JOB), str(tmp_path), "refusals"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "Trainer(devices=2) does not match flashrun --nproc-per-node 1" in done.stdout


# --------------------------------------------------------------------------- the strategy alone
def test_it_has_a_name() -> None:
    assert isinstance(make_strategy("flash_ddp_notebook"), FlashDDPNotebookStrategy)


def test_without_a_fit_there_are_no_ranks() -> None:
    strategy = FlashDDPNotebookStrategy()
    assert strategy.rank_pids() == {}
    assert strategy.heartbeats() == {}


@pytest.mark.parametrize("name", ["standby", "launcher_options"])
def test_arguments_of_a_launched_program_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}= is for strategy='flash_ddp'"):
        FlashDDPNotebookStrategy(**{name: 1})
