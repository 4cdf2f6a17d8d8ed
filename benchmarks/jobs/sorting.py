"""The task that both GRPO jobs train: put digits into order. Plain functions, for environments without this package."""

from __future__ import annotations

import random
from typing import Any

ALPHABET = {"short": "0123456789>", "long": "0123456789>" + "".join(chr(0x4E00 + number) for number in range(246))}
"""Letters that the model knows; with 257 of them a random policy seldom ends a completion."""
SIZES: dict[str, dict[str, Any]] = {
    "short": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4},
    "long": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Fields of the Llama's config."""
MAX_NEW_TOKENS = {"short": 16, "long": 64}
MAX_LENGTH = 128
GROUP_SIZE = 8
PROMPTS = {"short": 32, "long": 2}
"""A step: 256 completions of at most 16 tokens, or 16 of at most 64."""
LR = 1e-6
"""So small that completions stay as long as those of the first policy, whoever trains it."""


def problem(number: int) -> dict[str, str]:
    """A few digits, and what they look like in order."""
    draw = random.Random(number)
    digits = "".join(draw.choice("0123456789") for _ in range(draw.randint(2, 7)))
    return {"prompt": f"{digits}>", "answer": "".join(sorted(digits))}


def score(completion: str, answer: str) -> float:
    """The share of places that are right."""
    right = sum(a == b for a, b in zip(completion, answer, strict=False))
    return right / max(len(completion), len(answer))
