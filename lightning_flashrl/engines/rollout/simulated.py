"""A rollout engine that takes the time it is told to: for planning, and for tests of what stands around an engine.

There is no language model. Completions come from a :class:`~lightning_flashrl.engines.bigram.BigramPolicy`, so that
log-probs, versions, scores and weight swaps are as true as those of any other engine. How long completions are can be
set too. Time passes in ``sleep``: give one of your own, and hours pass at once.
"""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flashrl import clock
from lightning_flashrl.engines.base import Completion, Finish, Prompt, Sampling, copy_weights
from lightning_flashrl.engines.bigram import BigramPolicy
from lightning_flashrl.engines.rollout.request import Request, check_prompts, draw
from lightning_flashrl.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpeed:
    """How long the parts of generation take.

    Attributes:
        tokens_per_s: that each request decodes. Requests in other slots do not slow it down, as on a device that waits
            for its memory.
        prefill_s: for reading one prompt, during which nothing is decoded.
        swap_s: for loading weights.

    Raises:
        ConfigurationError: no speed, or a negative time.

    >>> RolloutSpeed(tokens_per_s=50.0).token_s
    0.02
    """

    tokens_per_s: float = math.inf
    prefill_s: float = 0.0
    swap_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.tokens_per_s > 0:
            raise ConfigurationError(f"rollout.speed.tokens_per_s={self.tokens_per_s}; use a number above 0")
        for name in ("prefill_s", "swap_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"rollout.speed.{name}={getattr(self, name)}; use 0 or more seconds")

    @property
    def token_s(self) -> float:
        """Seconds for one token of every request."""
        return 1 / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormalLengths:
    """Lengths of which a few are much longer than most, as those of answers to hard questions are.

    Attributes:
        median: half of all completions are longer.
        spread: standard deviation of the length's logarithm; 0 for completions of one length.

    Raises:
        ConfigurationError: a median below 1 or a negative spread.

    >>> lengths = LogNormalLengths(median=200, spread=0.8)
    >>> lengths(random.Random(1)), LogNormalLengths(median=200, spread=0)(random.Random(1))
    (561, 200)
    """

    median: float
    spread: float

    def __post_init__(self) -> None:
        if not 1 <= self.median < math.inf or not 0 <= self.spread < math.inf:
            raise ConfigurationError(
                f"rollout.lengths.median={self.median}, spread={self.spread}; use a median of 1 or more and "
                "a spread of 0 or more"
            )

    def __call__(self, random: random.Random) -> int:
        """Draw a length, 1 or more."""
        return max(1, round(self.median * math.exp(random.gauss(0.0, self.spread))))


class SimulatedEngine:
    """A :class:`~lightning_flashrl.engines.base.RolloutEngine` with set speeds.

    Args:
        sampling: how completions are drawn.
        vocabulary: number of tokens.
        speed: how long everything takes; nothing takes any time if not given.
        lengths: draws how long a completion would be if nothing cut it, from a generator that the request's seed
            belongs to. The end token comes there and nowhere else, with the log-prob that the policy gives it. If not
            given, it comes when it is drawn.
        num_slots: requests that decode together.
        max_length: of a prompt with its completion, in tokens.
        seed: of the weights.
        version: the policy version of the weights.
        sleep: lets so many seconds pass.

    Attributes:
        busy_s: simulated time so far.

    Raises:
        ConfigurationError: no slots, lengths without an end token, or tokens that the vocabulary does not have.

    >>> passed = []
    >>> engine = SimulatedEngine(
    ...     Sampling(max_new_tokens=1000, eos_token_id=1),
    ...     vocabulary=50,
    ...     speed=RolloutSpeed(tokens_per_s=20, prefill_s=0.5),
    ...     lengths=LogNormalLengths(median=300, spread=0),
    ...     sleep=passed.append,
    ... )
    >>> engine.submit([Prompt(1, torch.tensor([7, 8]))])
    >>> while engine.num_open:
    ...     done = engine.step()
    >>> len(done[0].tokens), str(done[0].finish), round(sum(passed), 6)
    (300, 'stop', 15.45)
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocabulary: int,
        speed: RolloutSpeed | None = None,
        lengths: Callable[[random.Random], int] | None = None,
        num_slots: int = 32,
        max_length: int = 4096,
        seed: int = 0,
        version: int = 0,
        sleep: Callable[[float], None] = clock.sleep,
    ) -> None:
        if num_slots < 1 or max_length < 2:
            raise ConfigurationError(f"num_slots={num_slots}, max_length={max_length}; use 1 or more, and 2 or more")
        if lengths is not None and sampling.eos_token_id is None:
            raise ConfigurationError(
                "rollout.lengths without rollout.eos_token_id; set the token that ends completions"
            )
        if sampling.eos_token_id is not None and not 0 <= sampling.eos_token_id < vocabulary:
            raise ConfigurationError(
                f"rollout.eos_token_id={sampling.eos_token_id} and vocabulary={vocabulary}; use one of its tokens"
            )
        self.version = version
        self.sampling = sampling
        self.speed = speed or RolloutSpeed()
        self.num_slots = num_slots
        self.max_length = max_length
        self.busy_s = 0.0
        self._lengths = lengths
        self._sleep = sleep
        self._policy = BigramPolicy(vocabulary, seed=seed)
        self._vocabulary = vocabulary
        self._waiting: collections.deque[Request] = collections.deque()
        self._slots: list[Request] = []
        self._ends: dict[int, int] = {}

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting) + len(self._slots)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Take requests; they begin as soon as a slot is free.

        Raises:
            ConfigurationError: a prompt is empty or too long, has unknown tokens, or its number is in use.
        """
        check_prompts(prompts, (*self._waiting, *self._slots), self.sampling, self.max_length)
        for prompt in prompts:
            if not 0 <= int(prompt.tokens.min()) <= int(prompt.tokens.max()) < self._vocabulary:
                raise ConfigurationError(
                    f"request {prompt.request_id} has tokens from {int(prompt.tokens.min())} to "
                    f"{int(prompt.tokens.max())}; the vocabulary has {self._vocabulary}"
                )
        if self._lengths is not None:
            self._ends.update({prompt.request_id: self._lengths(random.Random(prompt.seed)) for prompt in prompts})
        self._waiting.extend(Request.of(prompt, self.sampling) for prompt in prompts)

    def under_way(self) -> list[Request]:
        """Return requests that have begun and are not finished; only to be looked at."""
        return [request for request in (*self._slots, *self._waiting) if request.tokens]

    def interrupt(self) -> list[Completion]:
        """Stop all requests and return what they have produced."""
        stopped = [*self._slots, *self._waiting]
        self._slots.clear()
        self._waiting.clear()
        self._ends.clear()
        return [request.completion(Finish.INTERRUPTED) for request in stopped]

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Read waiting prompts into free slots, or decode one token in each slot that is taken."""
        num_free = self.num_slots - len(self._slots)
        if self._waiting and num_free:
            requests = [self._waiting.popleft() for _ in range(min(num_free, len(self._waiting)))]
            self._slots += requests
            self._pass(len(requests) * self.speed.prefill_s)
        elif self._slots:
            requests = list(self._slots)
            self._pass(self.speed.token_s)
        else:
            return []
        finished = []
        for request, (token, logprob) in zip(requests, self._draw(requests), strict=True):
            finish = request.take(token, logprob, self.version, self.sampling)
            if finish is not None:
                finished.append(request.completion(finish))
                self._slots.remove(request)
                self._ends.pop(request.prompt.request_id, None)
        return finished

    def _draw(self, requests: Sequence[Request]) -> list[tuple[int, float]]:
        """Return the next token of each request with its log-prob."""
        logits = self._policy(torch.tensor([request.last for request in requests]))  # [B, V]
        temperature, end = self.sampling.temperature, self.sampling.eos_token_id
        if self._lengths is None or end is None:
            return draw(logits, requests, temperature)
        goes_on = logits.clone()
        goes_on[:, end] = -torch.inf
        drawn = draw(goes_on, requests, temperature)
        tokens = [
            end if len(request.tokens) + 1 >= self._ends[request.prompt.request_id] else token
            for request, (token, _) in zip(requests, drawn, strict=True)
        ]
        logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(dim=-1)
        return list(zip(tokens, logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].tolist(), strict=True))

    def _pass(self, seconds: float) -> None:
        self.busy_s += seconds
        if seconds > 0:
            self._sleep(seconds)

    @torch.inference_mode()
    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Use other weights from the next token on.

        Raises:
            ConfigurationError: a name or shape that the policy does not have, or lacks.
        """
        copy_weights(self._policy.state_dict(), weights)
        self._pass(self.speed.swap_s)
        self.version = version

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs of given tokens under the current weights. It takes no time.

        Args:
            tokens: ``[L]`` int64, 2 or more.

        Returns:
            ``[L - 1]`` float32.
        """
        return self._policy.logprobs(tokens)
