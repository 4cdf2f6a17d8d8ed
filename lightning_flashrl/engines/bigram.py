"""The policy of simulated engines: the next token depends on the last one only, through two small tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_flashrl.errors import ConfigurationError


class BigramPolicy(nn.Module):
    """Logits of the next token after each token. Two of the same vocabulary, width and seed are equal.

    Args:
        vocabulary: number of tokens.
        width: of the tables: memory and time grow with ``vocabulary × width``.
        seed: of the weights.

    Raises:
        ConfigurationError: fewer than two tokens, or no width.

    >>> policy = BigramPolicy(vocabulary=11)
    >>> policy(torch.tensor([[3, 4]])).shape, list(policy.state_dict())
    (torch.Size([1, 2, 11]), ['read.weight', 'write.weight'])
    """

    def __init__(self, vocabulary: int, *, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        if vocabulary < 2 or width < 1:
            raise ConfigurationError(f"vocabulary={vocabulary}, width={width}; use 2 or more, and 1 or more")
        draw = torch.Generator().manual_seed(seed)
        self.read = nn.Embedding(vocabulary, width, _weight=torch.randn(vocabulary, width, generator=draw))
        self.write = nn.Embedding(
            vocabulary, width, _weight=torch.randn(vocabulary, width, generator=draw) / width**0.5
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[..., V]`` float32 for tokens ``[...]``."""
        return functional.linear(self.read(tokens), self.write.weight)

    def logprobs(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the log-prob of each token but the first: ``[..., L - 1]`` for ``[..., L]``."""
        logprobs = (self(tokens[..., :-1]) / temperature).log_softmax(dim=-1)
        picked: Tensor = logprobs.gather(-1, tokens[..., 1:, None])
        return picked[..., 0]
