"""Reference inference as a task: log-probs of completions under a policy whose weights stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_flashrl.engines.base import TrainerEngine, copy_weights
from lightning_flashrl.engines.process import REFERENCE_POLICY, Begin, Job
from lightning_flashrl.engines.stage import Result, StageWorker
from lightning_flashrl.engines.trainer import TokenBatch
from lightning_flashrl.streaming import Lease, QueueVerbs
from lightning_flashrl.weights import WeightReceiver, WeightsAddress

REFERENCE = "reference"
"""The queue's task."""
REFERENCE_FIELDS = ("prompt.tokens", "response.tokens")


class FrozenPolicy:
    """A trainer engine that loads published weights once, and computes log-probs without gradients.

    Args:
        engine: of the model that was published.

    Attributes:
        version: of its weights; −1 before it has any.
    """

    def __init__(self, engine: TrainerEngine) -> None:
        self.version = -1
        self._engine: Any = engine
        if isinstance(engine, torch.nn.Module):
            engine.train(False)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take weights.

        Raises:
            ConfigurationError: they are those of another model.
        """
        copy_weights(self._engine.weights(), weights)
        self.version = version

    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs ``[L - 1]`` of tokens ``[L]`` but the first, to prove which weights these are."""
        scores: Tensor = self._engine.score(tokens)
        return scores

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Return the log-prob ``[N, L - 1]`` of each token but the first, at the temperature of the rollouts."""
        logprobs: Tensor = self._engine(batch)
        return logprobs


class ReferenceStage:
    """Writes ``ref_logprobs``.

    Args:
        policy: the reference.
        max_tokens: of a forward pass, padding included.
    """

    def __init__(self, policy: FrozenPolicy, max_tokens: int) -> None:
        self._policy = policy
        self._max_tokens = max_tokens

    def __call__(self, lease: Lease) -> Iterator[Result]:
        """Compute a lease's log-probs, a forward pass at a time."""
        batch = TokenBatch.of(lease.batch)
        for index in batch.passes(self._max_tokens):
            part = batch.select(index)
            columns = part.ragged(self._policy.logprobs(part)).unbind()
            for row, logprobs in zip(index.tolist(), columns, strict=True):
                yield Result(lease.rows[row], {"ref_logprobs": logprobs}, len(logprobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSettings(Job):
    """What a reference worker's process must know.

    Attributes:
        make_engine: makes its engine, in the worker's process.
        max_tokens: of a lease and of a forward pass.
    """

    role: ClassVar[str] = "reference"
    make_engine: Callable[[], TrainerEngine]
    max_tokens: int

    def prepare(self) -> FrozenPolicy:
        """Make the engine."""
        return FrozenPolicy(self.make_engine())

    def run(
        self,
        prepared: FrozenPolicy,
        queue: QueueVerbs,
        weights: Mapping[str, WeightsAddress],
        begin: Begin,
        stop: threading.Event,
    ) -> None:
        """Compute log-probs until the stream ends."""
        policy = prepared
        with WeightReceiver(weights[REFERENCE_POLICY]) as receiver:
            receiver.load(policy)
        stage = ReferenceStage(policy, self.max_tokens)
        worker = StageWorker(queue, REFERENCE, REFERENCE_FIELDS, stage, tokens=self.max_tokens)
        worker.statistics.version = policy.version
        begin(worker.statistics)
        worker.run(stop)
