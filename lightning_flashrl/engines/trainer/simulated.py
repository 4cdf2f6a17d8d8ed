"""The trainer's side of a simulation: a simulated engine's policy, with gradients, in the time it is told to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_flashrl import clock
from lightning_flashrl.engines.bigram import BigramPolicy
from lightning_flashrl.engines.trainer.batch import ExperienceBatch
from lightning_flashrl.errors import ConfigurationError


class SimulatedTrainer(nn.Module):
    """A trainer engine that takes a set time for each token of a batch, padding not counted.

    It has the policy of a :class:`~lightning_flashrl.engines.rollout.SimulatedEngine` of the same vocabulary and seed,
    and really learns: what is published differs from version to version.

    Args:
        vocabulary: number of tokens.
        tokens_per_s: trained, forward and backward pass together. The forward pass takes the time of both.
        temperature: that of the rollouts.
        seed: of the weights.
        sleep: lets so many seconds pass.

    Attributes:
        busy_s: simulated time so far.

    Raises:
        ConfigurationError: no speed, or a temperature that is not above 0.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        tokens_per_s: float = math.inf,
        temperature: float = 1.0,
        seed: int = 0,
        sleep: Callable[[float], None] = clock.sleep,
    ) -> None:
        super().__init__()
        if not tokens_per_s > 0 or not temperature > 0:
            raise ConfigurationError(
                f"trainer_engine.tokens_per_s={tokens_per_s}, temperature={temperature}; use numbers above 0"
            )
        self.policy = BigramPolicy(vocabulary, seed=seed)
        self.tokens_per_s = tokens_per_s
        self.temperature = temperature
        self.busy_s = 0.0
        self._sleep = sleep

    def forward(self, batch: ExperienceBatch) -> Tensor:
        """Return the log-prob of each token but the first, given those before: ``[N, L - 1]`` float32."""
        seconds = int(batch.attention_mask.sum()) / self.tokens_per_s
        self.busy_s += seconds
        if seconds > 0:
            self._sleep(seconds)
        return self.policy.logprobs(batch.tokens, self.temperature)

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of given tokens ``[L]`` at temperature 1, as a rollout engine's ``score`` does."""
        return self.policy.logprobs(tokens).cpu()

    def weights(self) -> Mapping[str, Tensor]:
        """Return what simulated engines load. They are the live weights, not copies."""
        return self.policy.state_dict()
