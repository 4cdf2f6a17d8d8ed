"""GRPO with AsyncRL. Prints one JSON object at the end.

python grpo_flash.py short|long STEPS WORKFLOW MAX_STALENESS
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from sorting import ALPHABET, GROUP_SIZE, LR, MAX_LENGTH, MAX_NEW_TOKENS, PROMPTS, SIZES, problem, score

from lightning_flashrl import AsyncRL, StreamingDataModule
from lightning_flashrl.algorithms import GRPO
from lightning_flashrl.asyncrl import RolloutSettings, StepSettings
from lightning_flashrl.engines.trainer import CausalLMTrainer
from lightning_flashrl.tasks import CharacterTokenizer

WARM_UP = 3


class Clock(L.Callback):
    def __init__(self) -> None:
        self.ends_s: list[float] = []
        self.lengths: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.ends_s.append(time.perf_counter())
        self.lengths.append(pl_module.last_step["trained_length"])  # type: ignore[index,union-attr]


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return score(completion, row["answer"])


def main() -> None:
    size, steps, workflow, max_staleness = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    num_rows = PROMPTS[size] * GROUP_SIZE
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    tokenizer = CharacterTokenizer(ALPHABET[size])
    engine = CausalLMTrainer.from_config(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, **SIZES[size]
    )
    timer = Clock()
    data = StreamingDataModule(
        prompts=[problem(number) for number in range(PROMPTS[size] * (steps + 2))],
        validation=[problem(-1)],
        reward=reward,
        tokenizer=tokenizer,
        workflow=workflow,
        max_staleness=max_staleness,
        steps=StepSettings(prompts=PROMPTS[size], group_size=GROUP_SIZE, micro_batch_tokens=4096),
        rollout=RolloutSettings(
            max_new_tokens=MAX_NEW_TOKENS[size], max_length=MAX_LENGTH, num_slots=128, num_ahead=64, reward_workers=0
        ),
    )
    L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[timer],
    ).fit(AsyncRL(engine, GRPO(), optimizer=functools.partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)), data)
    seconds = timer.ends_s[-1] - timer.ends_s[WARM_UP - 1]
    length = sum(timer.lengths[WARM_UP:]) / len(timer.lengths[WARM_UP:])
    samples_s = num_rows * (steps - WARM_UP) / seconds
    print(
        json.dumps(
            {
                "samples_s": samples_s,
                "tokens_s": samples_s * length,
                "length": length,
                "parameters": sum(weight.numel() for weight in engine.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
