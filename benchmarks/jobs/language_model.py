"""The model and the data of all benchmark jobs, so that every system trains the same thing. Needs nothing but torch.

Data is a function of the sample's number alone, and samples go to ranks as Lightning's sampler deals them. A job that
loses nothing ends with the same weights, whoever ran it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the model and of one rank's batch.

    Attributes:
        vocabulary: number of tokens.
        width: features of a token, ``D``.
        depth: blocks.
        length: tokens of a sample, ``T``.
        batch_size: samples of a rank's step, ``B``.
    """

    vocabulary: int
    width: int
    depth: int
    length: int
    batch_size: int


SHAPES = {
    "recovery": Shape(vocabulary=8192, width=256, depth=8, length=32, batch_size=4),
    "5ms": Shape(vocabulary=256, width=64, depth=1, length=8, batch_size=1),
    "50ms": Shape(vocabulary=512, width=128, depth=2, length=64, batch_size=14),
    "500ms": Shape(vocabulary=8192, width=256, depth=8, length=64, batch_size=10),
}
"""``recovery`` has 10.5 million parameters; the others are named after their step time on two cores."""


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // 64)
        self.attention_norm = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        batch_size, length, width = hidden.shape
        heads = self.projections(self.attention_norm(hidden)).view(batch_size, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, D / H]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.mix(attended.transpose(1, 2).reshape(batch_size, length, width))
        return hidden + cast(Tensor, self.feed_forward(hidden))


class LanguageModel(nn.Module):
    """A small decoder; always begins with the same weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*[Block(shape.width) for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return cast(Tensor, self.head(self.norm(self.blocks(hidden))))


def loss_of(model: nn.Module, samples: Tensor) -> Tensor:
    """Mean cross entropy of the next token; ``samples`` is ``[B, T + 1]``."""
    logits = model(samples[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


class Samples(Dataset[Tensor]):
    """Random tokens; sample ``i`` is the same in every process."""

    def __init__(self, shape: Shape, size: int) -> None:
        self._shape = shape
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self._shape.vocabulary, (self._shape.length + 1,), generator=generator)


def batch_of(shape: Shape, step: int, rank: int, world_size: int) -> Tensor:
    """What a distributed sampler without shuffling deals to ``rank`` as its batch number ``step``."""
    first = step * shape.batch_size
    samples = Samples(shape, 0)
    return torch.stack([samples[(first + i) * world_size + rank] for i in range(shape.batch_size)])


def hash_of(model: nn.Module) -> str:
    """Digest of all parameters, by order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
