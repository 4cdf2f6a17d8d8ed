"""Reinforcement learning as a LightningModule: rows that rollouts wrote are trained as they come.

A training step is one optimizer step. Its micro-batches are pulled from the session, each rank as many as it gets to;
gradients are added up, divided by what all ranks trained, and applied once. So nothing depends on how a step was cut
into micro-batches, except for rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flashrl import clock
from lightning_flashrl.algorithms import GRPO, PolicyOptimization, clipped_value_loss, sum_tokens
from lightning_flashrl.asyncrl.datamodule import StepBatch, StreamingDataModule
from lightning_flashrl.asyncrl.host_process import HostHome
from lightning_flashrl.asyncrl.metrics import StepMetrics
from lightning_flashrl.asyncrl.session import LeadSession, Session
from lightning_flashrl.asyncrl.stages import Stages
from lightning_flashrl.asyncrl.steps import CRITIC, CRITIC_UPDATE
from lightning_flashrl.engines import CriticEngine, Prompt, TrainerEngine
from lightning_flashrl.engines.trainer import ExperienceBatch
from lightning_flashrl.errors import ConfigurationError, RewardError
from lightning_flashrl.strategies.ddp import FlashDDPStrategy
from lightning_flashrl.tasks import Problem

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
"""Takes parameters, or groups of them: any class of ``torch.optim``."""
_REFERENCE_WEIGHTS = "reference_weights"
_DEFAULT_OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)


class AsyncRL(L.LightningModule):
    """Trains a policy on rows that rollout workers generate meanwhile; for :class:`StreamingDataModule`.

    Args:
        trainer_engine: the policy.
        algorithm: what is optimized.
        optimizer: makes the optimizer of all that is trained; override ``configure_optimizers`` for more.
        lr_scheduler: makes its scheduler, which counts steps; ``None`` for none.
        gradient_clip_norm: gradients are cut to this norm; ``None`` for no cut.
        critic_engine: guesses values, for an algorithm with a critic; see
            :class:`~lightning_flashrl.engines.trainer.CausalLMCritic`.
        critic_lr: the critic's learning rate; ``None`` for the policy's.
        reference_engine: the policy that an algorithm with a reference stays near to; its weights never change.
            ``None`` takes the policy as it is when its first ``fit`` begins; checkpoints remember that.

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
        critic_engine: CriticEngine | None = None,
        critic_lr: float | None = None,
        reference_engine: TrainerEngine | None = None,
    ) -> None:
        super().__init__()
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ConfigurationError(f"gradient_clip_norm={gradient_clip_norm}; use a number above 0, or None")
        self.automatic_optimization = False
        self.trainer_engine: Any = trainer_engine
        self.algorithm = algorithm or GRPO()
        _check_roles(self.algorithm, critic_engine, reference_engine)
        self.critic_engine: Any = critic_engine
        self.critic_lr = critic_lr
        self._reference = (reference_engine,)  # in a tuple: no part of what is trained
        self._remembers_reference = self.algorithm.uses_reference and reference_engine is None
        self._reference_weights: Mapping[str, Tensor] | None = None  # of a checkpoint
        self.gradient_clip_norm = gradient_clip_norm
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        self.register_buffer("_policy_version", torch.zeros((), dtype=torch.int64))
        self.last_step: dict[str, float] | None = None
        self._has_warned = False
        self._has_warned_of_validation = False
        self._step_began_s = 0.0

    @property
    def policy_version(self) -> int:
        """Optimizer steps that the policy has gone through."""
        return int(self.get_buffer("_policy_version"))

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its scheduler if there is one. One optimizer updates policy and critic together."""
        trained: list[Any] = _trained(self.trainer_engine)
        if self.critic_engine is not None:
            critic: dict[str, Any] = {"params": _trained(self.critic_engine)}
            if self.critic_lr is not None:
                critic["lr"] = self.critic_lr
            trained = [{"params": trained}, critic]
        optimizer = self._make_optimizer(trained)
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
        """Check what belongs together before anything begins.

        Raises:
            ConfigurationError: something does not.
        """
        data, trainer = self.data, self.trainer
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigurationError(
                f"AsyncRL does not run under {type(trainer.strategy).__name__}, whose ranks hold parts of the weights; "
                "use strategy='ddp' or 'flash_ddp', or one device"
            )
        if trainer.precision == "16-mixed":
            raise ConfigurationError(
                "precision='16-mixed' scales gradients, which AsyncRL divides and cuts before they are unscaled; use "
                "'bf16-mixed' or '32-true'"
            )
        counts_epochs = trainer.max_steps == -1 and trainer.max_epochs != -1
        if data.source.is_endless and data.steps_per_epoch is None and counts_epochs:
            raise ConfigurationError(
                "the prompts never end and nobody says when an epoch does; give Trainer(max_steps=...) or "
                "StreamingDataModule(steps_per_epoch=...)"
            )
        if data.steps.group_size == 1 and not self.algorithm.uses_critic:
            raise ConfigurationError(
                f"steps.group_size=1 with algorithm.advantage={self.algorithm.advantage!r}: a completion alone has "
                "nothing to be compared with; use 2 or more"
            )
        [reference] = self._reference
        if reference is not None and reference.temperature != self.trainer_engine.temperature:
            raise ConfigurationError(
                f"reference_engine.temperature={reference.temperature} is not trainer_engine.temperature="
                f"{self.trainer_engine.temperature}; make them equal, else their distance is not 0 for equal weights"
            )
        if data.rollout.temperature != self.trainer_engine.temperature:
            raise ConfigurationError(
                f"rollout.temperature={data.rollout.temperature} is not trainer_engine.temperature="
                f"{self.trainer_engine.temperature}; make them equal, else the log-probs are of two policies"
            )

    def on_train_start(self) -> None:
        """Begin rollouts."""
        trainer, data, stages = self.trainer, self.data, self._stages()
        self._step_began_s = clock.now_s()
        if data.is_replay:
            data.open_replay(stages)
            return
        address = None
        if trainer.is_global_zero:
            session = data.host(
                self.trainer_engine,
                self.policy_version,
                stages,
                self._reference_policy(),
                limit=self._limit(),
                filters_uninformative=self.algorithm.filters_uninformative,
                home=self._home(),
            )
            address = session.address
        address = trainer.strategy.broadcast(address)
        if not trainer.is_global_zero:
            assert address is not None
            data.join(address, trainer.global_rank, stages, self._home())
        if isinstance(trainer.strategy, FlashDDPStrategy) and trainer.strategy.runtime is not None:
            data.session().held = trainer.strategy.runtime.held

    def _home(self) -> HostHome | None:
        """Where ranks that may die find what they share; ``None`` where ranks end together."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, FlashDDPStrategy):
            return None
        runtime = strategy.runtime
        assert runtime is not None
        return HostHome(runtime.client, runtime.num_fits, runtime.at_end.append)

    def _stages(self) -> Stages:
        algorithm = self.algorithm
        return self.data.stages(has_reference=algorithm.uses_reference, has_critic=algorithm.uses_critic)

    @torch.no_grad()
    def _reference_policy(self) -> TrainerEngine | None:
        """Return the policy to stay near to, if the algorithm has one."""
        if self._remembers_reference and self._reference[0] is None:
            twin = self.trainer_engine.twin_factory()()
            first = self._reference_weights or self.trainer_engine.weights()
            for name, weight in twin.weights().items():
                weight.copy_(first[name])
            self._reference = (twin,)
        return self._reference[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the reference policy, unless it was given."""
        [reference] = self._reference
        if self._remembers_reference and reference is not None:
            checkpoint[_REFERENCE_WEIGHTS] = dict(reference.weights())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference policy that training began with."""
        self._reference_weights = checkpoint.get(_REFERENCE_WEIGHTS)

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

    def on_train_epoch_end(self) -> None:
        """Wait until every rank has said that its rows are trained: the books are right then, and the queue may go."""
        self.trainer.strategy.barrier("flashrl-epoch")
        self.data.session().finish(self.policy_version)

    def on_train_end(self) -> None:
        """End rollouts."""
        session = self.data.current_session
        self.data.close_session()
        if isinstance(session, LeadSession):  # workers have told the last that they know
            self._warn_of_failures(session)

    # ------------------------------------------------------------------ a step
    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Train the rows of one step, as they come."""
        session, version = batch.session, self.policy_version
        metrics = StepMetrics(self.data.max_staleness, self.algorithm.clip_low, self.algorithm.clip_high)
        with self._without_sync():
            for lease in session.micro_batches(version):
                rows = ExperienceBatch.of(lease.batch, self.data.tokenizer.pad_token_id or 0)
                if lease.task == CRITIC:
                    session.commit(lease, {"values": rows.ragged(self._values(rows))})
                elif lease.task == CRITIC_UPDATE:
                    self._backward_critic(rows, metrics)
                else:
                    self._backward(rows, metrics, version)
        found = self._gathered(metrics)
        if not found["rows"]:  # no more prompts: all ranks hear of it here, only rank 0 elsewhere
            self.data.is_over = self.trainer.should_stop = True
            return
        self._update(session, found["count"], found.pop("value_count"))
        session.step_done(self.trainer_engine.weights(), self.policy_version)
        self._log_step(session, found)

    def _backward(self, rows: ExperienceBatch, metrics: StepMetrics, version: int) -> None:
        """Add the gradients of rows, whose prompt groups are whole; forward passes are no larger than set."""
        metrics.add_rows(rows, version)
        algorithm = self.algorithm
        advantages, _ = self._advantages(rows)
        for micro_batch, its_advantages in self._parts(rows, advantages):
            policy_logprobs = self.trainer_engine(micro_batch)  # [N, L - 1]
            losses = algorithm.token_losses(
                policy_logprobs,
                micro_batch.rollout_logprobs,
                its_advantages,
                micro_batch.loss_mask,
                micro_batch.ref_logprobs,
            )
            loss, count = sum_tokens(
                losses, micro_batch.loss_mask, algorithm.reduction, length=algorithm.constant_length
            )
            self.manual_backward(loss)
            metrics.add_loss(loss.detach(), count)
            metrics.add_logprobs(policy_logprobs.detach(), micro_batch)

    def _backward_critic(self, rows: ExperienceBatch, metrics: StepMetrics) -> None:
        """Add the gradients of the critic's error."""
        _, returns = self._advantages(rows)
        for micro_batch, its_returns in self._parts(rows, returns):
            assert micro_batch.values is not None
            values = self.critic_engine(micro_batch)
            losses = clipped_value_loss(values, micro_batch.values, its_returns, clip=self.algorithm.value_clip)
            loss, count = sum_tokens(losses, micro_batch.loss_mask, "token")
            self.manual_backward(loss)
            metrics.add_values(loss.detach(), count, micro_batch.values, its_returns, micro_batch.loss_mask)

    @torch.no_grad()
    def _values(self, rows: ExperienceBatch) -> Tensor:
        """Return the critic's value ``[N, L - 1]`` before each token but the first."""
        values = torch.zeros(rows.loss_mask.shape)
        for index in rows.passes(self.data.steps.micro_batch_tokens):
            found = self.critic_engine(rows.select(index).to(self.device))
            values[index, : found.shape[1]] = found.cpu()
        return values

    def _advantages(self, rows: ExperienceBatch) -> tuple[Tensor, Tensor]:
        """Return advantages ``[N, L - 1]`` or ``[N, 1]``, and a critic's returns of the same shape, 0 without one."""
        algorithm = self.algorithm
        rewards = algorithm.shaped(rows.rewards, rows.loss_mask.sum(dim=1))
        if rows.values is not None:
            return algorithm.token_advantages(rewards, rows.values, rows.loss_mask)
        advantages = algorithm.group_advantages(rewards, rows.group_ids)[:, None]
        return advantages, torch.zeros_like(advantages)

    def _parts(self, rows: ExperienceBatch, numbers: Tensor) -> Iterator[tuple[ExperienceBatch, Tensor]]:
        """Iterate over forward passes: rows, and their part of ``[N, ...]``."""
        for index in rows.passes(self.data.steps.micro_batch_tokens):
            part = rows.select(index)
            yield part.to(self.device), numbers[index, : part.loss_mask.shape[1]].to(self.device)

    def _update(self, session: Session, count: float, value_count: float) -> None:
        """Divide the gradients by what all ranks trained, and apply them."""
        optimizer: Any = self.optimizers()
        parts = [(_trained(self.trainer_engine), count)]
        if self.critic_engine is not None:
            parts.append((_trained(self.critic_engine), value_count))
        if self.trainer.world_size > 1:
            # Ranks had different numbers of micro-batches: gradients are averaged here, once, over all ranks.
            self.manual_backward(torch.stack([(weight * 0).sum() for weights, _ in parts for weight in weights]).sum())
        for weights, its_count in parts:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_mul_(gradients, self.trainer.world_size / max(1.0, its_count))
            if self.gradient_clip_norm is not None:
                nn.utils.clip_grad_norm_(weights, self.gradient_clip_norm)
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
        waited_s = session.take_waited_s()
        rows = int(found["rows"])
        logged = {
            **found,
            "policy_version": float(self.policy_version),
            "step_s": step_s,
            "waited_s": waited_s,
            "tokens_per_s": found["tokens"] / step_s,
            "idle_share/trainer": waited_s / step_s,
        }
        if isinstance(session, LeadSession):
            logged |= session.metrics()
            self._warn_of_failures(session)
        self.last_step = logged
        shown = {"reward", "staleness/oldest", "tokens_per_s", "idle_share/trainer", "idle_share/rollout"}
        for name, value in logged.items():
            self.log(name, value, prog_bar=name in shown, batch_size=rows, rank_zero_only=True)

    def _warn_of_failures(self, session: LeadSession) -> None:
        view = session.view()
        if view.num_failed and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{view.num_failed} completion(s) failed and are left out, as all later ones that fail (rows/failed "
                f"counts them). {view.last_failure}"
            )

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
        answers: list[str | None] = [None] * len(problems)
        for number, problem in enumerate(problems):
            tokens = torch.tensor(list(data.tokenizer.encode(problem.prompt)), dtype=torch.int64)
            try:
                engine.submit([Prompt(number, tokens, seed=number)])
            except ConfigurationError as error:  # an answer is wrong that cannot be given
                self._warn_of_validation(f"a held-out prompt cannot be answered: {error}")
        while engine.num_open:
            for completion in engine.step():
                answers[completion.request_id] = data.decode(completion.tokens.tolist())
        rewards = []
        for reward in data.score(problems, answers):
            if isinstance(reward, RewardError):
                self._warn_of_validation(str(reward))
            rewards.append(0.0 if isinstance(reward, RewardError) else reward)
        return rewards

    def _warn_of_validation(self, why: str) -> None:
        if not self._has_warned_of_validation:
            self._has_warned_of_validation = True
            rank_zero_warn(f"it counts 0 in validation, as all others of its kind: {why}")


def _trained(engine: Any) -> list[nn.Parameter]:
    return [weight for weight in engine.parameters() if weight.requires_grad]


def _check_roles(
    algorithm: PolicyOptimization, critic_engine: CriticEngine | None, reference_engine: TrainerEngine | None
) -> None:
    """Compare what the algorithm needs with what there is."""
    name = type(algorithm).__name__
    if algorithm.uses_critic and critic_engine is None:
        raise ConfigurationError(
            f"{name} with advantage='generalized' needs a critic; give AsyncRL(critic_engine=CausalLMCritic...), or "
            "take an algorithm without one, such as GRPO"
        )
    if not algorithm.uses_critic and critic_engine is not None:
        raise ConfigurationError(
            f"{name} with advantage={algorithm.advantage!r} would never train its critic; leave critic_engine out, or "
            "take PPO"
        )
    if algorithm.uses_critic and algorithm.filters_uninformative:
        raise ConfigurationError(
            "algorithm.filters_uninformative leaves out groups with equal rewards, from which a critic learns all the "
            "same; leave it out"
        )
    if not algorithm.uses_reference and reference_engine is not None:
        raise ConfigurationError(
            f"algorithm.kl_coefficient={algorithm.kl_coefficient} uses no reference; raise it, or leave "
            "reference_engine out"
        )
