"""What a run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_flashrl.asyncrl.module import AsyncRL

_NUM_LINES = 10


def _told(step: dict[str, float]) -> str:
    parts = [
        f"reward {step['reward']:.3f}",
        f"staleness {step['staleness/oldest']:.1f}",
        f"{step['tokens_per_s']:,.0f} tokens/s",
        f"idle: trainer {step['idle_share/trainer']:.0%}",
    ]
    if "idle_share/rollout" in step:
        parts.append(f"rollout {step['idle_share/rollout']:.0%}")
    return " · ".join(parts)


class RunProgress(L.Callback):
    """Shows steps, reward, staleness, tokens a second and idle shares.

    Args:
        console: where to.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress: Progress | None = None
        self._bar: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to show."""
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}"),
            console=self._console,
        )
        self._bar = self._progress.add_task("", total=trainer.max_steps if trainer.max_steps > 0 else None, told="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a step."""
        if not trainer.is_global_zero or not isinstance(pl_module, AsyncRL) or pl_module.last_step is None:
            return
        step, told = pl_module.policy_version, _told(pl_module.last_step)
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, told=told)
        elif step == 1 or step % max(1, trainer.max_steps // _NUM_LINES) == 0:
            total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            self._console.print(f"step {step}{total} · {told}", highlight=False, soft_wrap=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show how good the policy is."""
        metrics = trainer.callback_metrics
        if trainer.sanity_checking and os.environ.get("FLASHRL_INCARNATION", "0") != "0":
            return  # said by a predecessor
        if trainer.is_global_zero and "val/accuracy_greedy" in metrics:
            when = "before training" if trainer.sanity_checking else f"after {trainer.global_step} steps"
            self._console.print(
                f"held-out accuracy {when}: greedy {float(metrics['val/accuracy_greedy']):.3f}, sampled "
                f"{float(metrics['val/accuracy_sampled']):.3f}",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop showing."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop showing."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
