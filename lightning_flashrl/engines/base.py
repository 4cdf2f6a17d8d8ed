"""What engines are.

A rollout engine takes prompts and gives completions, with the log-prob and the policy version of every token. A trainer
engine computes log-probs with gradients. One's own has the methods of :class:`RolloutEngine` or :class:`TrainerEngine`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from lightning_flashrl.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_flashrl.engines.trainer.batch import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: where a completion is cut.
        temperature: divides logits; 0 takes the likeliest token. Log-probs are those of the divided logits.
        eos_token_id: ends a completion, and is part of it; ``None`` for no such token.
        pad_token_id: fills up batches inside an engine; never seen outside.

    Raises:
        ConfigurationError: no tokens, or a negative temperature.
    """

    max_new_tokens: int
    temperature: float = 1.0
    eos_token_id: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"rollout.max_new_tokens={self.max_new_tokens}; use 1 or more")
        if not self.temperature >= 0:
            raise ConfigurationError(f"rollout.temperature={self.temperature}; use 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A request for one completion.

    Attributes:
        request_id: the caller's number.
        tokens: ``[P]`` int64, at least one.
        seed: of the random numbers of this completion: the same seed, prompt and weights give the same tokens. Its
            lower 32 bits count.
        begun: what an earlier, interrupted rollout of this request has produced; it goes on from there.
    """

    request_id: int
    tokens: Tensor
    seed: int = 0
    begun: Completion | None = None


class Finish(enum.StrEnum):
    """Why a completion ends."""

    STOP = "stop"
    """With the end token."""
    LENGTH = "length"
    """At ``max_new_tokens``."""
    INTERRUPTED = "interrupted"
    """By the caller; it can be resumed."""


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What came out.

    Attributes:
        request_id: of the prompt.
        tokens: ``[T]`` int64, the end token included.
        logprobs: ``[T]`` float32, under the policy that sampled each token.
        versions: ``[T]`` int64, the policy version that sampled each token.
        finish: why it ends.
    """

    request_id: int
    tokens: Tensor
    logprobs: Tensor
    versions: Tensor
    finish: Finish


class RolloutEngine(Protocol):
    """Generates completions.

    Attributes:
        version: the policy version of its weights.
    """

    version: int

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Take requests, all or none; they begin as soon as there is a place for them.

        Raises:
            ConfigurationError: a prompt is empty or too long, or its number is in use.
        """

    def step(self) -> list[Completion]:
        """Go on a little with all requests that have a place, and return those that are finished."""

    def interrupt(self) -> list[Completion]:
        """Stop all requests and return what they have produced, with :attr:`Finish.INTERRUPTED`."""

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Use other weights from the next token on.

        Args:
            weights: by name, as ``model.state_dict()`` has them.
            version: their policy version.

        Raises:
            ConfigurationError: a name or shape that the model does not have, or lacks.
        """

    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of given tokens under the current weights, to prove which weights these are.

        Args:
            tokens: ``[L]`` int64, 2 or more.

        Returns:
            ``[L - 1]`` float32: of each token but the first, given those before, at temperature 1.
        """


class TrainerEngine(Protocol):
    """Computes log-probs of sampled tokens, with gradients. It is a torch module as well: its parameters are trained.

    Attributes:
        temperature: that of the rollouts.
    """

    temperature: float

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the log-prob ``[N, L - 1]`` of each token but the first, given those before, at the temperature."""

    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs ``[L - 1]`` of tokens ``[L]`` but the first at temperature 1, without gradients."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return what rollout engines load, by name: the live weights, not copies."""

    def rollout_engine(self, sampling: Sampling, *, num_slots: int, max_length: int) -> RolloutEngine:
        """Return an engine that generates with the live weights, for validation."""

    def rollout_factory(self, sampling: Sampling, *, num_slots: int, max_length: int) -> Callable[[], RolloutEngine]:
        """Return what makes an engine of the same model in another process, where it loads :meth:`weights`."""

    def twin_factory(self) -> Callable[[], TrainerEngine]:
        """Return what makes a trainer engine of the same model in another process, to which :meth:`weights` fit."""


class CriticEngine(Protocol):
    """Guesses what reward is still to come, with gradients. It is a torch module as well: it is trained."""

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the value ``[N, L - 1]`` before each token but the first."""


def copy_weights(live: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into those that a model exchanges.

    Raises:
        ConfigurationError: names or shapes differ; nothing is copied then.
    """
    missing, unknown = sorted(live.keys() - weights.keys()), sorted(weights.keys() - live.keys())
    if missing or unknown:
        raise ConfigurationError(
            f"weights do not fit the model: {len(missing)} missing ({', '.join(missing[:3])}), {len(unknown)} unknown "
            f"({', '.join(unknown[:3])}); publish the weights() of a trainer with the same model and adapters"
        )
    for name, weight in weights.items():
        if weight.shape != live[name].shape:
            raise ConfigurationError(
                f"weight {name!r} has the shape {list(weight.shape)}, the model's has {list(live[name].shape)}; "
                "publish the weights() of a trainer with the same model and adapters"
            )
    for name, weight in weights.items():
        live[name].copy_(weight)
