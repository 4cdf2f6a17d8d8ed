"""Continuous batching over any transformers causal language model.

A fixed number of *slots* holds one request each: its part of the key-value cache, and the tokens so far. All slots that
are taken decode one token together; a slot whose request is finished takes the next waiting one, whose prompt is then
read in one pass. Between any two steps weights may be swapped and requests interrupted.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lightning_flashrl.engines.base import Completion, Finish, Prompt, Sampling, copy_weights
from lightning_flashrl.engines.exchange import exchanged_weights
from lightning_flashrl.engines.rollout.request import Request, check_prompts, draw, score_tokens
from lightning_flashrl.errors import ConfigurationError


class SlotCache(Cache):
    """Keys and values of all slots, written where each slot stands.

    Before a forward pass, :meth:`aim` says which slots the batch's rows are and where their tokens go.
    """

    def __init__(self, num_slots: int, max_length: int) -> None:
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self._num_slots = num_slots
        self._max_length = max_length
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._slots = torch.empty(0, dtype=torch.int64)
        self._positions = torch.empty(0, dtype=torch.int64)
        self._length = 0

    def aim(self, slots: Tensor, positions: Tensor, length: int) -> None:
        """Set the target of the next pass.

        Args:
            slots: ``[B]`` int64.
            positions: ``[B, T]`` int64, where each token goes.
            length: how much of the slots the pass may attend to.
        """
        self._slots, self._positions, self._length = slots, positions, length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store ``[B, H, T, D]`` and return ``[B, H, length, D]`` of the same slots."""
        if layer_idx not in self._keys:
            shape = (self._num_slots, key_states.shape[1], self._max_length)
            self._keys[layer_idx] = key_states.new_zeros(*shape, key_states.shape[3])
            self._values[layer_idx] = value_states.new_zeros(*shape, value_states.shape[3])
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows = self._slots[:, None]
        keys[rows, :, self._positions] = key_states.transpose(1, 2)
        values[rows, :, self._positions] = value_states.transpose(1, 2)
        if len(self._slots) == self._num_slots:  # every slot, in order
            return keys[:, :, : self._length], values[:, :, : self._length]
        return keys[self._slots, :, : self._length], values[self._slots, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so that nobody has to count."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Masks are always given, so that nobody has to make one."""
        return self._length, 0


class SlotDecoder:
    """The default :class:`~lightning_flashrl.engines.base.RolloutEngine`.

    Args:
        model: a causal language model with full attention; it is put into evaluation mode and owned by the engine.
        sampling: how completions are drawn.
        num_slots: requests that decode together.
        max_length: of a prompt with its completion, in tokens.
        recompute_cache: whether a weight swap reads unfinished requests anew under the new weights. If not, keys and
            values of earlier tokens stay those of earlier weights.
        version: the policy version of the model's weights.

    Raises:
        ConfigurationError: no slots, or a model whose layers do not attend to everything.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        *,
        num_slots: int = 32,
        max_length: int = 1024,
        recompute_cache: bool = False,
        version: int = 0,
    ) -> None:
        if num_slots < 1 or max_length < 2:
            raise ConfigurationError(f"num_slots={num_slots}, max_length={max_length}; use 1 or more, and 2 or more")
        if any(kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or []):
            raise ConfigurationError(
                f"{type(model).__name__} has layers that do not attend to everything; use a model with full attention"
            )
        self.version = version
        self.sampling = sampling
        self.num_slots = num_slots
        self.max_length = max_length
        self.recompute_cache = recompute_cache
        self._model = model
        self._model.train(False)
        self._waiting: collections.deque[Request] = collections.deque()
        self._slots: list[Request | None] = [None] * num_slots
        self._lengths = [0] * num_slots
        self._last = [sampling.pad_token_id] * num_slots
        self._cache = SlotCache(num_slots, max_length)
        self._mean_length = float(sampling.max_new_tokens)

    # ------------------------------------------------------------------ requests
    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting) + sum(request is not None for request in self._slots)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Take requests; they begin as soon as a slot is free.

        Raises:
            ConfigurationError: a prompt is empty or too long, or its number is in use.
        """
        under_way = [request for request in (*self._waiting, *self._slots) if request is not None]
        check_prompts(prompts, under_way, self.sampling, self.max_length)
        self._waiting.extend(Request.of(prompt, self.sampling) for prompt in prompts)

    def under_way(self) -> list[Request]:
        """Return requests that have begun and are not finished; only to be looked at."""
        return [request for request in (*self._slots, *self._waiting) if request is not None and request.tokens]

    def interrupt(self) -> list[Completion]:
        """Stop all requests and return what they have produced."""
        stopped = [request for request in (*self._slots, *self._waiting) if request is not None]
        self._slots = [None] * self.num_slots
        self._waiting.clear()
        return [request.completion(Finish.INTERRUPTED) for request in stopped]

    # ------------------------------------------------------------------ decoding
    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Read waiting prompts into free slots, or decode one token in each slot that is taken."""
        free = [slot for slot, request in enumerate(self._slots) if request is None]
        if self._waiting and len(free) >= min(len(self._waiting), self._read_together()):
            newcomers = [(slot, self._waiting.popleft()) for slot in free[: len(self._waiting)]]
            return self._read(newcomers)
        taken = [slot for slot, request in enumerate(self._slots) if request is not None]
        if not taken:
            return []
        length = max(self._lengths[slot] for slot in taken) + 1
        slots = torch.arange(self.num_slots) if 2 * len(taken) > self.num_slots else torch.tensor(taken)
        positions = torch.tensor([[self._lengths[slot]] for slot in slots.tolist()]).clamp(max=length - 1)
        tokens = torch.tensor([[self._last[slot]] for slot in slots.tolist()])
        logits = self._forward(slots, tokens, positions, length)[:, 0]
        for slot in taken:
            self._lengths[slot] += 1
        is_taken = torch.tensor([self._slots[slot] is not None for slot in slots.tolist()])
        return self._sample(taken, logits[is_taken])

    def _read_together(self) -> int:
        """Return how many slots should be free before prompts are read, as long as more are waiting.

        A read costs about as much as decoding a token does. With N slots and completions of L tokens, N/L slots become
        free with each token; letting k of them wait costs k/2N of the decoding, and saves reads. The sum is least at
        N·√(2/L).
        """
        return max(1, min(self.num_slots, round(self.num_slots * math.sqrt(2 / self._mean_length))))

    def _read(self, newcomers: Sequence[tuple[int, Request]]) -> list[Completion]:
        """Read prompts (and what they had produced before) into slots, and sample their next token."""
        contexts = [request.context for _, request in newcomers]
        length = max(map(len, contexts))
        tokens = torch.full((len(contexts), length), self.sampling.pad_token_id, dtype=torch.int64)
        for row, context in enumerate(contexts):
            tokens[row, : len(context)] = torch.tensor(context)
        slots = torch.tensor([slot for slot, _ in newcomers])
        positions = torch.arange(length).expand(len(contexts), length)
        logits = self._forward(slots, tokens, positions, length)
        last = torch.tensor([len(context) - 1 for context in contexts])
        for (slot, request), context in zip(newcomers, contexts, strict=True):
            self._slots[slot] = request
            self._lengths[slot] = len(context)
        return self._sample([slot for slot, _ in newcomers], logits[torch.arange(len(contexts)), last])

    def _forward(self, slots: Tensor, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """Return logits ``[B, T, V]`` of tokens ``[B, T]`` that each see their slot up to their own position."""
        device = self._model.device
        self._cache.aim(slots.to(device), positions.to(device), length)
        hidden = torch.arange(length) > positions[:, :, None]  # [B, T, L]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype).masked_fill(
            hidden, torch.finfo(self._model.dtype).min
        )
        output = self._model(
            input_ids=tokens.to(device),
            position_ids=positions.to(device),
            attention_mask=mask[:, None].to(device),
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits.float().cpu()  # type: ignore[no-any-return]

    def _sample(self, slots: Sequence[int], logits: Tensor) -> list[Completion]:
        """Draw a token for each slot; return the requests that it finishes."""
        requests = [request for slot in slots if (request := self._slots[slot]) is not None]
        drawn = draw(logits, requests, self.sampling.temperature)
        finished = []
        for slot, request, (token, logprob) in zip(slots, requests, drawn, strict=True):
            self._last[slot] = token
            finish = request.take(token, logprob, self.version, self.sampling)
            if finish is not None:
                finished.append(request.completion(finish))
                self._slots[slot] = None
                self._mean_length += (len(request.tokens) - self._mean_length) / self.num_slots
        return finished

    # ------------------------------------------------------------------ weights
    @torch.inference_mode()
    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Use other weights from the next token on.

        Raises:
            ConfigurationError: a name or shape that the model does not have, or lacks.
        """
        copy_weights(exchanged_weights(self._model), weights)
        self.version = version
        if self.recompute_cache:
            under_way = [request for request in self._slots if request is not None]
            self._slots = [None] * self.num_slots
            self._waiting.extendleft(reversed(under_way))

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of given tokens under the current weights.

        Args:
            tokens: ``[L]`` int64, 2 or more.

        Returns:
            ``[L - 1]`` float32.
        """
        return score_tokens(self._model, tokens, self._model.device)
