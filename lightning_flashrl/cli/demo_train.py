"""An ordinary Lightning program: a small GPT learns to write Python, byte by byte, from the standard library.

Its only lines that are not plain Lightning are ``strategy="flash_ddp"`` and ``FlashRecovery()``. It knows nothing of
the faults that ``demo.py`` inflicts on it from outside. Run it alone with
``flashrun --nproc-per-node 3 -m lightning_flashrl.cli.demo_train --out DIR``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_flashrl import FlashRecovery, clock
from lightning_flashrl.errors import ConfigurationError

CONTEXT = 96
"""Bytes that the model sees at once."""


# --------------------------------------------------------------------------- data
def read_sources(*, held_out: bool) -> torch.Tensor:
    """Bytes of the standard library's modules; every tenth module is held out for validation.

    Raises:
        ConfigurationError: this Python was installed without sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size > CONTEXT)
    if len(paths) < 20:
        raise ConfigurationError(
            f"{folder} holds {len(paths)} Python sources; run the demo with a Python that has its library"
        )
    chosen = [path for index, path in enumerate(paths) if (index % 10 == 9) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in chosen)), dtype=torch.uint8)


class Windows(Dataset[torch.Tensor]):
    """Windows of ``CONTEXT + 1`` bytes, ``int64[CONTEXT + 1]``, side by side."""

    def __init__(self, content: torch.Tensor, stride: int = CONTEXT) -> None:
        self.content = content
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.content) - CONTEXT - 1) // self.stride + 1

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.stride
        return self.content[start : start + CONTEXT + 1].long()


# --------------------------------------------------------------------------- model
class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each added to its input."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``[batch, time, width]``."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        feed: torch.Tensor = self.feed(self.norms[1](x))
        return x + feed


class ByteGPT(L.LightningModule):
    """A GPT over bytes.

    Args:
        num_steps: optimizer steps of the whole training, for the learning-rate schedule.
    """

    def __init__(
        self, num_steps: int, width: int = 128, num_blocks: int = 3, num_heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_steps = num_steps
        self.symbols = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, num_heads, dropout) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, time, 256]`` of the byte after each byte of ``[batch, time]``."""
        hidden = self.symbols(symbols) + self.positions.weight[: symbols.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def on_train_start(self) -> None:
        """Let each rank drop other units."""
        torch.manual_seed(7 + self.global_rank)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Nats per byte of this rank's batch."""
        loss = self._loss(batch)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """Nats per byte of modules that were not trained on."""
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW whose learning rate rises for a tenth of the training and then falls."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self.num_steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# --------------------------------------------------------------------------- progress and result
class ProgressFile(L.Callback):
    """Rank 0 adds one JSON line per step to a file, with the time of day.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Add a step."""
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["loss"])
            line = json.dumps({"step": trainer.global_step, "loss": loss, "wall_s": clock.wall_s()})
            with self.path.open("a") as file:
                file.write(line + "\n")


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of all parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def _tensor_parts(tensors: Iterable[torch.Tensor]) -> Iterator[bytes]:
    for tensor in tensors:
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def describe_end(module: ByteGPT, trainer: L.Trainer) -> dict[str, Any]:
    """Hashes of everything of this rank that a fault must not change, and the last losses."""
    [optimizer] = trainer.optimizers
    states = (optimizer.state[parameter] for parameter in module.parameters())
    moments = (state[key] for state in states for key in sorted(state))
    _, keys, position, *_ = np.random.get_state()
    return {
        "rank": trainer.global_rank,
        "steps": trainer.global_step,
        "weights": digest(_tensor_parts(module.state_dict().values())),
        "optimizer": digest(_tensor_parts(moments)),
        "rng": digest(
            [
                torch.get_rng_state().numpy().tobytes(),
                np.asarray(keys).tobytes() + str(position).encode(),
                repr(random.getstate()).encode(),
            ]
        ),
        "loss": float(trainer.callback_metrics["loss"]),
        "val_loss": float(trainer.callback_metrics["val_loss"]),
    }


def main() -> None:
    """Train, then write what this rank ended with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank and step")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(7, verbose=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "3")),
        strategy="flash_ddp",
        max_steps=arguments.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        val_check_interval=max(1, arguments.steps // 4),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
        num_sanity_val_steps=0,
        callbacks=[FlashRecovery(), ProgressFile(arguments.out / "progress.jsonl")],
        default_root_dir=arguments.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ByteGPT(arguments.steps)
    trainer.fit(
        module,
        DataLoader(Windows(read_sources(held_out=False)), arguments.batch_size, shuffle=True),
        DataLoader(Windows(read_sources(held_out=True), stride=37 * CONTEXT), arguments.batch_size),
    )
    path = arguments.out / f"end_rank{trainer.global_rank}.json"
    path.write_text(json.dumps(describe_end(module, trainer), indent=1) + "\n")


if __name__ == "__main__":
    main()
