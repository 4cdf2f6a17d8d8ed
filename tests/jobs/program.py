"""A program around `fit`: validates, fits twice, tests, says what came out. The environment says who dies where."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.argv = [sys.argv[0], "--out", os.environ["PROGRAM_OUT"]]
sys.path.insert(0, str(Path(__file__).parent))

import lightning as L  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from lightning_flashrl import FlashRecovery, pause_hang_detection  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
WHERE = os.environ.get("PROGRAM_WHERE", "")
VICTIMS = json.loads(os.environ.get("PROGRAM_VICTIMS", "[1]"))
FIRST_LIFE = os.environ.get("FLASHRL_INCARNATION", "0") == "0"
fit_number = 0


def die(where: str) -> None:
    if where == WHERE and train.RANK in VICTIMS and FIRST_LIFE:
        os.kill(os.getpid(), signal.SIGKILL)


class Module(train.Model):
    def training_step(self, batch: Any, index: int) -> Any:
        if self.global_step % 6 == 4:
            die(f"fit{fit_number}")
            if WHERE == "raise" and train.RANK in VICTIMS:
                raise ValueError("the user's own mistake")
        if os.environ.get("PROGRAM_ENDLESS"):
            (Path(os.environ["PROGRAM_OUT"]) / f"trains{train.RANK}").touch()
            time.sleep(0.5)
        return super().training_step(batch, index)

    def test_step(self, batch: Any, index: int) -> None:
        if index == 1:
            die("test")
        self.log("test_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class Witness(L.Callback):
    """Writes down what callbacks are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_recovery_start(self, trainer: L.Trainer, module: L.LightningModule, change: Any) -> None:
        with (Path(os.environ["PROGRAM_OUT"]) / f"start{train.RANK}").open("a") as file:
            file.write(f"{[lost.global_rank for lost in change.lost]}\n")

    def on_recovery_end(self, trainer: L.Trainer, module: L.LightningModule, record: Any) -> None:
        with (Path(os.environ["PROGRAM_OUT"]) / f"end{train.RANK}").open("a") as file:
            file.write(f"{list(record.lost)} {sorted(record.timings_ms)}\n")


def main() -> None:
    global fit_number
    L.seed_everything(1, verbose=False)
    out = Path(os.environ["PROGRAM_OUT"])
    fallback = os.environ.get("PROGRAM_FALLBACK")
    callbacks: list[Any] = [FlashRecovery(fallback=fallback), Witness()]
    if fallback or WHERE == "everybody":
        callbacks.append(ModelCheckpoint(out / "ckpt", every_n_train_steps=2))
    settings: dict[str, Any] = {
        "strategy": "flash_ddp",
        "devices": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": len(callbacks) > 2,
        "callbacks": callbacks,
        "default_root_dir": out,
    }
    module = Module()
    if not fallback and WHERE != "everybody":
        L.Trainer(max_epochs=1, **settings).validate(module, verbose=False)
        L.Trainer(max_epochs=1, **settings).fit(module)
        die("between")
    fit_number = 1
    trainer = L.Trainer(max_epochs=1 if not os.environ.get("PROGRAM_ENDLESS") else -1, **settings)
    trainer.fit(module)
    with pause_hang_detection():
        die("after")
    tested = trainer.test(module, verbose=False)
    die("end")
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
    result = {"weights": weights, "seen": module.seen, "steps": trainer.global_step, "tested": tested}
    (out / f"result{train.RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
