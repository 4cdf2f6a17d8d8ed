"""A job of many features, for fault tests: trains, then writes a digest of everything that must be exact.

``--strategy flash_ddp`` under ``flashrun``, ``--strategy ddp`` under ``torchrun``: same digest.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

import lightning as L  # noqa: E402
import torchmetrics  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

import lightning_flashrl  # noqa: E402, F401
from lightning_flashrl.recovery.faults import How  # noqa: E402

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
    parser.add_argument("--val-epochs", type=int, default=1, help="validate every N epochs")
    parser.add_argument("--sanity", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=None)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--data", default="map", choices=["map", "iterable", "stateful", "combined"])
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--reload", type=int, default=0, help="make the loaders anew every N epochs")
    parser.add_argument("--ddp", default="{}", help="JSON of DDP arguments")
    parser.add_argument("--feature", action="append", default=[])
    parser.add_argument("--limit-train", type=int, default=None)
    parser.add_argument("--limit-val", type=int, default=None)
    parser.add_argument(
        "--die", action="append", default=[], help="rank:step:hook[:how[:incarnation]], in the job's own hooks"
    )
    parser.add_argument("--send", action="store_true", help="a donor's memory cannot be read (early/sitecustomize.py)")
    return parser.parse_args()


args = parse()
RANK = int(os.environ.get("RANK", "0"))
INCARNATION = int(os.environ.get("FLASHRL_INCARNATION", "0"))
HAS = set(args.feature)


def die(hook: str, step: int) -> None:
    """Strike this process in one of its own hooks."""
    for line in args.die:
        rank, at, where, how, incarnation = (line.split(":") + ["kill", "0"][line.count(":") - 2 :])[:5]
        if (RANK, step, hook, INCARNATION) == (int(rank), int(at), where, int(incarnation)):
            if how == "oom":
                run_out_of_memory()
            elif how == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            elif how == "raise":
                raise ValueError(f"the user's own mistake in {hook}")
            else:
                How(how).strike()


def run_out_of_memory() -> None:
    """What the kernel does: SIGKILL from outside, in the middle of an allocation."""
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -{signal.SIGKILL} {os.getpid()}"])
    hoard = []
    while True:
        hoard.append(bytes(1 << 20))
        if len(hoard) == 256:
            hoard.clear()


class Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random images, randomly augmented by whoever loads them."""

    def __init__(self, size: int, augment: bool) -> None:
        self.size, self.augment = size, augment
        self.generator = np.random.default_rng(RANK)
        self.brightness = 0.0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(8, 16, generator=generator) + self.brightness
        if self.augment:
            image = image + 0.1 * torch.randn(8, 16) + 0.1 * random.random() + 0.1 * float(np.random.rand())
            if "owngenerator" in HAS:
                image = image + 0.1 * float(self.generator.random())
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


class DyingAdamW(torch.optim.AdamW):
    """AdamW of two groups, in which a process can die when the first is updated and the second is not."""

    num_steps = 0

    def _init_group(self, group: dict[str, Any], *rest: Any) -> Any:
        if group is self.param_groups[-1]:
            die("optimizer", self.num_steps)
            self.num_steps += 1
        return super()._init_group(group, *rest)


