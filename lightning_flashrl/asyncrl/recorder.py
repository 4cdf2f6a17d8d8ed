"""A run's record: what happened in each step, which processes there are, and what came out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.datamodule import StreamingDataModule
from lightning_flashrl.asyncrl.module import AsyncRL
from lightning_flashrl.asyncrl.processes import list_processes, write_processes
from lightning_flashrl.asyncrl.session import HostSession

_LOOK_S = 0.5
_RANKS = ".ranks"
"""Where each rank leaves its process number."""
_WINDOW = 5
"""Steps at either end over which the summary's first and last reward are averaged."""

SUMMARY_KEYS = {
    "steps": "optimizer steps",
    "reward_first": f"mean reward of the rows of the first {_WINDOW} steps",
    "reward_last": f"mean reward of the rows of the last {_WINDOW} steps",
    "accuracy_first": "share of held-out problems answered rightly before training, sampled as rollouts are",
    "accuracy_last": "the same after training",
    "greedy_accuracy_first": "the same with the likeliest tokens, before training",
    "greedy_accuracy_last": "the same with the likeliest tokens, after training",
    "rows_generated": "completions that rollouts wrote",
    "rows_trained": "completions that were trained",
    "rows_dropped": "completions that were left out on purpose: failed rewards, groups without information, too old",
    "rows_lost": "rows that were put and are neither trained nor dropped nor in the queue; 0 unless something broke",
    "rows_duplicated": "rows that were trained more than once; 0 unless something broke",
    "rows_left": "rows that were still in the queue when training ended",
    "staleness_max": "largest staleness of a trained row, in policy versions",
    "staleness_mean": "mean staleness of the trained rows",
    "tokens_per_s": "tokens of prompts and completions that were trained, over the time of the steps",
    "samples_per_s": "completions that were trained, over the time of the steps",
    "trainer_idle_share": "share of the time of the steps, from the first row on, in which rank 0 waited for rows",
    "rollout_idle_share": "share of the workers' time in which they had nothing to generate",
    "exposed_sync_s": "time that training waited for the copy of its weights",
    "workers_replaced": "rollout workers that died and were replaced",
    "recoveries": "recoveries of trainer ranks",
    "wall_s": "time from the start of the rollout workers to the end of training",
    "weights_sha256": "hash of the trained weights",
}
"""What ``summary.json`` holds."""


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """Return a hash of weights: of names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RunRecorder(L.Callback):
    """Writes a run's record into a folder, on rank 0: for reports, for ``flashrl status``, for people.

    * ``history.jsonl``: a line for each step and each validation.
    * ``processes.json``: every process of the run, twice a second.
    * ``summary.json``: at the end; see :data:`SUMMARY_KEYS`.

    Args:
        output_dir: the folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self._steps: list[dict[str, Any]] = []
        self._validations: list[dict[str, Any]] = []
        self._books: dict[str, float] = {}
        self._began_s = 0.0
        self._ended_s = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ processes
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch the run's processes."""
        ranks = self.output_dir / _RANKS
        ranks.mkdir(parents=True, exist_ok=True)
        (ranks / str(trainer.global_rank)).write_text(str(os.getpid()))
        if not trainer.is_global_zero:
            return
        if os.environ.get("FLASHRL_INCARNATION", "0") == "0":
            for name in ("history.jsonl", "summary.json"):
                (self.output_dir / name).unlink(missing_ok=True)
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, args=(trainer,), name="flashrl-recorder", daemon=True)
        self._thread.start()

    def _watch(self, trainer: L.Trainer) -> None:
        while True:
            is_over = self._over.wait(_LOOK_S)
            known = {}
            for path in (self.output_dir / _RANKS).iterdir():
                with contextlib.suppress(ValueError):
                    known[int(path.read_text())] = ("trainer", int(path.name), "")
            session = getattr(getattr(trainer, "datamodule", None), "current_session", None)
            if isinstance(session, HostSession):
                known |= {worker.pid: (worker.role, worker.rank, worker.state) for worker in session.workers()}
            root = int(os.environ.get("FLASHRL_ROOT_PID", os.getpid()))
            with contextlib.suppress(OSError):
                write_processes(self.output_dir / "processes.json", list_processes(root, known))
            if is_over:
                return

    # ------------------------------------------------------------------ history
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down how good the policy is before it is trained."""
        self._validated(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._began_s = clock.now_s()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take down a step."""
        assert isinstance(pl_module, AsyncRL)
        if not trainer.is_global_zero or pl_module.last_step is None:
            return
        line = {"step": pl_module.policy_version, "at_s": clock.now_s() - self._began_s, **pl_module.last_step}
        if not self._steps or self._steps[-1]["step"] < line["step"]:
            self._steps.append(line)
            self._append({"kind": "step", **line})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down how good the policy is."""
        if not trainer.sanity_checking:
            self._validated(trainer)

    def _validated(self, trainer: L.Trainer) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if not trainer.is_global_zero or not metrics:
            return
        at_s = clock.now_s() - self._began_s if self._began_s else 0.0
        line = {"step": trainer.global_step, "at_s": at_s, **metrics}
        self._validations.append(line)
        self._append({"kind": "validation", **line})

    def _append(self, line: dict[str, Any]) -> None:
        with (self.output_dir / "history.jsonl").open("a") as history:
            history.write(json.dumps(line) + "\n")

    # ------------------------------------------------------------------ the end
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Balance the books while the queue is there."""
        self._ended_s = clock.now_s()
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, StreamingDataModule) and isinstance(data.current_session, HostSession):
            self._books = data.current_session.books()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary."""
        assert isinstance(pl_module, AsyncRL)
        if trainer.is_global_zero:
            self.write_summary(pl_module)
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            shutil.rmtree(self.output_dir / _RANKS, ignore_errors=True)

    @property
    def last_validated_step(self) -> int:
        """Optimizer steps before the last validation; −1 if there was none."""
        return int(self._validations[-1]["step"]) if self._validations else -1

    def write_summary(self, module: AsyncRL) -> dict[str, Any]:
        """Write ``summary.json`` (again, after a later validation) and return what it holds."""
        summary = self.summary(module)
        (self.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def summary(self, module: AsyncRL) -> dict[str, Any]:
        """Return what came out; see :data:`SUMMARY_KEYS`."""
        steps, validations = self._steps, self._validations
        books = dict(self._books)
        rows = sum(step["rows"] for step in steps)
        committed = books.pop("rows_committed", 0.0)
        spent_s = sum(step["step_s"] for step in steps) or 1.0

        def mean(name: str, some: list[dict[str, Any]]) -> float | None:
            return sum(step[name] for step in some) / len(some) if some else None

        def accuracy(how: str, index: int) -> float | None:
            return validations[index].get(f"val/accuracy_{how}") if validations else None

        found = {
            "steps": module.policy_version,
            "reward_first": mean("reward", steps[:_WINDOW]),
            "reward_last": mean("reward", steps[-_WINDOW:]),
            "accuracy_first": accuracy("sampled", 0),
            "accuracy_last": accuracy("sampled", -1),
            "greedy_accuracy_first": accuracy("greedy", 0),
            "greedy_accuracy_last": accuracy("greedy", -1),
            **{name: int(value) for name, value in books.items() if name.startswith("rows_")},
            "rows_trained": int(rows),
            "rows_duplicated": int(max(0, rows - committed)),
            "staleness_max": int(max((step["staleness/max"] for step in steps), default=0)),
            "staleness_mean": mean("staleness/oldest", steps),
            "tokens_per_s": sum(step["tokens"] for step in steps) / spent_s,
            "samples_per_s": rows / spent_s,
            "trainer_idle_share": sum(step["waited_s"] for step in steps) / spent_s,
            "rollout_idle_share": books.get("rollout_idle_share", 0.0),
            "exposed_sync_s": books.get("exposed_sync_s", 0.0),
            "workers_replaced": int(books.get("workers_replaced", 0)),
            "recoveries": getattr(module.trainer.strategy, "num_recoveries", 0),
            "wall_s": self._ended_s - self._began_s,
            "weights_sha256": weights_sha256(dict(module.trainer_engine.weights())),
        }
        return {name: found[name] for name in SUMMARY_KEYS}
