"""One asynchronous run, real or simulated, with one rollout worker. Prints one JSON object at the end.

python workflow_job.py WORKFLOW [--engines real|simulated] [--steps N] [--max-staleness N] [--loss NAME] [--seed N] …
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_flashrl import AsyncRL, StreamingDataModule
from lightning_flashrl.algorithms import GRPO
from lightning_flashrl.asyncrl import RolloutSettings, StepSettings
from lightning_flashrl.asyncrl.warm_start import warm_start
from lightning_flashrl.engines import Sampling
from lightning_flashrl.engines.rollout import LogNormalLengths, RolloutSpeed, SimulatedEngine
from lightning_flashrl.engines.trainer import CausalLMTrainer, SimulatedTrainer
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort

LOSSES: dict[str, dict[str, Any]] = {
    "naive": {},
    "decoupled": {"is_decoupled": True, "correction": "truncated", "correction_high": 1e9},
    "tis": {"is_decoupled": True, "correction": "truncated", "correction_high": 2.0},
}
"""Ratios against the rollout; against the step's own policy, weighted by the distance; the same, weights cut at 2."""
TASK = DigitSort()
TOKENIZER = CharacterTokenizer(TASK.alphabet)
PROMPTS, GROUP_SIZE = 32, 8
SIMULATED_LENGTH = 200
SIMULATED_TOKENS_S = 400.0
"""That each of a rollout worker's requests decodes."""


class Steps(L.Callback):
    """What each step was like, and when it ended."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.begin_s = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        found: Mapping[str, float] = pl_module.last_step  # type: ignore[assignment]
        names = ("reward", "step_s", "waited_s", "idle_share/rollout", "staleness/oldest", "staleness/max", "rows")
        session = trainer.datamodule.session()  # type: ignore[attr-defined]
        done = session.view().statistics()
        self.steps.append(
            {name: found[name] for name in names}
            | {"at_s": time.perf_counter(), "busy_s": done.busy_s, "exposed_sync_s": found["exposed_sync_s"]}
            | {"kl": found["mismatch/kl_k3"], "ess": found["mismatch/ess"]}
        )


def real_engine(seed: int, warm: Path | None) -> CausalLMTrainer:
    torch.manual_seed(seed)
    engine = CausalLMTrainer.from_config(
        "llama",
        vocab_size=len(TOKENIZER),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    if warm is not None and warm.exists():
        engine.load_state_dict(torch.load(warm))
    elif warm is not None:
        warm_start(engine, TASK, TOKENIZER, steps=300, batch_size=128, lr=1e-3, corrupted=0.8)
        torch.save(engine.state_dict(), warm)
    return engine


def make_simulated(vocabulary: int) -> SimulatedEngine:
    return SimulatedEngine(
        Sampling(max_new_tokens=4 * SIMULATED_LENGTH, eos_token_id=1),
        vocabulary=vocabulary,
        speed=RolloutSpeed(tokens_per_s=SIMULATED_TOKENS_S),
        lengths=LogNormalLengths(median=SIMULATED_LENGTH, spread=0.3),
        num_slots=PROMPTS * GROUP_SIZE // 2,
        max_length=1024,
    )


def ending(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return float(len(completion) % 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow")
    parser.add_argument("--engines", default="real")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-staleness", type=int, default=1)
    parser.add_argument("--loss", default="naive", choices=LOSSES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", type=Path, default=None)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--train-tokens-s", type=float, default=20_000.0, help="of a simulated trainer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    is_real = arguments.engines == "real"
    rollout = {"max_new_tokens": 8, "max_length": 32, "num_slots": 64, "num_ahead": 32}
    settings: dict[str, Any] = {}
    engine: Any = real_engine(arguments.seed, arguments.warm) if is_real else None
    if not is_real:
        engine = SimulatedTrainer(len(TOKENIZER), tokens_per_s=arguments.train_tokens_s)
        rollout = {"max_new_tokens": 4 * SIMULATED_LENGTH, "max_length": 1024, "num_slots": 128, "num_ahead": 0}
        settings = {"rollout_engine": functools.partial(make_simulated, len(TOKENIZER)), "reward": ending}
    data = StreamingDataModule(
        TASK,
        workflow=arguments.workflow,
        max_staleness=arguments.max_staleness,
        steps=StepSettings(prompts=PROMPTS, group_size=GROUP_SIZE, micro_batch_tokens=arguments.micro_batch_tokens),
        rollout=RolloutSettings(**rollout, reward_workers=0),  # type: ignore[arg-type]
        seed=arguments.seed,
        **settings,
    )
    steps = Steps()
    trainer = L.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=10**9,
        check_val_every_n_epoch=None,
        callbacks=[steps],
    )
    optimizer = functools.partial(torch.optim.AdamW, lr=2e-4, weight_decay=0.0)
    module = AsyncRL(engine, GRPO(**LOSSES[arguments.loss]), optimizer=optimizer)
    trainer.fit(module, data)
    accuracy = None
    if is_real:
        [found] = trainer.validate(module, data, verbose=False)
        accuracy = {name.removeprefix("val/accuracy_"): value for name, value in found.items() if "accuracy" in name}
    print(json.dumps({"steps": steps.steps, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
