"""The six tasks of the workflow, each with its own worker, side by side."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_flashrl.algorithms import GRPO, PPO, PolicyOptimization
from lightning_flashrl.asyncrl import AsyncRL, RolloutSettings, StepSettings, StreamingDataModule
from lightning_flashrl.asyncrl.session import LeadSession
from lightning_flashrl.engines.trainer import CausalLMCritic, CausalLMTrainer
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming.queue import QueueStatistics
from lightning_flashrl.tasks import CharacterTokenizer, Problem, ProceduralTask

pytestmark = pytest.mark.timeout(120)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


class Nearby(ProceduralTask):
    """Answer a digit with any digit not smaller than it: easy for small digits, so that a critic has work."""

    alphabet = "0123456789>"

    def draw(self, random: random.Random) -> Problem:
        digit = random.randint(0, 9)
        return Problem(f"{digit}>", "9", {"least": digit})

    def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        return float(completion.isdigit() and int(completion) >= row["least"])


TOKENIZER = CharacterTokenizer(Nearby.alphabet)


def policy(seed: int = 0) -> CausalLMTrainer:
    torch.manual_seed(seed)
    return CausalLMTrainer.from_config("llama", vocab_size=len(TOKENIZER), **SIZES)


def critic() -> CausalLMCritic:
    torch.manual_seed(5)
    return CausalLMCritic.from_config("llama", vocab_size=len(TOKENIZER), **SIZES)


class Diary(L.Callback):
    """Metrics of each step, and the queue's own count at the end of the last one."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.queue: QueueStatistics | None = None
        self.num_failed: Callable[[], int] = lambda: 0

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        session = trainer.datamodule.session()
        if isinstance(session, LeadSession):
            self.queue = session.queue.statistics()
            self.num_failed = lambda: session.view().statistics("reward").num_failed


def fit(
    engine: CausalLMTrainer,
    algorithm: PolicyOptimization,
    *,
    steps: int,
    lr: float = 3e-3,
    reward: Callable[..., float] | None = None,
    rollout: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
    workflow: str = "async",
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[AsyncRL, Diary, L.Trainer]:
    data = StreamingDataModule(
        Nearby(),
        reward=reward,
        workflow=workflow,
        steps=StepSettings(**{"prompts": 8, "group_size": 4, "micro_batch_tokens": 64, **(step or {})}),
        rollout=RolloutSettings(**{"max_new_tokens": 1, "max_length": 8, **(rollout or {})}),
    )
    diary = Diary()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[diary],
    )
    make = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    module = AsyncRL(engine, algorithm, optimizer=make, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, diary, trainer


def rewards(diary: Diary, count: int) -> tuple[float, float]:
    """Mean reward of the first and of the last steps."""
    found = [step["reward"] for step in diary.metrics]
    return sum(found[:count]) / count, sum(found[-count:]) / count


def test_ppo_learns_with_a_critic_and_a_step_is_an_update_of_the_policy() -> None:
    module, diary, trainer = fit(policy(), PPO(), steps=60, critic_engine=critic())
    assert trainer.global_step == module.policy_version == len(diary.metrics) == 60
    before, after = rewards(diary, 5)
    assert after > before + 0.25
    assert max(step["critic/explained_variance"] for step in diary.metrics[5:]) > 0.1


def _fails_for_three(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    if prompt == "3>":
        raise ZeroDivisionError
    if prompt == "5>" and completion in "02468":
        return float("nan")
    return float(completion.isdigit())


@pytest.mark.filterwarnings("ignore:.*failed and are left out")
def test_each_row_passes_all_six_tasks_once_and_those_that_fail_are_counted() -> None:
    _, diary, trainer = fit(
        policy(),
        PPO(kl_coefficient=0.02),
        steps=6,
        reward=_fails_for_three,
        rollout={"reward_workers": 1},
        critic_engine=critic(),
    )
    assert trainer.global_step == 6
    assert diary.queue is not None
    tasks, last = diary.queue.tasks, diary.metrics[-1]
    assert list(tasks) == ["rollout", "reward", "reference", "critic", "critic_update", "update"]
    trained = {name: tasks[name].num_committed for name in ("critic", "critic_update", "update")}
    failed = diary.num_failed()  # workers tell the last of it when they end
    assert 0 < last["rows/failed"] <= failed
    assert len(set(trained.values())) == 1
    # Some groups lost rows, and those that lost all were replaced: 8 groups of up to 4 rows in each step.
    assert 6 * 8 <= trained["update"] <= 6 * 8 * 4 - failed % 4
    assert tasks["rollout"].num_committed == diary.queue.num_put
    assert tasks["reward"].num_committed + failed == diary.queue.num_put
    assert trained["update"] == tasks["reward"].num_committed
    assert diary.queue.num_rows == 0
    assert all(task.num_redelivered <= failed and task.num_stale == 0 for task in tasks.values())
    assert diary.metrics[0]["reference/kl"] == pytest.approx(0, abs=1e-6)
    assert last["reference/kl"] > 1e-5
    assert {"idle_share/reward", "idle_share/reference", "queue/reference"} <= last.keys()


def test_the_policy_is_drawn_to_the_reference_which_stays_as_it_is() -> None:
    """Nothing else is rewarded; the reference is neither trained nor saved."""
    other = policy(seed=7)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    before = {name: weight.clone() for name, weight in other.weights().items()}
    module, diary, _ = fit(policy(), GRPO(kl_coefficient=1.0), steps=40, reward=lambda *_: 0.0, reference_engine=other)
    distances = [step["reference/kl"] for step in diary.metrics]
    assert sum(distances[-5:]) < 0.3 * sum(distances[:5])
    assert all(torch.equal(weight, before[name]) for name, weight in other.weights().items())
    assert not any("reference" in name for name in module.state_dict())


@pytest.mark.slow
def test_a_checkpoint_remembers_the_reference_that_training_began_with(tmp_path: Path) -> None:
    first = policy()
    began_with = {name: weight.clone() for name, weight in first.weights().items()}
    _, _, trainer = fit(first, GRPO(kl_coefficient=0.01), steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not all(torch.equal(weight, began_with[name]) for name, weight in first.weights().items())
    other, diary, _ = fit(policy(seed=3), GRPO(kl_coefficient=0.01), steps=5, ckpt_path=tmp_path / "last.ckpt")
    assert other.policy_version == 5
    assert all(step["reference/kl"] > 1e-5 for step in diary.metrics)  # it would begin with 0 anew
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["reference_weights"]
    assert all(torch.equal(weight, began_with[name]) for name, weight in saved.items())


@pytest.mark.parametrize(
    ("algorithm", "options", "said"),
    [
        (PPO(), {}, "PPO with advantage='generalized' needs a critic"),
        (GRPO(), {"critic_engine": critic()}, "would never train its critic"),
        (GRPO(), {"reference_engine": policy()}, "kl_coefficient=0.0 uses no reference"),
        (PPO(filters_uninformative=True), {"critic_engine": critic()}, "a critic learns all the same"),
    ],
    ids=["no critic", "needless critic", "needless reference", "filter"],
)
def test_roles_that_do_not_fit_the_algorithm_are_refused(
    algorithm: PolicyOptimization, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        AsyncRL(policy(), algorithm, **options)
