"""What a user chooses: how rollouts and training overlap, what a step is, how completions are drawn."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lightning_flashrl.engines import Sampling
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.weights import Swap


class Workflow(enum.StrEnum):
    """How rollouts and training overlap."""

    SYNC = "sync"
    """A step's rows are all generated, then all trained; nothing overlaps. On-policy."""
    STREAMING = "streaming"
    """A step's first rows are trained while its last are generated. On-policy, and the same steps as ``sync``."""
    ASYNC = "async"
    """Later rows are generated while earlier ones are trained, within ``max_staleness``. A worker takes new weights
    when it has finished what it generates (delayed update)."""
    SUB_STEP = "sub_step"
    """The same, and workers take new weights one after the other, so that others always generate."""
    IN_FLIGHT = "in_flight"
    """The same, and workers take new weights between any two tokens."""

    @property
    def swap(self) -> Swap:
        """When workers take new weights."""
        return {Workflow.SUB_STEP: Swap.STAGGERED, Workflow.IN_FLIGHT: Swap.IN_FLIGHT}.get(self, Swap.ITERATION)

    @property
    def is_on_policy(self) -> bool:
        """Whether no row is ever older than the policy it trains."""
        return self in (Workflow.SYNC, Workflow.STREAMING)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What one optimizer step is made of, over all ranks.

    Attributes:
        prompts: prompt groups of a step.
        group_size: completions of a prompt.
        micro_batch_tokens: tokens of prompts and completions in one forward pass.

    Raises:
        ConfigurationError: a number that cannot be.
    """

    prompts: int = 32
    group_size: int = 8
    micro_batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"steps.{name}={getattr(self, name)}; use 1 or more")

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """Who generates, and how.

    Attributes:
        workers: rollout processes.
        max_new_tokens: where a completion is cut.
        temperature: of sampling; the trainer engine's must be the same.
        num_slots: completions that a worker decodes together.
        num_ahead: prompts that a worker holds beyond these, so that no slot waits.
        max_length: of a prompt with its completion, in tokens.
        num_threads: of torch in each worker.
        reward_workers: processes that score completions, so that a reward that hangs, crashes or takes long costs its
            row only; 0 lets the rollout workers score. ``None`` takes 1 for a reward of your own and 0 for a task's.
        reward_timeout_s: how long a reward may take in such a process.
        reference_workers: processes that compute log-probs under the reference policy, for algorithms that need them.
        standby: processes of each role that are kept ready, engine and all, to take the place of one that dies;
            ``None`` takes 1 under ``flash_ddp`` and 0 otherwise.

    Raises:
        ConfigurationError: a number that cannot be.
    """

    workers: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    num_slots: int = 32
    num_ahead: int = 16
    max_length: int = 1024
    num_threads: int = 1
    reward_workers: int | None = None
    reward_timeout_s: float = 10.0
    reference_workers: int = 1
    standby: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "max_new_tokens", "num_slots", "num_threads", "reference_workers"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"rollout.{name}={getattr(self, name)}; use 1 or more")
        for name in ("num_ahead", "reward_workers", "standby"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigurationError(f"rollout.{name}={getattr(self, name)}; use 0 or more")
        if not self.reward_timeout_s > 0:
            raise ConfigurationError(f"rollout.reward_timeout_s={self.reward_timeout_s}; use a time above 0 s")
        if not self.temperature > 0:
            raise ConfigurationError(f"rollout.temperature={self.temperature}; use a number above 0")
        if self.max_length <= self.max_new_tokens:
            raise ConfigurationError(
                f"rollout.max_length={self.max_length} leaves no room for a prompt beside max_new_tokens="
                f"{self.max_new_tokens}; raise it"
            )

    def sampling(self, eos_token_id: int | None, pad_token_id: int | None) -> Sampling:
        """Return how completions are drawn with a tokenizer's marks."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id or 0,
        )
