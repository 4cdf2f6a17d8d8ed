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
import msgspec
import torch

from lightning_flashrl import clock
from lightning_flashrl.asyncrl.datamodule import StreamingDataModule
from lightning_flashrl.asyncrl.history import (
    HISTORY,
    KILLS,
    append_history,
    mend_history,
    read_history,
    read_kills,
)
from lightning_flashrl.asyncrl.host import HostAddress
from lightning_flashrl.asyncrl.module import AsyncRL
from lightning_flashrl.asyncrl.processes import list_processes, write_processes
from lightning_flashrl.asyncrl.session import LeadSession
from lightning_flashrl.errors import FlashRLError
from lightning_flashrl.files import replacing
from lightning_flashrl.supervisor.protocol import RecoveryRecord

_LOOK_S = 0.5
_RANKS = ".ranks"
"""Where each rank leaves its process number."""
_BEGAN, _BOOKS = "began", "books"
"""… and rank 0, for its successors, when training began, and what had become of all rows at its end."""
_WINDOW = 5
"""Steps at either end over which the summary's first and last reward are averaged."""

SUMMARY_KEYS = {
    "steps": "optimizer steps",
    "steps_lost": "optimizer steps that are missing in the history; 0 unless something broke",
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
    "rows_resumed": "completions that one worker had begun when it ended, and another one went on with",
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
    "recovery_ms": "by role, from the loss of each process until its successor was at work",
    "kills": "processes of the run that were killed on purpose",
    "wall_s": "time from the start of the rollout workers to the end of training",
    "weights_sha256": "hash of the trained weights",
}
"""What ``summary.json`` holds. ``rows_*`` count from the last start, which may have been from a checkpoint."""


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
    * ``session.json``: how the run's host is reached, while it goes on; for this user only.
    * ``summary.json``: at the end; see :data:`SUMMARY_KEYS`.

    Args:
        output_dir: the folder.

    Attributes:
        last_validated_step: optimizer steps before the last validation; −1 if there was none. The same on all ranks.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.last_validated_step = -1
        self._last_step = 0.0
        self._started_at = 0
        self._pid = os.getpid()
        self._is_successor = False
        self._books: dict[str, Any] = {}
        self._rank_recovery_ms: list[float] = []
        self._began_s = 0.0
        self._ended_s = 0.0
        self._announced: HostAddress | None = None
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
            for name in (HISTORY, "summary.json", KILLS):
                (self.output_dir / name).unlink(missing_ok=True)
            (ranks / _BEGAN).unlink(missing_ok=True)
            (ranks / _BOOKS).unlink(missing_ok=True)
            self._began_s = 0.0
        else:
            self._is_successor = True
            mend_history(self.output_dir)
            with contextlib.suppress(FileNotFoundError, ValueError):
                self._began_s = float((ranks / _BEGAN).read_text())
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
            if isinstance(session, LeadSession):
                self._announce(session)
                with contextlib.suppress(FlashRLError):  # said in the training loop
                    view = session.view()
                    known = {view.pid: ("queue", -1, "")} | known
                    known |= {worker.pid: (worker.role, worker.rank, worker.state) for worker in view.workers}
            root = os.getppid() if "FLASHRL_SLOT_FDS" in os.environ else os.getpid()  # a rank's parent is the root
            with contextlib.suppress(OSError):
                write_processes(self.output_dir / "processes.json", list_processes(root, known))
            if is_over:
                return

    def _announce(self, session: LeadSession) -> None:
        """Write down how the host is reached."""
        if session.address != self._announced:
            self._announced = session.address
            path = self.output_dir / "session.json"
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(msgspec.json.encode(session.address))

    # ------------------------------------------------------------------ history
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down how good the policy is before it is trained."""
        if not self._is_successor:
            self._validated(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        assert isinstance(pl_module, AsyncRL)
        self._started_at = pl_module.policy_version
        runtime = getattr(trainer.strategy, "runtime", None)
        if self._is_successor and runtime is not None and not runtime.is_newcomer:  # the job goes on from a checkpoint
            mend_history(self.output_dir, pl_module.policy_version)
            for path in (self.output_dir / _RANKS / _BOOKS, self.output_dir / "summary.json"):
                path.unlink(missing_ok=True)
        if not self._began_s:
            self._began_s = clock.now_s()
            if trainer.is_global_zero:
                (self.output_dir / _RANKS / _BEGAN).write_text(str(self._began_s))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take down a step."""
        assert isinstance(pl_module, AsyncRL)
        if not trainer.is_global_zero or pl_module.last_step is None:
            return
        line = {"step": pl_module.policy_version, "at_s": clock.now_s() - self._began_s, **pl_module.last_step}
        if self._pid != os.getpid():  # this has been taken over: its writer may have come further
            self._pid = os.getpid()
            with contextlib.suppress(FileNotFoundError):
                steps, _ = read_history(self.output_dir)
                self._last_step = steps[-1]["step"] if steps else 0.0
        if line["step"] > self._last_step:
            self._last_step = line["step"]
            append_history(self.output_dir, {"kind": "step", **line})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down how good the policy is."""
        if not trainer.sanity_checking:
            self._validated(trainer)

    def _validated(self, trainer: L.Trainer) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.last_validated_step = trainer.global_step
        if not trainer.is_global_zero or not metrics:
            return
        at_s = clock.now_s() - self._began_s if self._began_s else 0.0
        line = {"step": trainer.global_step, "at_s": at_s, **metrics}
        append_history(self.output_dir, {"kind": "validation", **line})

    def on_recovery_end(self, trainer: L.Trainer, pl_module: L.LightningModule, record: RecoveryRecord) -> None:
        """Take down how long a rank was gone; see :class:`~lightning_flashrl.FlashRecovery`."""
        if record.lost and record.is_complete:
            self._rank_recovery_ms.append(record.timings_ms["total"])

    # ------------------------------------------------------------------ the end
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Balance the books while the queue is there."""
        self._ended_s = clock.now_s()
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, StreamingDataModule) and isinstance(data.current_session, LeadSession):
            path = self.output_dir / _RANKS / _BOOKS
            known = [found for found in (path, self.output_dir / "summary.json") if found.exists()]
            if known:  # a predecessor has done so, and perhaps ended the queue
                self._books = json.loads(known[0].read_text())
            else:
                session = data.current_session
                recovery_ms = {"trainer": self._rank_recovery_ms, **session.view().recovery_ms}
                self._books = {**session.books(), "recovery_ms": recovery_ms}
                with replacing(path) as beside:
                    beside.write_text(json.dumps(self._books))

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
            self._announced = None
            (self.output_dir / "session.json").unlink(missing_ok=True)
            shutil.rmtree(self.output_dir / _RANKS, ignore_errors=True)

    def write_summary(self, module: AsyncRL) -> dict[str, Any]:
        """Write ``summary.json`` (again, after a later validation) and return what it holds."""
        summary = self.summary(module)
        (self.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def summary(self, module: AsyncRL) -> dict[str, Any]:
        """Return what came out; see :data:`SUMMARY_KEYS`."""
        steps, validations = read_history(self.output_dir) if self._last_step else ([], [])
        books = dict(self._books)
        rows = sum(step["rows"] for step in steps)
        trained = sum(step["rows"] for step in steps if step["step"] > self._started_at)
        committed = books.pop("rows_committed", trained)
        spent_s = sum(step["step_s"] for step in steps) or 1.0

        def mean(name: str, some: list[dict[str, Any]]) -> float | None:
            return sum(step[name] for step in some) / len(some) if some else None

        def accuracy(how: str, index: int) -> float | None:
            return validations[index].get(f"val/accuracy_{how}") if validations else None

        found = {
            "steps": module.policy_version,
            "steps_lost": int(max((step["step"] for step in steps), default=0)) - len({step["step"] for step in steps}),
            "reward_first": mean("reward", steps[:_WINDOW]),
            "reward_last": mean("reward", steps[-_WINDOW:]),
            "accuracy_first": accuracy("sampled", 0),
            "accuracy_last": accuracy("sampled", -1),
            "greedy_accuracy_first": accuracy("greedy", 0),
            "greedy_accuracy_last": accuracy("greedy", -1),
            **{name: int(books.get(name, 0)) for name in SUMMARY_KEYS if name.startswith("rows_")},
            "rows_trained": int(trained),
            "rows_duplicated": int(max(0, trained - committed)),
            "staleness_max": int(max((step["staleness/max"] for step in steps), default=0)),
            "staleness_mean": mean("staleness/oldest", steps),
            "tokens_per_s": sum(step["tokens"] for step in steps) / spent_s,
            "samples_per_s": rows / spent_s,
            "trainer_idle_share": sum(step["waited_s"] for step in steps) / spent_s,
            "rollout_idle_share": books.get("rollout_idle_share", 0.0),
            "exposed_sync_s": books.get("exposed_sync_s", 0.0),
            "workers_replaced": int(books.get("workers_replaced", 0)),
            "recoveries": getattr(module.trainer.strategy, "num_recoveries", 0),
            "recovery_ms": books.get("recovery_ms", {}),
            "kills": len(read_kills(self.output_dir)),
            "wall_s": self._ended_s - self._began_s,
            "weights_sha256": weights_sha256(dict(module.trainer_engine.weights())),
        }
        return {name: found[name] for name in SUMMARY_KEYS}
