"""Recipes: each is composed and run for a moment; what is misspelt is refused; what a run leaves is whole."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_flashrl import algorithms
from lightning_flashrl.asyncrl.recorder import SUMMARY_KEYS
from lightning_flashrl.cli.flashrl import CONFIGS

GROUPS = {
    path.parent.name: sorted(found.stem for found in path.parent.glob("*.yaml")) for path in CONFIGS.glob("*/*.yaml")
}
CHOICES = [(group, name) for group, names in sorted(GROUPS.items()) for name in names]
SHORT = [
    "trainer.max_steps=2",
    "warm_start.steps=2",
    "warm_start.batch_size=8",
    "steps.prompts=4",
    "steps.group_size=4",
]


def _flashrl(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_flashrl.cli.flashrl", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_recipe_is_composed(group: str, name: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        override = f"experiment={name}" if group == "experiment" else f"{group}={name}"
        config = compose("config", [override, "paths.output_dir=there"], return_hydra_config=False)
        if (group, name) == ("trainer_engine", "folder"):
            config.trainer_engine.path = "somewhere"
        found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert found["paths"]["output_dir"] == "there"


@pytest.mark.parametrize("name", GROUPS["algorithm"])
def test_a_recipe_of_an_algorithm_has_its_options_as_they_are_in_python(name: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", [f"algorithm={name}", "paths.output_dir=there"])
        found: Any = OmegaConf.to_container(config.algorithm, resolve=True)
    kind = getattr(algorithms, found.pop("_target_").rpartition(".")[2])
    longest = config.rollout.max_new_tokens
    assert (found.pop("constant_length"), found.pop("overlong_length")) == (longest, longest)
    own = {"is_decoupled": True, "correction": "truncated"} if name == "grpo_decoupled" else {}
    assert kind(constant_length=longest, **found) == kind(constant_length=longest, **own)
    missing = {field.name for field in dataclasses.fields(kind)} - found.keys() - {"constant_length", "overlong_length"}
    assert missing == {"advantage", "surrogate"} | (set() if name == "ppo" else {"discount", "smoothing", "value_clip"})


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=() if name == "grpo_sort" else pytest.mark.slow) for name in GROUPS["experiment"]],
)
def test_every_experiment_runs_and_leaves_its_record(experiment: str, tmp_path: Path) -> None:
    # A policy that never learned anything answers whole groups alike: nothing would be left to train.
    more = ["algorithm.filters_uninformative=false"] if experiment.startswith("dapo") else []
    done = _flashrl(f"experiment={experiment}", *SHORT, *more, f"paths.output_dir={tmp_path}/out", cwd=tmp_path)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == SUMMARY_KEYS.keys()
    assert summary["steps"] == 2
    assert summary["rows_trained"] == 32
    assert summary["rows_lost"] == summary["rows_duplicated"] == 0
    assert summary["accuracy_first"] is not None
    assert len(summary["weights_sha256"]) == 64
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert (out / "csv" / "metrics.csv").exists()
    assert "reward" in done.stdout
    kinds = [json.loads(line)["kind"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert kinds == ["validation", "step", "step", "validation"]
    shown = _flashrl("status", str(out), cwd=tmp_path).stdout
    assert "trainer" in shown
    assert _flashrl("report", str(out), cwd=tmp_path).stdout.strip().endswith("report.html")


def test_a_recorded_run_under_chaos_is_trained_again_bit_for_bit(tmp_path: Path) -> None:
    """Two ranks, both killed on the way, and a last validation that only some steps ask for."""
    out = tmp_path / "out"
    chaos = ["chaos=schedule", "chaos.schedule=[trainer 0 at step 1, rollout 0 at step 2, trainer 1 at step 3]"]
    several = ["strategy=flash_ddp", "trainer.devices=2", "trainer.max_steps=6", "validate_every=2", "record=true"]
    settings = [*SHORT, *several, f"paths.output_dir={out}"]
    _flashrl("experiment=grpo_sort", *settings, *chaos, cwd=tmp_path)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["kills"], summary["recoveries"], summary["workers_replaced"]) == (6, 3, 2, 1)
    assert summary["rows_trained"] == summary["rows_generated"] == 6 * 16
    assert summary["rows_lost"] == summary["rows_duplicated"] == 0
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in history if line["kind"] == "validation"] == [0, 2, 4, 6]
    assert all(0 <= line["idle_share/trainer"] <= 1 for line in history if line["kind"] == "step")
    assert (out / "report.html").read_text().count("trainer killed") > 5
    checked = _flashrl("audit", str(out), cwd=tmp_path).stdout
    assert "6 steps, 96 rows, 3 kills, staleness at most 1" in checked
    assert "every row was trained once and in time" in checked
    done = _flashrl("replay", str(out), cwd=tmp_path)
    assert f"the same weights, bit for bit: sha256 {summary['weights_sha256']}" in done.stdout
    assert _flashrl("replay", str(tmp_path), cwd=tmp_path, check=False).returncode == 1


def test_the_newest_run_is_asked_if_no_folder_is_given(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "lightning_flashrl.cli.flashrl", "experiment=grpo_sort", "warm_start.steps=0"),
            *("trainer.max_steps=100000", "rollout.workers=2"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    shown = ""
    try:
        while shown.count("serving") < 2:
            time.sleep(0.3)
            assert run.poll() is None
            shown = _flashrl("status", cwd=tmp_path, check=False).stdout
        assert shown.count("rollout") == 2
        assert str(run.pid) in shown
        (folder,) = tmp_path.glob("outputs/*/*")
        assert str(folder.relative_to(tmp_path)) in shown
        assert "3 rollout worker(s)" in _flashrl("scale", "rollout=3", cwd=tmp_path).stdout
        while shown.count("rollout") < 3:
            time.sleep(0.3)
            shown = _flashrl("status", str(folder), cwd=tmp_path).stdout
        assert "report.html" in _flashrl("report", cwd=tmp_path).stdout
        none = _flashrl("audit", cwd=tmp_path, check=False)
        assert none.returncode == 1
        assert "has record; give its folder: flashrl audit DIR" in none.stdout
    finally:
        run.terminate()
        run.wait()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["scale"], "usage: flashrl scale [DIR] ROLE=NUMBER"),
        (["status", "somewhere", "else"], "usage: flashrl status [DIR]"),
        (["weights.max_stalenes=1"], "weights.max_stalenes"),
        (["trainer.max_stps=1"], "trainer.max_stps"),
        (["task=sorting"], "task/sorting"),
        (["task.min_digits=9"], "min_digits=9, max_digits=6"),
        pytest.param(["rollout.workers=0"], "rollout.workers=0; use 1 or more", marks=pytest.mark.slow),
        pytest.param(["workflow.mode=fast"], "workflow='fast'", marks=pytest.mark.slow),
        (["trainer_engine=folder", "trainer_engine.path=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_a_few_lines(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = _flashrl(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_runs_and_recipes_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "quick.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /trainer: cpu\n  - override /logger: tensorboard\nname: quick\n"
        "steps: {prompts: 2, group_size: 2}\ntrainer: {max_steps: 1}\n"
    )
    _flashrl("-m", "--config-dir", str(mine.parent), "experiment=quick", "seed=0,1", cwd=tmp_path)
    found = sorted((tmp_path / "outputs" / "quick" / "multirun").rglob("summary.json"))
    assert [path.parent.name for path in found] == ["0", "1"]
    assert len({json.loads(path.read_text())["weights_sha256"] for path in found}) == 2
    assert sorted((tmp_path / "outputs").rglob("events.out.tfevents*"))


def test_wandb_offline(tmp_path: Path) -> None:
    _flashrl(
        "experiment=grpo_sort",
        *SHORT,
        "logger=wandb",
        "logger.wandb.offline=true",
        "paths.output_dir=out",
        cwd=tmp_path,
    )
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
