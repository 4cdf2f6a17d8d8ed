"""A job whose LightningModule makes process groups of its own and calls collectives in all places."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

OUT = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--out", str(OUT)]
sys.path.insert(0, str(Path(__file__).parent))

import lightning as L  # noqa: E402
import torch.distributed as dist  # noqa: E402
import train  # noqa: E402

WHERE = os.environ.get("PROGRAM_WHERE", "")
FIRST_LIFE = os.environ.get("FLASHRL_INCARNATION", "0") == "0"


def die(where: str, rank: int) -> None:
    if where == WHERE and rank == train.RANK and FIRST_LIFE:
        os.kill(os.getpid(), signal.SIGKILL)


class Module(train.Model):
    def setup(self, stage: str) -> None:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        self.pair_group = pairs[train.RANK // 2]
        die("setup", 1)
        total = train.torch.ones(1) * train.RANK
        dist.all_reduce(total, group=self.pair_group)
        self.pair_total = total.item()
        self.everyone = dist.new_group([0, 1, 2, 3])
        self.gathered: list[Any] = [None] * 4
        dist.all_gather_object(self.gathered, (train.RANK, self.pair_total), group=self.everyone)
        self.sum_of_losses = 0.0

    def training_step(self, batch: Any, index: int) -> Any:
        if self.global_step == 3:
            die("step", 1)
        outputs = super().training_step(batch, index)
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss, group=self.pair_group)
        self.log("pair_loss", loss)
        dist.all_reduce(loss, group=self.everyone)
        if self.global_step == 3:
            die("after_collective", 2)
        self.sum_of_losses += loss.item()
        return outputs


def main() -> None:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        strategy="flash_ddp",
        devices=4,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=OUT,
    )
    module = Module()
    trainer.fit(module)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
    result = [weights, module.sum_of_losses, module.pair_total, module.gathered]
    (OUT / f"result{train.RANK}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
