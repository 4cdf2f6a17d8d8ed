"""The benchmark job in Lightning: under ``flashrun`` with ``flash_ddp``, under ``torchrun`` with ``ddp``."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from language_model import SHAPES, LanguageModel, Samples, Shape, hash_of, loss_of, make_optimizer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from step_log import StepLog
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_flashrl  # noqa: F401 - registers the strategy

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
_computed: list[int] = []


class Job(L.LightningModule):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = LanguageModel(shape)

    def training_step(self, samples: Tensor, index: int) -> Tensor:
        _computed.append(index)
        return loss_of(self.model, samples)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)


class Steps(Callback):
    """Logs each update that this process computed.

    A replacement may only call the last hooks of a batch that its predecessor has committed. The log is no attribute:
    what a callback keeps is part of what a replacement gets.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if _computed:
            _computed.clear()
            _log.write("step", trainer.global_step, WORLD_SIZE)


def main(arguments: argparse.Namespace) -> None:
    shape = SHAPES[arguments.shape]
    callbacks: list[Callback] = [Steps()]
    checkpoint = None
    if arguments.checkpoint_every:
        folder = Path(arguments.folder) / "checkpoints"
        kept = ModelCheckpoint(folder, every_n_train_steps=arguments.checkpoint_every, save_last="link", save_top_k=1)
        callbacks.append(kept)
        checkpoint = folder / "last.ckpt"
    is_flash = arguments.strategy == "flash_ddp"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="flash_ddp" if is_flash else DDPStrategy(process_group_backend="gloo"),
        max_steps=arguments.steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=arguments.folder,
    )
    job = Job(shape)
    samples = Samples(shape, (arguments.steps + 1) * shape.batch_size * WORLD_SIZE)
    # Lightning resumes in the middle of an epoch only with a loader that keeps its own position.
    loader = (StatefulDataLoader if checkpoint is not None else DataLoader)(samples, batch_size=shape.batch_size)
    resumed = checkpoint if checkpoint is not None and checkpoint.exists() else None
    if arguments.profile:
        import step_profile

        step_profile.install()
    trainer.fit(job, loader, ckpt_path=resumed, weights_only=False)
    if arguments.profile:
        step_profile.save(Path(arguments.folder) / f"profile{RANK}.json")
    _log.write("end", trainer.global_step, WORLD_SIZE, hash_of(job.model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="folder of the job")
    parser.add_argument("--strategy", choices=["flash_ddp", "ddp"], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="recovery")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="time the parts of flash_ddp's own work")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    _log = StepLog(given.folder, RANK)
    main(given)
