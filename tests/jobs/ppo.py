"""PPO with a critic, a reference and reward workers, on some ranks: `ppo.py OUT RANKS STRATEGY`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_flashrl.algorithms import PPO
from lightning_flashrl.asyncrl import AsyncRL, RolloutSettings, StepSettings, StreamingDataModule
from lightning_flashrl.engines.trainer import CausalLMCritic, CausalLMTrainer
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def reward(prompt: str, completion: str, row: Any) -> float:
    """A number for every answer, so that each row has its own."""
    return len(completion) / 4 - 0.1 * completion.count("7")


class Rows(L.Callback):
    """How many rows this rank's session trained, and what the queue says at the end."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            statistics = trainer.datamodule.session().queue.statistics()  # type: ignore[attr-defined]
            told = {name: task.num_committed for name, task in statistics.tasks.items()}
            weights = {name: weight.detach().clone() for name, weight in pl_module.state_dict().items()}
            torch.save({"tasks": told, "weights": weights, "global_step": trainer.global_step}, self.out)


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = CharacterTokenizer(DigitSort.alphabet)
    torch.manual_seed(0)
    engine = CausalLMTrainer.from_config("llama", vocab_size=len(tokenizer), **SIZES)
    critic = CausalLMCritic.from_config("llama", vocab_size=len(tokenizer), **SIZES)
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    module = AsyncRL(engine, PPO(kl_coefficient=0.1), optimizer=sgd, critic_engine=critic)
    data = StreamingDataModule(
        DigitSort(),
        reward=reward,
        workflow="streaming",
        steps=StepSettings(prompts=8, group_size=2, micro_batch_tokens=32),
        rollout=RolloutSettings(max_new_tokens=4, max_length=16, reward_workers=1),
    )
    L.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=int(sys.argv[2]),
        strategy=sys.argv[3],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Rows(Path(sys.argv[1]))],
    ).fit(module, data)


if __name__ == "__main__":
    main()
