"""A short asynchronous run on digit sort, as a user would write it. Prints its summary as the last line."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_flashrl import AsyncRL, FlashRecovery, StreamingDataModule
from lightning_flashrl.algorithms import GRPO
from lightning_flashrl.asyncrl import RolloutSettings, StepSettings
from lightning_flashrl.asyncrl.chaos import Chaos
from lightning_flashrl.asyncrl.recorder import RunRecorder
from lightning_flashrl.engines.trainer import CausalLMTrainer
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort

TASK = DigitSort(max_digits=4)


def partly_right(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """A share of right places, so that a policy that knows nothing learns too."""
    right = row["answer"]
    return sum(a == b for a, b in zip(completion, right, strict=False)) / max(len(completion), len(right))


class Gated:
    """Rewards some rows, and the others once a file is there."""

    def __init__(self, path: str, after: int) -> None:
        self._path = path
        self._left = after

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        self._left -= 1
        while self._left < 0 and not Path(self._path).exists():
            time.sleep(0.05)
        return partly_right(prompt, completion, row)


class Freezing:
    """Rewards some rows, and then lets no thread of its process run, once."""

    def __init__(self, path: Path, after: int) -> None:
        self._path = path
        self._left = after

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        self._left -= 1
        if self._left < 0 and not self._path.exists():
            self._path.touch()
            ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter's lock
        return partly_right(prompt, completion, row)


class DieAt(L.Callback):
    """Kills a rank at a hook, once, and leaves a file that says so."""

    def __init__(self, hook: str, rank: int, struck: Path) -> None:
        setattr(self, hook, self._die)
        self._rank = rank
        self._struck = struck

    def _die(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self._rank and not self._struck.exists():
            self._struck.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class SaveAt(L.Callback):
    """Stops the run after a step, and writes a checkpoint when it has ended, again in whoever takes a rank's place."""

    def __init__(self, step: int, path: Path) -> None:
        self._step = step
        self._path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self._path)


def make_engine(seed: int = 0) -> CausalLMTrainer:
    torch.manual_seed(seed)
    return CausalLMTrainer.from_config(
        "llama",
        vocab_size=len(CharacterTokenizer(TASK.alphabet)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )


_ROLLOUT = RolloutSettings(max_new_tokens=6, max_length=16, num_slots=8, num_ahead=4, reward_workers=0)


def make_data(**settings: Any) -> StreamingDataModule:
    settings.setdefault("reward", partly_right)
    settings.setdefault("steps", StepSettings(prompts=4, group_size=4, micro_batch_tokens=60))
    settings.setdefault("rollout", _ROLLOUT)
    return StreamingDataModule(TASK, **settings)


def make_module(engine: CausalLMTrainer, **settings: Any) -> AsyncRL:
    return AsyncRL(engine, GRPO(**settings), optimizer=functools.partial(torch.optim.AdamW, lr=3e-3))


def make_trainer(**settings: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            **settings,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--workflow", default="async")
    parser.add_argument("--max-staleness", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=5)
    parser.add_argument("--schedule", type=lambda text: text.split(","))
    parser.add_argument("--record", type=Path)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--gate", help="rewards of the third step wait for this file")
    parser.add_argument("--die-at", default="", help="hook at which a rank is killed")
    parser.add_argument("--die-rank", type=int, default=0, help="which one")
    parser.add_argument("--save-at", type=int, help="step after which a checkpoint is written and the run stops")
    parser.add_argument("--ckpt-path", type=Path, help="where it is written to, or read from without --save-at")
    parser.add_argument("--fallback", help="what to do when all is lost")
    parser.add_argument("--save-every", type=Path, help="where a checkpoint is written after each step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = make_engine()
    data = make_data(
        workflow=options.workflow,
        max_staleness=options.max_staleness,
        record=options.record,
        replay=options.replay,
        reward=partly_right if options.gate is None else Gated(options.gate, 40),
        rollout=dataclasses.replace(_ROLLOUT, workers=options.workers),
    )
    callbacks: list[L.Callback] = [RunRecorder(options.output_dir)]
    if options.strategy == "flash_ddp":
        callbacks.append(FlashRecovery(fallback=options.fallback))
    if options.die_at:
        callbacks.append(DieAt(options.die_at, options.die_rank, options.output_dir / "struck"))
    if options.save_at:
        callbacks.append(SaveAt(options.save_at, options.ckpt_path))
    if options.save_every:
        callbacks.append(ModelCheckpoint(options.save_every, every_n_train_steps=1, save_top_k=-1))
    if options.schedule:
        callbacks.append(Chaos(options.output_dir, schedule=options.schedule))
    trainer = make_trainer(
        max_steps=options.max_steps,
        strategy=options.strategy,
        devices=options.devices,
        callbacks=callbacks,
        enable_checkpointing=options.save_every is not None,
    )
    trainer.fit(make_module(engine), data, ckpt_path=None if options.save_at else options.ckpt_path)
    if trainer.is_global_zero:
        print(json.dumps(json.loads((options.output_dir / "summary.json").read_text())))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
