"""Reinforcement learning as a LightningModule: rows that rollouts wrote are trained as they come.

A training step is one optimizer step. Its micro-batches are pulled from the session, each rank as many as it gets to;
gradients are added up, divided by what all ranks trained, and applied once. So nothing depends on how a step was cut
into micro-batches, except for rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from lightning_flashrl import clock
from lightning_flashrl.algorithms import GRPO, PolicyOptimization, sum_tokens
from lightning_flashrl.asyncrl.datamodule import StepBatch, StreamingDataModule
from lightning_flashrl.asyncrl.metrics import StepMetrics
from lightning_flashrl.asyncrl.session import HostSession, Session
from lightning_flashrl.engines import Prompt, TrainerEngine
from lightning_flashrl.engines.trainer import ExperienceBatch
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import Lease
from lightning_flashrl.tasks import Problem

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_DEFAULT_OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)


class AsyncRL(L.LightningModule):
    """Trains a policy on rows that rollout workers generate meanwhile; for :class:`StreamingDataModule`.

    Args:
        trainer_engine: the policy.
        algorithm: what is optimized.
        optimizer: makes the optimizer from parameters; override ``configure_optimizers`` for more.
        lr_scheduler: makes its scheduler, which counts steps; ``None`` for none.
        gradient_clip_norm: gradients are cut to this norm; ``None`` for no cut.

    Attributes:
        last_step: numbers of the last step, by the names under which they are logged.

    Raises:
        ConfigurationError: an algorithm that needs what is not there.

    Example::

        trainer = L.Trainer(max_steps=80)
        trainer.fit(AsyncRL(engine, GRPO()), StreamingDataModule(DigitSort(), max_staleness=1))
    """

    def __init__(
        self,
        trainer_engine: TrainerEngine,
        algorithm: PolicyOptimization | None = None,
        *,
        optimizer: MakeOptimizer = _DEFAULT_OPTIMIZER,
        lr_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        gradient_clip_norm: float | None = 1.0,
    ) -> None:
        super().__init__()
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ConfigurationError(f"gradient_clip_norm={gradient_clip_norm}; use a number above 0, or None")
        if algorithm is not None and (algorithm.uses_critic or algorithm.uses_reference):
            raise ConfigurationError(
                f"{type(algorithm).__name__} needs a critic or a reference policy, which AsyncRL does not run yet; use "
                "advantages of prompt groups, and algorithm.kl_coefficient=0"
            )
        self.automatic_optimization = False
        self.trainer_engine: Any = trainer_engine
        self.algorithm = algorithm or GRPO()
        self.gradient_clip_norm = gradient_clip_norm
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        self.register_buffer("_policy_version", torch.zeros((), dtype=torch.int64))
        self.last_step: dict[str, float] | None = None
        self._step_began_s = 0.0
        self._last_waited_s = 0.0

    @property
    def policy_version(self) -> int:
        """Optimizer steps that the policy has gone through."""
        return int(self.get_buffer("_policy_version"))

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its scheduler if there is one."""
        optimizer = self._make_optimizer(
            [weight for weight in self.trainer_engine.parameters() if weight.requires_grad]
        )
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}

    # ------------------------------------------------------------------ the session
    @property
    def data(self) -> StreamingDataModule:
        """The run's data module.

        Raises:
            ConfigurationError: it is another one.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, StreamingDataModule):
            raise ConfigurationError(
                f"AsyncRL trains on rows of a StreamingDataModule, not of {type(data).__name__}; use "
                "trainer.fit(module, StreamingDataModule(...))"
            )
        return data

    def on_fit_start(self) -> None:
        """Check what belongs together before anything begins."""
        data = self.data
        if data.rollout.temperature != self.trainer_engine.temperature:
            raise ConfigurationError(
                f"rollout.temperature={data.rollout.temperature} is not trainer_engine.temperature="
                f"{self.trainer_engine.temperature}; make them equal, else the log-probs are of two policies"
            )

    def on_train_start(self) -> None:
        """Begin rollouts."""
        trainer, data = self.trainer, self.data
        address = None
        if trainer.is_global_zero:
            session = data.host(
                self.trainer_engine,
                self.policy_version,
                limit=self._limit(),
                filters_uninformative=self.algorithm.filters_uninformative,
            )
            address = session.address
        address = trainer.strategy.broadcast(address)
        if not trainer.is_global_zero:
            assert address is not None
            data.join(address, trainer.global_rank)
        self._step_began_s = clock.now_s()
        self._last_waited_s = 0.0

    def _limit(self) -> int | None:
        """Prompt groups that this fit will train in all, if that is known."""
        trainer = self.trainer
        limits: list[int] = []
        if trainer.max_steps >= 0:
            limits.append(trainer.max_steps - trainer.global_step)
        if trainer.max_epochs is not None and trainer.max_epochs >= 0 and trainer.num_training_batches != float("inf"):
            num_epochs = trainer.max_epochs - trainer.current_epoch
            limits.append(num_epochs * int(trainer.num_training_batches))
        return max(0, min(limits)) * self.data.steps.prompts if limits else None

    def on_train_end(self) -> None:
        """End rollouts."""
        self.data.close_session()

    # ------------------------------------------------------------------ a step
    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Train the rows of one step, as they come."""
        session, version = batch.session, self.policy_version
        metrics = StepMetrics(self.data.max_staleness, self.algorithm.clip_low, self.algorithm.clip_high)
        with self._without_sync():
            for lease in session.micro_batches(version):
                self._backward(lease, metrics, version)
        found = self._gathered(metrics)
        if not found["rows"]:  # no more prompts
            return
        self._update(session, found["count"])
        session.step_done(self.trainer_engine.weights(), self.policy_version)
        self._log_step(session, found)

    def _backward(self, lease: Lease, metrics: StepMetrics, version: int) -> None:
        """Add the gradients of a lease, whose prompt groups are whole; forward passes are no larger than set."""
        rows = ExperienceBatch.of(lease.batch, self.data.tokenizer.pad_token_id or 0)
        metrics.add_rows(rows, version)
        algorithm = self.algorithm
        lengths = rows.loss_mask.sum(dim=1)
        advantages = algorithm.group_advantages(algorithm.shaped(rows.rewards, lengths), rows.group_ids)
        max_tokens = self.data.steps.micro_batch_tokens
        parts = rows.split(max_tokens)
        for part, its_advantages in zip(parts, torch.split(advantages, [len(part) for part in parts]), strict=True):
            micro_batch = part.to(self.device)
            policy_logprobs = self.trainer_engine(micro_batch)  # [N, L - 1]
            losses = algorithm.token_losses(
                policy_logprobs,
                micro_batch.rollout_logprobs,
                its_advantages[:, None].to(self.device),
                micro_batch.loss_mask,
            )
            loss, count = sum_tokens(
                losses, micro_batch.loss_mask, algorithm.reduction, length=algorithm.constant_length
            )
            self.manual_backward(loss)
            metrics.add_loss(loss.detach(), count)
            metrics.add_logprobs(policy_logprobs.detach(), micro_batch)

    def _update(self, session: Session, count: float) -> None:
        """Divide the gradients by what all ranks trained, and apply them."""
        optimizer: Any = self.optimizers()
        weights = [weight for weight in self.trainer_engine.parameters() if weight.requires_grad]
        if self.trainer.world_size > 1:
            # Ranks had different numbers of micro-batches: gradients are averaged here, once, over all ranks.
            self.manual_backward(torch.stack([(weight * 0).sum() for weight in weights]).sum())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_mul_(gradients, self.trainer.world_size / max(1.0, count))
        if self.gradient_clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_norm, gradient_clip_algorithm="norm")
        session.before_update()
        optimizer.step()
        optimizer.zero_grad()
        self.get_buffer("_policy_version").add_(1)
        for scheduler in self._schedulers():
            scheduler.step()

    def _schedulers(self) -> list[Any]:
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return []
        return schedulers if isinstance(schedulers, list) else [schedulers]

    @contextlib.contextmanager
    def _without_sync(self) -> Iterator[None]:
        """Gradients stay local: ranks have different numbers of micro-batches."""
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and isinstance(strategy, ParallelStrategy):
            with strategy.block_backward_sync():
                yield
        else:
            yield

    # ------------------------------------------------------------------ numbers
    def _gathered(self, metrics: StepMetrics) -> dict[str, float]:
        vector = metrics.vector()
        if self.trainer.world_size > 1:
            gathered = self.all_gather(vector.to(self.device))
            assert isinstance(gathered, Tensor)
            return metrics.of_all_ranks(gathered.cpu())
        return metrics.of_all_ranks(vector[None])

    def _log_step(self, session: Session, found: dict[str, float]) -> None:
        now_s = clock.now_s()
        step_s = now_s - max(self._step_began_s, session.began_s or 0.0)
        self._step_began_s = now_s
        waited_s, self._last_waited_s = session.waited_s - self._last_waited_s, session.waited_s
        rows = int(found["rows"])
        logged = {
            **found,
            "policy_version": float(self.policy_version),
            "step_s": step_s,
            "waited_s": waited_s,
            "tokens_per_s": found["tokens"] / step_s,
            "idle_share/trainer": waited_s / step_s,
        }
        if isinstance(session, HostSession):
            logged |= session.metrics()
        self.last_step = logged
        shown = {"reward", "staleness/oldest", "tokens_per_s", "idle_share/trainer", "idle_share/rollout"}
        for name, value in logged.items():
            self.log(name, value, prog_bar=name in shown, batch_size=rows, rank_zero_only=True)

    # ------------------------------------------------------------------ validation
    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Answer held-out problems, with the likeliest tokens and as rollouts do."""
        for name, is_greedy in (("greedy", True), ("sampled", False)):
            reward = torch.tensor(self._answer(batch, is_greedy=is_greedy))
            self.log(
                f"val/accuracy_{name}",
                (reward >= 1).float().mean(),
                batch_size=len(batch),
                sync_dist=True,
                prog_bar=True,
            )
            self.log(f"val/reward_{name}", reward.mean(), batch_size=len(batch), sync_dist=True)

    def _answer(self, problems: list[Problem], *, is_greedy: bool) -> list[float]:
        data = self.data
        engine = self.trainer_engine.rollout_engine(
            data.sampling(is_greedy=is_greedy), num_slots=64, max_length=data.rollout.max_length
        )
        engine.submit(
            [
                Prompt(number, torch.tensor(list(data.tokenizer.encode(problem.prompt))), seed=number)
                for number, problem in enumerate(problems)
            ]
        )
        rewards = [0.0] * len(problems)
        while engine.num_open:
            for completion in engine.step():
                problem = problems[completion.request_id]
                text = data.decode(completion.tokens.tolist())
                told = {"answer": problem.answer, **problem.data}
                rewards[completion.request_id] = float(data.reward(problem.prompt, text, told))
        return rewards
