"""Whole runs with real rollout processes: what is trained is what was asked for, once, and in time."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import Strategy

from lightning_flashrl import AsyncRL
from lightning_flashrl.algorithms import DAPO, GRPO
from lightning_flashrl.asyncrl import RolloutSettings, StepSettings, StreamingDataModule
from lightning_flashrl.asyncrl.recorder import RunRecorder, weights_sha256
from lightning_flashrl.asyncrl.recording import StepRecord
from lightning_flashrl.engines import fleet, worker_process
from lightning_flashrl.engines.adapters import LoRA
from lightning_flashrl.engines.trainer import CausalLMTrainer
from lightning_flashrl.errors import ConfigurationError, WorkerFailedError
from lightning_flashrl.tasks import Problem
from tests.jobs import rl

JOB = Path(rl.__file__)


def _run(*arguments: str, output_dir: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(JOB), str(output_dir), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(JOB.parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return found


def _fit(data: StreamingDataModule, *callbacks: L.Callback, **trainer: Any) -> tuple[str, L.Trainer, Any]:
    engine = rl.make_engine()
    module = rl.make_module(engine)
    fitted = rl.make_trainer(callbacks=[*callbacks], **{"max_steps": 4, **trainer})
    fitted.fit(module, data)
    return weights_sha256(dict(engine.weights())), fitted, module


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _check_books(summary: Mapping[str, Any], rows: int, staleness: int) -> None:
    assert summary["rows_trained"] == rows
    assert summary["rows_lost"] == summary["rows_duplicated"] == 0
    assert summary["staleness_max"] <= staleness


class TestWorkflows:
    def test_without_staleness_all_workflows_are_the_same_run(self) -> None:
        """Synchronous, streaming, and asynchronous with a bound of 0: bit for bit."""
        found = {
            workflow: _fit(rl.make_data(workflow=workflow, max_staleness=0))[0]
            for workflow in ("sync", "streaming", "async")
        }
        assert len(set(found.values())) == 1, found
        assert found["sync"] != weights_sha256(dict(rl.make_engine().weights()))

    @pytest.mark.parametrize(
        "workflow", ["async", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sub_step", "in_flight"))]
    )
    def test_rows_are_trained_once_and_within_the_bound(self, workflow: str, tmp_path: Path) -> None:
        rollout = RolloutSettings(max_new_tokens=6, max_length=16, num_slots=4, num_ahead=2, workers=2)
        recorder = RunRecorder(tmp_path)
        _fit(rl.make_data(workflow=workflow, max_staleness=2, rollout=rollout), recorder, max_steps=8)
        summary = json.loads((tmp_path / "summary.json").read_text())
        _check_books(summary, rows=8 * 16, staleness=2)
        assert summary["rows_generated"] == 8 * 16
        assert summary["steps"] == 8

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["ddp", "flash_ddp"])
    def test_ranks_share_the_rows_of_a_step(self, strategy: str, tmp_path: Path) -> None:
        summary = _run("--strategy", strategy, "--devices", "2", output_dir=tmp_path)
        _check_books(summary, rows=5 * 16, staleness=1)
        assert summary["recoveries"] == 0


def test_adapters_alone_are_trained_and_reach_the_rollouts() -> None:
    """On-policy, rollouts and trainer agree on log-probs after several updates of the adapters."""
    engine = CausalLMTrainer(rl.make_engine().model, lora=LoRA(rank=4))
    module = rl.make_module(engine)
    rl.make_trainer(max_steps=4).fit(module, rl.make_data(workflow="sync"))
    assert module.last_step is not None
    assert module.last_step["policy_version"] == 4
    assert module.last_step["mismatch/logprob_diff_max"] < 1e-4
    assert any(weight.abs().sum() > 0 for name, weight in engine.weights().items() if "lora_B" in name)


class TestPrompts:
    def test_a_dataset_is_gone_through_epoch_by_epoch(self) -> None:
        class Dataset:
            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> dict[str, Any]:
                problem = rl.TASK.problem(index)
                return {"prompt": problem.prompt, "answer": problem.answer, "level": index}

        _, trainer, module = _fit(rl.make_data(prompts=Dataset()), max_steps=-1, max_epochs=2)
        assert trainer.current_epoch == 2
        assert module.policy_version == 4

    def test_an_iterable_ends_with_a_smaller_batch(self, tmp_path: Path) -> None:
        def problems() -> Iterator[Any]:
            yield from (rl.TASK.problem(index) for index in range(10))

        recorder = RunRecorder(tmp_path)
        _, _, module = _fit(rl.make_data(prompts=problems()), recorder, max_steps=-1, max_epochs=1)
        assert module.policy_version == 3
        _check_books(json.loads((tmp_path / "summary.json").read_text()), rows=40, staleness=1)

    def test_a_dataset_that_raises_ends_the_run_with_its_error(self) -> None:
        def problems() -> Iterator[Any]:
            yield rl.TASK.problem(0)
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            _fit(rl.make_data(prompts=problems()), max_steps=2)


class TestFaults:
    def test_rows_whose_reward_fails_are_left_out_and_replaced(self, tmp_path: Path) -> None:
        def picky(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
            if len(completion) % 3 == 1:
                raise ValueError("no")
            return rl.partly_right(prompt, completion, row)

        with pytest.warns(UserWarning, match=r"failed and are left out.*the reward raised ValueError: no"):
            _fit(rl.make_data(reward=picky), RunRecorder(tmp_path))
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["rows_dropped"] > 0
        assert summary["rows_lost"] == summary["rows_duplicated"] == 0
        assert summary["steps"] == 4

    @pytest.mark.parametrize("reward_workers", [0, 1])
    def test_a_run_of_which_every_completion_fails_is_given_up(self, reward_workers: int) -> None:
        def broken(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
            raise KeyError("units")

        rollout = RolloutSettings(max_new_tokens=6, max_length=16, num_slots=8, reward_workers=reward_workers)
        with pytest.raises(WorkerFailedError, match=r"gets no completions: the last \d+ have all failed.*KeyError"):
            _fit(rl.make_data(reward=broken, rollout=rollout))

    def test_a_run_without_anything_to_learn_from_is_warned_of_and_given_up(self) -> None:
        module = AsyncRL(rl.make_engine(), DAPO())
        with (
            pytest.warns(UserWarning, match="the step waits: .*filters_uninformative"),
            pytest.raises(WorkerFailedError, match="nothing to learn from"),
        ):
            rl.make_trainer(max_steps=1).fit(module, rl.make_data(reward=lambda *_: 1.0))

    def test_prompts_that_are_all_too_long_are_said(self) -> None:
        rollout = RolloutSettings(max_new_tokens=6, max_length=7, num_slots=8, reward_workers=0)
        with pytest.raises(WorkerFailedError, match="with max_length=7 and max_new_tokens=6 it may have 1 to 1"):
            _fit(rl.make_data(rollout=rollout))

    def test_a_killed_worker_is_replaced_and_no_row_is_lost(self, tmp_path: Path) -> None:
        class Killer(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step == 3:
                    data: Any = trainer.datamodule  # type: ignore[attr-defined]
                    os.kill(data.current_session.view().workers[0].pid, signal.SIGKILL)

        _fit(rl.make_data(), Killer(), RunRecorder(tmp_path), max_steps=6)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["workers_replaced"] == 1
        _check_books(summary, rows=6 * 16, staleness=1)

    def test_a_killed_worker_is_replaced_by_one_that_is_ready(self, tmp_path: Path) -> None:
        """It has made its engine before, and gets the newest weights then."""
        seen: list[tuple[str, int, int]] = []

        class Killer(L.Callback):
            victim = 0

            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                workers = trainer.datamodule.current_session.view().workers  # type: ignore[attr-defined]
                by_state = {worker.state: worker for worker in workers}
                if "standby" in by_state and not self.victim:
                    self.victim = by_state["serving"].pid
                    seen.append(("standby", by_state["standby"].rank, by_state["standby"].pid))
                    os.kill(self.victim, signal.SIGKILL)
                elif self.victim and by_state.get("lost") and by_state.get("serving"):
                    seen.append(("serving", by_state["serving"].rank, by_state["serving"].pid))
                    trainer.should_stop = True

        rollout = RolloutSettings(max_new_tokens=6, max_length=16, num_slots=8, reward_workers=0, standby=1)
        _fit(
            rl.make_data(rollout=rollout, log_dir=tmp_path / "logs"), Killer(), RunRecorder(tmp_path), max_steps=10_000
        )
        ready, serving = seen[0], seen[-1]
        assert ready[:2] == ("standby", -1)
        assert serving == ("serving", 0, ready[2])
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["workers_replaced"] == 1
        assert summary["rows_lost"] == summary["rows_duplicated"] == 0
        assert {"rollout-0.log", "rollout-standby.log"} <= {path.name for path in (tmp_path / "logs").iterdir()}

    def test_a_worker_that_was_stopped_on_standby_is_replaced(self, tmp_path: Path) -> None:
        """It has just taken the place of one that died."""

        class Stopper(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                workers = trainer.datamodule.current_session.view().workers  # type: ignore[attr-defined]
                by_state = {worker.state: worker for worker in workers}
                if {"standby", "serving"} <= by_state.keys() and "lost" not in by_state:
                    os.kill(by_state["standby"].pid, signal.SIGSTOP)
                    os.kill(by_state["serving"].pid, signal.SIGKILL)
                trainer.should_stop = sum(worker.state == "lost" for worker in workers) > 1 and "serving" in by_state

        rollout = RolloutSettings(max_new_tokens=6, max_length=16, num_slots=8, reward_workers=0, standby=1)
        _fit(rl.make_data(rollout=rollout), Stopper(), RunRecorder(tmp_path), max_steps=10_000)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["workers_replaced"] == 2
        assert summary["rows_lost"] == summary["rows_duplicated"] == 0

    def test_a_worker_that_hangs_is_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker_process, "_HANG_TIMEOUT_S", 2.0)
        _fit(rl.make_data(reward=rl.Freezing(tmp_path / "frozen", 40)), RunRecorder(tmp_path), max_steps=6)
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["workers_replaced"] == 1
        _check_books(summary, rows=6 * 16, staleness=1)

    def test_workers_come_and_go_and_no_row_is_lost(self, tmp_path: Path) -> None:
        """From one to three, to none for a while, to two; by hand and from the command line."""
        seen: list[int] = []

        class Scaler(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                data: Any = trainer.datamodule  # type: ignore[attr-defined]
                wish = {2: 3, 4: 0, 5: 2}.get(trainer.global_step)
                if wish is not None and trainer.global_step != 5:
                    data.scale("rollout", wish)
                if trainer.global_step == 4:
                    threading.Timer(1.0, self.by_command).start()
                seen.append(len([w for w in data.current_session.view().workers if w.state != "ended"]))

            def by_command(self) -> None:
                command = [sys.executable, "-m", "lightning_flashrl.cli.flashrl", "scale", str(tmp_path), "rollout=2"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                seen.append(-done.returncode)
                assert "2 rollout worker(s)" in done.stdout, done.stdout + done.stderr

        _fit(rl.make_data(), Scaler(), RunRecorder(tmp_path), max_steps=8)
        summary = json.loads((tmp_path / "summary.json").read_text())
        _check_books(summary, rows=8 * 16, staleness=1)
        assert summary["workers_replaced"] == 0
        assert max(seen) == 3
        assert 0 in seen
        assert not (tmp_path / "session.json").exists()

    def test_wishes_that_cannot_be_are_refused(self) -> None:
        class Scaler(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                data: Any = trainer.datamodule  # type: ignore[attr-defined]
                for role, number, said in (("critic", 1, "no 'critic' workers; it has rollout"), ("rollout", -1, "-1")):
                    with pytest.raises(ConfigurationError, match=said):
                        data.scale(role, number)

        _fit(rl.make_data(), Scaler(), max_steps=1)

    def test_a_worker_that_leaves_ends_the_run(self) -> None:
        """A user's ``sys.exit``, whatever its status."""
        with pytest.raises(WorkerFailedError, match="SystemExit"):
            _fit(rl.make_data(rollout_engine=lambda: sys.exit(0)))

    def test_a_worker_that_never_gets_anywhere_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However slowly it dies."""
        monkeypatch.setattr(fleet, "_MAX_DEATHS", 1)
        with pytest.raises(WorkerFailedError, match=r"left with status 3; 2 of its processes in a row have died"):
            _fit(rl.make_data(rollout_engine=lambda: os._exit(3)))

    def test_an_engine_that_raises_ends_the_run_with_its_traceback(self) -> None:
        def broken() -> Any:
            raise RuntimeError("no such accelerator")

        with pytest.raises(WorkerFailedError, match="no such accelerator"):
            _fit(rl.make_data(rollout_engine=broken))

    def test_nothing_is_left_when_the_trainer_is_killed(self, tmp_path: Path) -> None:
        job = subprocess.Popen(
            [sys.executable, str(JOB), str(tmp_path), "--max-steps", "100000"],
            env={**os.environ, "PYTHONPATH": str(JOB.parents[2]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        workers: list[int] = []
        while not workers:
            time.sleep(0.1)
            assert job.poll() is None
            if (tmp_path / "processes.json").exists():
                found = json.loads((tmp_path / "processes.json").read_text())["processes"]
                workers = [entry["pid"] for entry in found if entry["role"] == "rollout"]
        job.kill()
        job.wait()
        while any(_is_alive(pid) for pid in workers):
            time.sleep(0.05)


def _at_another_temperature() -> CausalLMTrainer:
    engine = rl.make_engine()
    engine.temperature = 0.5
    return engine


class SingleDeviceLookalike(Strategy):
    """A strategy of which nobody knows where its weights are."""

    reduce = broadcast = all_gather = lambda self, value, *_, **__: value
    root_device = torch.device("cpu")
    is_global_zero = True

    def barrier(self, name: str | None = None) -> None: ...

    def model_to_device(self) -> None: ...


class TestLightning:
    def test_a_run_goes_on_from_a_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "last.ckpt"
        _, trainer, _ = _fit(rl.make_data(workflow="sync"), max_steps=2)
        trainer.save_checkpoint(path)
        module, data = rl.make_module(rl.make_engine(seed=1)), rl.make_data(workflow="sync")
        rl.make_trainer(max_steps=4).fit(module, data, ckpt_path=path)
        assert module.policy_version == 4
        assert weights_sha256(dict(module.trainer_engine.weights())) == _fit(rl.make_data(workflow="sync"))[0]

    @pytest.mark.parametrize("max_staleness", [0, 2])
    def test_what_is_under_way_goes_into_the_checkpoint(self, tmp_path: Path, max_staleness: int) -> None:
        path = tmp_path / "last.ckpt"

        class StopAt3(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step == 3:
                    deadline_s = time.monotonic() + 30  # rows of later steps are there, some are being generated
                    while max_staleness and data.session().view().queue.tasks["update"].num_ready < 8:
                        assert time.monotonic() < deadline_s
                        time.sleep(0.01)
                    trainer.save_checkpoint(path)
                    trainer.should_stop = True

        data = rl.make_data(max_staleness=max_staleness, record=tmp_path / "first")
        _fit(data, StopAt3(), max_steps=20)
        state = torch.load(path, weights_only=True)["StreamingDataModule"]
        assert len(state["under_way"]) > (1000 if max_staleness else 0)
        module = rl.make_module(rl.make_engine(seed=1))
        data = rl.make_data(max_staleness=max_staleness, record=tmp_path / "second")
        recorder = RunRecorder(tmp_path / "out")
        rl.make_trainer(max_steps=6, callbacks=[recorder]).fit(module, data, ckpt_path=path)
        _check_books(json.loads((tmp_path / "out" / "summary.json").read_text()), 3 * 16, max_staleness)
        groups: list[int] = []
        for folder, steps in (("first", range(3)), ("second", range(3, 6))):
            record = StepRecord(tmp_path / folder, 0, 1)
            groups += [g for step in steps for lease in record.read(step) for g in lease["prompt.group_id"]]
        assert collections.Counter(groups) == collections.Counter(dict.fromkeys(range(24), 4))

    def test_precision_of_the_trainer_is_not_that_of_rollouts(self) -> None:
        """Workers prove new weights against log-probs in the weights' own precision."""
        _, _, module = _fit(rl.make_data(max_staleness=0), precision="bf16-mixed", max_steps=3)
        assert module.policy_version == 3
        assert 0 < module.last_step["mismatch/logprob_diff_max"] < 0.5

    @pytest.mark.parametrize("reward_workers", [0, 1])
    def test_what_fails_in_validation_counts_0(self, reward_workers: int) -> None:
        def picky(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
            if row["answer"] == "no":
                raise ValueError("no")
            if reward_workers and row["answer"] == "hang":
                time.sleep(1000)
            return 1.0

        rollout = RolloutSettings(
            max_new_tokens=6, max_length=16, num_slots=8, reward_workers=reward_workers, reward_timeout_s=1
        )
        answers = ["1", "no", "hang", "1"]
        validation = [Problem("1>", answer) for answer in answers] + [Problem("1" * 20 + ">", "1")]
        data = rl.make_data(reward=picky, rollout=rollout, validation=validation)
        with pytest.warns(UserWarning, match="counts 0 in validation"):
            _, trainer, _ = _fit(data, limit_val_batches=1.0, max_steps=1)
        right = 2 if reward_workers else 3
        assert trainer.callback_metrics["val/accuracy_greedy"] == pytest.approx(right / 5)

    def test_validation_answers_held_out_problems(self) -> None:
        _, trainer, _ = _fit(rl.make_data(), limit_val_batches=1.0, max_steps=2)
        assert {"val/accuracy_greedy", "val/accuracy_sampled"} <= trainer.callback_metrics.keys()

    def test_what_does_not_belong_together_is_refused(self) -> None:
        trainer = rl.make_trainer(max_steps=1)
        with pytest.raises(ConfigurationError, match="temperature"):
            trainer.fit(
                rl.make_module(rl.make_engine()),
                rl.make_data(rollout=RolloutSettings(max_new_tokens=6, max_length=16, temperature=0.5)),
            )
        for settings, said in (
            ({"max_epochs": 1, "max_steps": -1}, "prompts never end"),
            ({"plugins": MixedPrecision("16-mixed", "cpu")}, "bf16-mixed"),
            ({"strategy": SingleDeviceLookalike()}, "under SingleDeviceLookalike"),
        ):
            with pytest.raises(ConfigurationError, match=said):
                rl.make_trainer(**{"max_steps": 1, **settings}).fit(rl.make_module(rl.make_engine()), rl.make_data())
        module = AsyncRL(rl.make_engine(), GRPO(kl_coefficient=0.1), reference_engine=_at_another_temperature())
        with pytest.raises(ConfigurationError, match=r"reference_engine\.temperature"):
            trainer.fit(module, rl.make_data())
        with pytest.raises(ConfigurationError, match="group_size=1"):
            trainer.fit(rl.make_module(rl.make_engine()), rl.make_data(steps=StepSettings(prompts=4, group_size=1)))
        with pytest.raises(ConfigurationError, match="StreamingDataModule"):
            rl.make_trainer(max_steps=1).fit(
                rl.make_module(rl.make_engine()), L.LightningDataModule.from_datasets([1], [1])
            )

    @pytest.mark.parametrize(
        "settings",
        [
            {"workflow": "fast"},
            {"max_staleness": -1},
            {"steps_per_epoch": 0},
            {"prompts": []},
            {"prompts": 3},
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            rl.make_data(**settings)

    @pytest.mark.parametrize("name", ["prompts", "group_size", "micro_batch_tokens"])
    def test_steps_of_nothing_are_refused(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match=name):
            StepSettings(**{name: 0})


def test_threads_end_with_the_run() -> None:
    _fit(rl.make_data(), max_steps=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flashrl")]
