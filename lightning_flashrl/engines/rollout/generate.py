"""``model.generate`` of transformers as a rollout engine, batch by batch: what continuous batching is compared with.

A step takes the next requests, pads them to one length and lets transformers generate until the last of them is
finished. transformers runs the model and keeps the cache; which token comes next is decided here, by a logits processor
that leaves nothing else to choose: so each request has its own random numbers, and the log-probs are those of the
distribution that was drawn from. Weights change and requests are interrupted between two batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from lightning_flashrl.engines.base import Completion, Finish, Prompt, Sampling, copy_weights
from lightning_flashrl.engines.exchange import exchanged_weights
from lightning_flashrl.engines.rollout.request import Request, check_prompts, draw, score_tokens
from lightning_flashrl.errors import ConfigurationError


class _Draw(LogitsProcessor):
    """Draws each request's next token, and leaves only that one possible."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, version: int) -> None:
        self.finishes: list[Finish | None] = [None] * len(requests)
        self._requests = requests
        self._sampling = sampling
        self._version = version

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``[B, V]`` with one finite score in each row; rows that are finished go on with padding."""
        going = [row for row, finish in enumerate(self.finishes) if finish is None]
        requests = [self._requests[row] for row in going]
        drawn = draw(scores[going].float().cpu(), requests, self._sampling.temperature)
        tokens = torch.full((len(self._requests), 1), self._sampling.pad_token_id)
        for row, request, (token, logprob) in zip(going, requests, drawn, strict=True):
            tokens[row] = token
            self.finishes[row] = request.take(token, logprob, self._version, self._sampling)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.to(scores.device), 0.0)


class _Stop(StoppingCriteria):
    """Says which requests are finished."""

    def __init__(self, drawing: _Draw) -> None:
        self._drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([finish is not None for finish in self._drawing.finishes], device=input_ids.device)


class TransformersGenerate:
    """A :class:`~lightning_flashrl.engines.base.RolloutEngine` over ``model.generate``.

    Every step is a whole batch, as long as its longest completion: a request waits for its neighbours.

    Args:
        model: any model that transformers can generate with from tokens alone; it is put into evaluation mode, loses
            its own generation settings (penalties and the like) and is owned by the engine.
        sampling: how completions are drawn.
        batch_size: requests that are generated together.
        max_length: of a prompt with its completion, in tokens.
        version: the policy version of the model's weights.

    Raises:
        ConfigurationError: no requests in a batch, or no room for a prompt and a completion.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        *,
        batch_size: int = 32,
        max_length: int = 1024,
        version: int = 0,
    ) -> None:
        if batch_size < 1 or max_length < 2:
            raise ConfigurationError(f"batch_size={batch_size}, max_length={max_length}; use 1 or more, and 2 or more")
        self.version = version
        self.sampling = sampling
        self.batch_size = batch_size
        self.max_length = max_length
        self._model = model
        self._model.train(False)
        self._model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self._waiting: list[Request] = []

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Take requests; they begin in the order in which they come.

        Raises:
            ConfigurationError: a prompt is empty or too long, or its number is in use.
        """
        check_prompts(prompts, self._waiting, self.sampling, self.max_length)
        self._waiting += [Request.of(prompt, self.sampling) for prompt in prompts]

    def interrupt(self) -> list[Completion]:
        """Return the requests that have not begun, with what they were submitted with: mostly nothing."""
        stopped, self._waiting = self._waiting, []
        return [request.completion(Finish.INTERRUPTED) for request in stopped]

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Generate the next batch to its end."""
        if not self._waiting:
            return []
        batch = self._waiting[: self.batch_size]
        contexts = [request.context for request in batch]
        length = max(map(len, contexts))
        tokens = torch.full((len(batch), length), self.sampling.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, context in enumerate(contexts):
            tokens[row, length - len(context) :] = torch.tensor(context)
            mask[row, length - len(context) :] = 1
        drawing = _Draw(batch, self.sampling, self.version)
        longest = max(self.sampling.max_new_tokens - len(request.tokens) for request in batch)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=longest, pad_token_id=self.sampling.pad_token_id
        )
        generate: Any = self._model.generate
        generate(
            tokens.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=settings,
            logits_processor=[drawing],
            stopping_criteria=[_Stop(drawing)],
        )
        self._waiting = self._waiting[len(batch) :]
        return [
            request.completion(finish)
            for request, finish in zip(batch, drawing.finishes, strict=True)
            if finish is not None
        ]

    @torch.inference_mode()
    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Use other weights from the next batch on.

        Raises:
            ConfigurationError: a name or shape that the model does not have, or lacks.
        """
        copy_weights(exchanged_weights(self._model), weights)
        self.version = version

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of given tokens under the current weights.

        Args:
            tokens: ``[L]`` int64, 2 or more.

        Returns:
            ``[L - 1]`` float32.
        """
        return score_tokens(self._model, tokens, self._model.device)
