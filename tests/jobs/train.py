"""A job of many features, for fault tests: trains, then writes a digest of everything that must be exact.

``--strategy flash_ddp`` under ``flashrun``, ``--strategy ddp`` under ``torchrun``: same digest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

import lightning as L  # noqa: E402
import torchmetrics  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

import lightning_flashrl  # noqa: E402, F401

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--strategy", default="flash_ddp")
    parser.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=6, help="batches of an epoch per rank")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--clip", type=float, default=None)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--val-every", type=int, default=None, help="validate every N batches")
    parser.add_argument("--sanity", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=None)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--data", default="map", choices=["map", "iterable", "stateful"])
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--ddp", default="{}", help="JSON of DDP arguments")
    parser.add_argument("--feature", action="append", default=[])
    parser.add_argument("--die", default="", help="rank:step:hook:signal, in the job's own hooks; first process only")
    return parser.parse_args()


args = parse()
RANK = int(os.environ.get("RANK", "0"))
INCARNATION = int(os.environ.get("FLASHRL_INCARNATION", "0"))
HAS = set(args.feature)


def die(hook: str, step: int) -> None:
    """Strike this process in one of its own hooks."""
    if not args.die or INCARNATION:
        return
    rank, at, where, how = (args.die.split(":") + ["KILL"])[:4]
    if RANK == int(rank) and step == int(at) and hook == where:
        os.kill(os.getpid(), getattr(signal, f"SIG{how}"))


class Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random images, randomly augmented by whoever loads them."""

    def __init__(self, size: int, augment: bool) -> None:
        self.size, self.augment = size, augment

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(8, 16, generator=generator)
        if self.augment:
            image = image + 0.1 * torch.randn(8, 16) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return image, torch.randint(0, 10, (), generator=generator)


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images without a length, each rank its own."""

    def __init__(self, size: int) -> None:
        self.images = Images(10_000, augment=True)
        self.size = size

    def __iter__(self) -> Any:
        world, info = int(os.environ.get("WORLD_SIZE", "1")), get_worker_info()
        first, every = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.size, every):
            yield self.images[(index * world + RANK) % len(self.images)]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        width = args.width
        norm: list[nn.Module] = [nn.BatchNorm1d(8)] if "batchnorm" in HAS else []
        self.body = nn.Sequential(*norm, nn.Linear(16, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, width), nn.GELU())
        self.deep = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(width, 10)
        if "unused" in HAS:
            self.extra = nn.Linear(width, 10)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.losses: list[torch.Tensor] = []
        self.seen = 0
        self.automatic_optimization = not args.manual
        if args.manual:
            self.critic = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.deep(self.body(x)).mean(1)
        if "unused" in HAS and self.training and (self.seen % 2 == 0):
            return self.extra(hidden)
        return self.head(hidden)

    def training_step(self, batch: Any, index: int) -> Any:
        die("forward", self.global_step)
        x, y = batch
        self.seen += len(y)
        if args.manual:
            return self._manual_step(x, y)
        logits = self(x)
        logits.register_hook(lambda grad: die("backward", self.global_step)) if logits.requires_grad else None
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log("local", loss * 2, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.losses.append(loss.detach())
        if "gather" in HAS:
            everyone = self.all_gather(loss.detach())
            self.log("spread", everyone.max() - everyone.min())
        return {"loss": loss, "logits": logits.detach()}

    def _manual_step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        first, second = self.optimizers()
        loss = nn.functional.cross_entropy(self(x), y)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        die("between", self.global_step)
        critic = (self.critic(x.mean(1)) - loss.detach()).square().mean()
        second.zero_grad()
        self.manual_backward(critic)
        second.step()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        self.losses.append(loss.detach())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if "gradnorm" in HAS:
            self.log("gradnorm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())
        die("before_step", self.global_step)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        die("batch_start", self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        die("batch_end", self.global_step)
        if "endsync" in HAS:
            total = torch.tensor([float(self.seen)])
            dist.all_reduce(total)
            self.total_seen = total.item()
        die("batch_end_late", self.global_step)

    def on_train_epoch_end(self) -> None:
        die("epoch_end", self.global_step)
        self.log("epoch_mean", torch.stack(self.losses).mean(), sync_dist=True)
        self.losses.clear()
        die("epoch_end_late", self.global_step)

    def validation_step(self, batch: Any, index: int) -> None:
        if index == 1:
            die("sanity" if self.trainer.sanity_checking else "validation", self.global_step)
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        die("validation_end", self.global_step)

    def on_train_end(self) -> None:
        die("train_end", self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        die("checkpoint", self.global_step)

    def configure_optimizers(self) -> Any:
        if args.manual:
            critic = set(self.critic.parameters())
            return [torch.optim.AdamW([p for p in self.parameters() if p not in critic], 1e-3), torch.optim.SGD(self.critic.parameters(), 1e-2, 0.9)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loader(self, size: int, train: bool) -> Any:
        if train and args.data == "iterable":
            return DataLoader(Stream(size), batch_size=4, num_workers=args.workers)
        dataset = Images(size * int(os.environ.get("WORLD_SIZE", "1")), augment=train)
        if train and args.data == "stateful":
            from torchdata.stateful_dataloader import StatefulDataLoader

            return StatefulDataLoader(dataset, batch_size=4, shuffle=True, num_workers=args.workers)
        return DataLoader(dataset, batch_size=4, shuffle=train, num_workers=args.workers if train else 0)

    def train_dataloader(self) -> Any:
        return self._loader(4 * args.batches, train=True)

    def val_dataloader(self) -> Any:
        return self._loader(12, train=False)


def digest(module: Model, trainer: L.Trainer) -> dict[str, Any]:
    def of(*tensors: torch.Tensor) -> str:
        sha = hashlib.sha256()
        for tensor in tensors:
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    moments = []
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments += [v for _, v in sorted(optimizer.state[parameter].items()) if isinstance(v, torch.Tensor)]
    loop = trainer.fit_loop.state_dict()
    found = {
        "weights": of(*module.state_dict().values()),
        "optimizers": of(*moments),
        "lr": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "schedulers": [config.scheduler.state_dict()["last_epoch"] for config in trainer.lr_scheduler_configs],
        "torch_rng": of(torch.get_rng_state()),
        "python_rng": hashlib.sha256(repr(random.getstate()).encode()).hexdigest()[:16],
        "numpy_rng": hashlib.sha256(np.random.get_state()[1].tobytes() + repr(np.random.get_state()[2:]).encode()).hexdigest()[:16],
        "loops": json.loads(json.dumps(loop, default=str)),
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {k: float(v) for k, v in sorted(trainer.callback_metrics.items())},
        "seen": module.seen,
        "callbacks": {str(k): repr(v) for k, v in sorted(_callback_states(trainer).items())},
    }
    found["loops"].get("state_dict", {}).clear()
    logger = trainer.logger
    if isinstance(logger, CSVLogger) and trainer.is_global_zero:
        found["csv"] = (Path(logger.log_dir) / "metrics.csv").read_text()
    return found


def _callback_states(trainer: L.Trainer) -> dict[str, Any]:
    states = {}
    for callback in trainer.callbacks:
        state = callback.state_dict()
        if isinstance(callback, ModelCheckpoint):
            state = {k: v for k, v in state.items() if "dir" not in k and "path" not in k and "best_k" not in k and "kth" not in k}
            state["files"] = sorted(Path(p).name for p in callback.best_k_models)
        states[callback.state_key[:40]] = state
    return states


def main() -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(7, verbose=False)
    callbacks: list[Any] = []
    logger: Any = False
    if "csv" in HAS:
        logger = CSVLogger(out, flush_logs_every_n_steps=4)
        callbacks.append(LearningRateMonitor("step"))
    if "wandb" in HAS:
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(save_dir=out, offline=True)
    if args.checkpoint_every:
        callbacks.append(ModelCheckpoint(out / "ckpt", every_n_train_steps=args.checkpoint_every, save_top_k=-1))
    if "best" in HAS:
        callbacks.append(ModelCheckpoint(out / "best", monitor="val_loss", save_top_k=1))
    if "earlystop" in HAS:
        callbacks.append(EarlyStopping("val_loss", patience=50))
    if "ema" in HAS:
        callbacks.append(WeightAveraging(avg_fn=lambda average, new, n: 0.9 * average + 0.1 * new))
    strategy: Any = args.strategy
    ddp = json.loads(args.ddp)
    if strategy == "flash_ddp" and ddp:
        from lightning_flashrl import FlashDDPStrategy

        strategy = FlashDDPStrategy(**ddp)
    elif strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        strategy = DDPStrategy(process_group_backend="gloo", **ddp)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=strategy,
        max_epochs=args.epochs if args.max_steps < 0 else -1,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip,
        precision=args.precision,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=1,
        num_sanity_val_steps=args.sanity,
        val_check_interval=args.val_every,
        check_val_every_n_epoch=None if args.val_every else 1,
        limit_train_batches=args.batches if args.data == "iterable" else None,
        enable_checkpointing=bool(args.checkpoint_every) or "best" in HAS,
        enable_progress_bar="bar" in HAS,
        enable_model_summary=False,
        default_root_dir=out,
    )
    module = Model()
    trainer.fit(module, ckpt_path=args.resume, weights_only=False)
    (out / f"digest{RANK}.json").write_text(json.dumps(digest(module, trainer), indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
