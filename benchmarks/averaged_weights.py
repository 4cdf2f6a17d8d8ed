"""What flash_ddp costs when a callback keeps averaged weights (EMA), which each rank publishes at every step.

The same Lightning job, 2 ranks, under ``flashrun`` with ``flash_ddp`` and under ``torchrun`` with stock ``ddp``, in the
order A B B A. A run's figures are the median time between two ends of ``on_train_batch_end`` on rank 0, and the
processor's time that the process used in it, which other work on the machine disturbs less.

    python benchmarks/averaged_weights.py --millions 10.5 40
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_RANKS, NUM_LAYERS, NUM_WARM_UP = 2, 10, 5
LAUNCHERS = {
    "flash_ddp": ["lightning_flashrl.cli.flashrun", "--nproc-per-node", str(NUM_RANKS)],
    "ddp": ["torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)],
}


def train(strategy: str, millions: float, num_steps: int, out: Path) -> None:
    """The job of one rank."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import Callback, WeightAveraging
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    import lightning_flashrl  # noqa: F401

    width = round(math.sqrt(millions * 1e6 / NUM_LAYERS))

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(NUM_LAYERS)])

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.layers(batch).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Clock(Callback):
        def __init__(self) -> None:
            self.ends_s: list[tuple[float, float]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.ends_s.append((time.monotonic(), time.process_time()))

    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=NUM_RANKS,
        strategy=strategy,
        max_steps=num_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.99)), clock],
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(10_000, width), batch_size=4))
    if trainer.is_global_zero:
        ends_s = clock.ends_s[NUM_WARM_UP:]
        steps_s = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends_s)]
        out.write_text(json.dumps([statistics.median(column) * 1e3 for column in zip(*steps_s, strict=True)]))


def measure(strategy: str, millions: float, num_steps: int) -> tuple[float, float]:
    """Milliseconds a step of one job, by the clock and of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step_ms.json"
        job = [__file__, "--train", strategy, "--millions", str(millions), "--steps", str(num_steps), "--out", str(out)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", *LAUNCHERS[strategy], *job], check=True, env=environ, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wall_ms, processor_ms = json.loads(out.read_text())
        return wall_ms, processor_ms


def main() -> None:
    """Run the jobs and print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--millions", type=float, nargs="+", default=[10.5, 40.0], help="parameters of the model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--train", choices=list(LAUNCHERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.millions[0], arguments.steps, arguments.out)
        return
    for millions in arguments.millions:
        found: dict[str, list[tuple[float, float]]] = {strategy: [] for strategy in LAUNCHERS}
        for strategy in ("ddp", "flash_ddp", "flash_ddp", "ddp"):
            found[strategy].append(measure(strategy, millions, arguments.steps))
        for strategy, runs in found.items():
            wall, processor = (" ".join(f"{ms:.0f}" for ms in column) for column in zip(*runs, strict=True))
            sys.stdout.write(f"{millions} M parameters, {strategy}: {wall} ms a step; processor {processor} ms\n")


if __name__ == "__main__":
    main()
