"""Writes which phases a fit passes and how many updates each counts: ``phases.py OUT [--manual] [--accumulate N]``."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")

import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

import lightning_flashrl  # noqa: E402
from lightning_flashrl.strategies.runtime import RecoveryRuntime  # noqa: E402
from lightning_flashrl.types import Phase  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(L.LightningModule):
    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.layer = nn.Linear(2, 1)
        self.critic = nn.Linear(2, 1) if manual else None

    def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
        if self.automatic_optimization:
            return self.layer(batch[0]).mean()
        for layer, optimizer in zip((self.layer, self.critic), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).mean())
            optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.layer(batch[0]).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        layers = [self.layer] if self.critic is None else [self.layer, self.critic]
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in layers]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()
    passed: list[str] = []
    enter_phase = RecoveryRuntime.enter_phase

    def noting(self: RecoveryRuntime, phase: Phase) -> None:
        enter_phase(self, phase)
        heartbeat = self.slot.heartbeat()
        passed.append(f"{heartbeat.global_step} {Phase(heartbeat.phase).name.lower()}")

    RecoveryRuntime.enter_phase = noting  # type: ignore[method-assign]
    data = DataLoader(TensorDataset(torch.ones(2, 2)))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=lightning_flashrl.FlashDDPStrategy(find_unused_parameters=args.manual),
        max_epochs=1,
        accumulate_grad_batches=args.accumulate,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        callbacks=[ModelCheckpoint(args.out / "ckpt", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.out,
    )
    trainer.fit(Model(args.manual), data, data)
    (args.out / "passed").write_text("\n".join(passed))


if __name__ == "__main__":
    main()