class Noisy(L.Callback):
    """A user's callback with a state of its own that draws from all generators."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {"python": 0.0, "numpy": 0.0, "torch": 0.0}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.sums["python"] += random.random()
        self.sums["numpy"] += float(np.random.rand())
        self.sums["torch"] += torch.rand(()).item()
        pl_module.log("noise", self.sums["torch"], on_epoch=True, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.sums)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        width = args.width
        norm: list[nn.Module] = [nn.BatchNorm1d(8)] if "batchnorm" in HAS else []
        self.body = nn.Sequential(
            *norm, nn.Linear(16, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, width), nn.GELU()
        )
        self.deep = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(width, 10)
        if "unused" in HAS or "lopsided" in HAS:
            self.extra = nn.Linear(width, 10)
        if "sparse" in HAS:
            self.codes = nn.Embedding(16, width, sparse=True)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.losses: list[torch.Tensor] = []
        self.seen = 0
        self.gathered: list[Any] = []
        if "large" in HAS:
            self.register_buffer("recent", torch.zeros(64, 1024))
        self.total_seen = 0.0
        self.automatic_optimization = not args.manual
        if "byhand" in HAS:  # written in ways that torch does not count, or in another tensor's place
            self.register_buffer("mean", torch.zeros(100, 100))
            self.key = nn.Linear(width, 1000).requires_grad_(False)
        if args.manual and "single" not in HAS:
            self.critic = nn.Linear(16, 1)

    def setup(self, stage: str) -> None:
        die("setup", 0)
        if "subgroup" in HAS:
            self.pair = dist.new_group([0, 1])

    def on_fit_start(self) -> None:
        die("fit_start", 0)

    def on_train_start(self) -> None:
        die("train_start", self.global_step)
        if "unfreeze" in HAS:
            self.deep.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if "unfreeze" in HAS and self.current_epoch == 1:
            self.deep.requires_grad_(True)
            if "addgroup" in HAS:
                self.optimizers().optimizer.add_param_group({"params": list(self.deep.parameters()), "lr": 1e-2})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "checkpointing" in HAS and self.training:
            hidden = checkpoint(self.deep, self.body(x), use_reentrant=False).mean(1)
        else:
            hidden = self.deep(self.body(x)).mean(1)
        if "sparse" in HAS:
            hidden = hidden + self.codes((x[:, 0, :4].abs() * 4).long().clamp(max=15)).mean(1)
        if "unused" in HAS and self.training and (self.seen // 4 + RANK) % 2 == 0:
            return self.extra(hidden)
        if "lopsided" in HAS and RANK == 0:
            return self.extra(hidden)
        return self.head(hidden)

    def training_step(self, batch: Any, index: int) -> Any:
        die("forward", self.global_step)
        x, y = batch["long"] if args.data == "combined" else batch
        if args.data == "combined":
            x = x + 0.1 * batch["short"][0]
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
        if "large" in HAS:
            self.recent.copy_(self.recent.roll(1, 0))
            self.recent[0] = x.mean()
        if "byhand" in HAS:
            self.mean = 0.9 * self.mean + x.mean() + self.key(self.head.weight.detach()).mean()
            self.key.weight.data.mul_(0.9).add_(self.head.weight.detach().mean())
            self.key.bias.data = self.key.bias.data * 0.5 + x.mean()
        return {"loss": loss, "logits": logits.detach().repeat(1, 1024 if "large" in HAS else 1)}

    def _manual_step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizers = self.optimizers()
        first, second = (optimizers, None) if "single" in HAS else optimizers
        loss = nn.functional.cross_entropy(self(x), y)
        if "collects" in HAS:
            self.losses.append(loss.detach())
            # gradients of three batches, reduced with the last
            with nullcontext() if self.seen % 12 == 0 else self.trainer.model.no_sync():
                self.manual_backward(loss)
            if self.seen % 12 == 0:
                first.step()
                first.zero_grad()
            return
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        die("between", self.global_step)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        self.losses.append(loss.detach())
        if second is None:
            return
        critic = (self.critic(x.mean(1)) - loss.detach()).square().mean()
        second.zero_grad()
        self.manual_backward(critic)
        second.step()

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
        if "usesbatch" in HAS:
            self.total_seen += batch[0].sum().item() + outputs["logits"].sum().item()
        if "subgroup" in HAS and RANK < 2:
            total = torch.rand(1)
            dist.all_reduce(total, group=self.pair)
            self.total_seen += total.item()
        die("batch_end_late", self.global_step)

    def on_train_epoch_end(self) -> None:
        die("epoch_end", self.global_step)
        self.log("epoch_mean", torch.stack(self.losses).mean(), sync_dist=True)
        self.losses.clear()
        if "objects" in HAS:
            everyone: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(everyone, {"rank": RANK, "drawn": random.random()})
            self.gathered.append(everyone)
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
        if "lbfgs" in HAS:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        critic = list(self.critic.parameters()) if hasattr(self, "critic") else []
        if "sparse" in HAS:
            return torch.optim.SGD(self.parameters(), 1e-2)
        body = list(self.body.parameters())
        later = list(self.deep.parameters()) if "addgroup" in HAS else []
        others = {id(p) for p in [*critic, *body, *later]}
        rest = [p for p in self.parameters() if id(p) not in others]
        optimizer = DyingAdamW([{"params": body}, {"params": rest}], lr=1e-3)
        if "addgroup" in HAS:
            return optimizer
        if args.manual:
            return [optimizer, torch.optim.SGD(critic, 1e-2, 0.9)] if critic else optimizer
        if "plateau" in HAS:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loader(self, size: int, train: bool) -> Any:
        if train and args.data == "combined":
            return {"long": DataLoader(Images(size, augment=True), 4, shuffle=True), "short": self._short_loader()}
        if train and args.data == "iterable":
            persistent = bool(args.workers) and "persist" in HAS
            return DataLoader(Stream(size), batch_size=4, num_workers=args.workers, persistent_workers=persistent)
        dataset = Images(size * int(os.environ.get("WORLD_SIZE", "1")), augment=train or "valworkers" in HAS)
        if args.reload:
            dataset.brightness = self.trainer.current_epoch + random.random()
        if train and args.data == "stateful":
            from torchdata.stateful_dataloader import StatefulDataLoader

            return StatefulDataLoader(dataset, batch_size=4, shuffle=True, num_workers=args.workers)
        workers = args.workers if train or "valworkers" in HAS else 0
        persistent = bool(workers) and "persist" in HAS
        return DataLoader(dataset, batch_size=4, shuffle=train, num_workers=workers, persistent_workers=persistent)

    def _short_loader(self) -> Any:
        return DataLoader(Images(8, augment=False), batch_size=4, shuffle=True)

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
        "numpy_rng": hashlib.sha256(
            np.random.get_state()[1].tobytes() + repr(np.random.get_state()[2:]).encode()
        ).hexdigest()[:16],
        "loops": json.loads(json.dumps(loop, default=str)),
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {k: float(v) for k, v in sorted(trainer.callback_metrics.items())},
        "seen": [module.seen, module.total_seen, module.gathered],
        "scaler": getattr(getattr(trainer.precision_plugin, "scaler", None), "state_dict", dict)(),
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
            state = {
                k: v
                for k, v in state.items()
                if "dir" not in k and "path" not in k and "best_k" not in k and "kth" not in k
            }
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
    if "rich" in HAS:
        callbacks.append(RichProgressBar())
    if "stops" in HAS:
        callbacks.append(EarlyStopping("val_loss", patience=1, min_delta=10.0))
    if "noisy" in HAS:
        callbacks.append(Noisy())
    if "swa" in HAS:
        callbacks.append(StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1))
    if "growing" in HAS:
        callbacks.append(GradientAccumulationScheduler({0: 1, 1: 2}))
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
    half = args.precision == "16-mixed"  # Lightning's own choice for a CPU would be bf16
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=strategy,
        max_epochs=args.epochs if args.max_steps < 0 else -1,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip,
        precision=None if half else args.precision,
        plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler) if half else None,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=1,
        num_sanity_val_steps=args.sanity,
        val_check_interval=args.val_every,
        reload_dataloaders_every_n_epochs=args.reload,
        use_distributed_sampler=args.data != "combined",
        check_val_every_n_epoch=None if args.val_every else args.val_epochs,
        limit_train_batches=args.limit_train,
        limit_val_batches=args.limit_val,
        enable_checkpointing=bool(args.checkpoint_every) or "best" in HAS,
        enable_progress_bar="bar" in HAS or "rich" in HAS,
        enable_model_summary=False,
        default_root_dir=out,
    )
    module = Model()
    if "stopped" in HAS:
        atexit.register(lambda: (out / f"stopped.{RANK}").write_text(str(trainer.global_step)))
    trainer.fit(module, ckpt_path=args.resume, weights_only=False)
    (out / f"digest{RANK}.json").write_text(json.dumps(digest(module, trainer), indent=1, sort_keys=True))
    if args.strategy == "ddp":  # a thread of gloo that outlives the interpreter may end the process by SIGABRT
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
