"""A request under way and how its tokens are drawn, the same for every engine that draws them itself.

Random numbers belong to a request, not to the batch: one number for each of its positions, drawn when it is submitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_flashrl.engines.base import Completion, Finish, Prompt, Sampling
from lightning_flashrl.errors import ConfigurationError


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what has been produced for it.

    Attributes:
        prompt: what was asked.
        uniforms: a random number in [0, 1) for each position of the completion.
        tokens: so far, the end token included.
        logprobs: of each token, under the policy that sampled it.
        versions: of these policies.
    """

    prompt: Prompt
    uniforms: list[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: Prompt, sampling: Sampling) -> Request:
        """Begin with what the prompt has begun."""
        draw = torch.Generator().manual_seed(prompt.seed)
        request = cls(prompt, torch.rand(sampling.max_new_tokens, generator=draw, dtype=torch.float64).tolist())
        if prompt.begun is not None:
            request.tokens = prompt.begun.tokens.tolist()
            request.logprobs = prompt.begun.logprobs.tolist()
            request.versions = prompt.begun.versions.tolist()
        return request

    @property
    def context(self) -> list[int]:
        """The prompt and all tokens so far."""
        return [*self.prompt.tokens.tolist(), *self.tokens]

    @property
    def last(self) -> int:
        """The newest token."""
        return self.tokens[-1] if self.tokens else int(self.prompt.tokens[-1])

    def take(self, token: int, logprob: float, version: int, sampling: Sampling) -> Finish | None:
        """Append a token; return how that finishes the request, ``None`` if it goes on."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token == sampling.eos_token_id:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= sampling.max_new_tokens else None

    def completion(self, finish: Finish) -> Completion:
        """Return what has been produced."""
        return Completion(
            self.prompt.request_id,
            torch.tensor(self.tokens, dtype=torch.int64),
            torch.tensor(self.logprobs, dtype=torch.float32),
            torch.tensor(self.versions, dtype=torch.int64),
            finish,
        )


def check_prompts(prompts: Sequence[Prompt], under_way: Iterable[Request], sampling: Sampling, max_length: int) -> None:
    """Look whether an engine can take these prompts.

    Raises:
        ConfigurationError: a prompt is empty or too long, has begun all that it may have, or its number is in use.
    """
    used = {request.prompt.request_id for request in under_way}
    longest = max_length - sampling.max_new_tokens
    for prompt in prompts:
        if not 1 <= len(prompt.tokens) <= longest:
            raise ConfigurationError(
                f"request {prompt.request_id} has a prompt of {len(prompt.tokens)} tokens; with max_length="
                f"{max_length} and max_new_tokens={sampling.max_new_tokens} it may have 1 to {longest}"
            )
        if prompt.begun is not None and len(prompt.begun.tokens) >= sampling.max_new_tokens:
            raise ConfigurationError(
                f"request {prompt.request_id} has begun with {len(prompt.begun.tokens)} tokens and max_new_tokens="
                f"{sampling.max_new_tokens}; resume only what was interrupted"
            )
        if prompt.request_id in used:
            raise ConfigurationError(f"request {prompt.request_id} is under way already; number each anew")
        used.add(prompt.request_id)


def draw(logits: Tensor, requests: Sequence[Request], temperature: float) -> list[tuple[int, float]]:
    """Draw the next token of each request with its own random number.

    Args:
        logits: ``[B, V]`` float32, a row for each request.
        requests: whose tokens they are.
        temperature: divides logits; 0 takes the likeliest token.

    Returns:
        Each request's token and its log-prob.
    """
    logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(dim=-1)  # [B, V]
    if temperature > 0:
        uniforms = torch.tensor([[request.uniforms[len(request.tokens)]] for request in requests], dtype=torch.float64)
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        chosen = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:]).clamp(max=logits.shape[-1] - 1)
    else:
        chosen = logprobs.argmax(dim=-1, keepdim=True)
    picked = logprobs.gather(1, chosen)[:, 0]
    return list(zip(chosen[:, 0].tolist(), picked.tolist(), strict=True))


def score_tokens(model: nn.Module, tokens: Tensor, device: torch.device) -> Tensor:
    """Return the log-probs of given tokens under a transformers model, ``[L - 1]`` float32 for ``[L]`` tokens."""
    logits = model(input_ids=tokens[None, :-1].to(device), use_cache=False).logits[0].float().cpu()
    logprobs: Tensor = logits.log_softmax(dim=-1)
    return logprobs.gather(1, tokens[1:, None].cpu())[:, 0]
