"""The rows of an RL workflow: which fields they have, and who writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from lightning_flashrl.streaming import Field

EXPERIENCE: dict[str, Any] = {
    "prompt": {
        "tokens": Field(torch.int64, (None,)),
        "text": Field(str),
        "answer": Field(str),
        "data": Field(str),
        "group_id": Field(int),
        "seed": Field(int),
    },
    "response": {
        "tokens": Field(torch.int64, (None,)),
        "rollout_logprobs": Field(torch.float32, (None,)),
        "versions": Field(torch.int64, (None,)),
        "is_complete": Field(bool),
    },
    "policy_version": Field(int),
    "reward": Field(float),
}
"""``prompt`` is written by whoever brings prompts, all others by rollout workers.

* ``prompt.tokens`` ``[P]``; ``text``, ``answer`` and ``data`` (a JSON object) for the reward; ``group_id`` of the
  prompt group; ``seed`` of its random numbers.
* ``response.tokens`` ``[T]`` with the end token; ``rollout_logprobs`` ``[T]`` under the policy that sampled each token;
  ``versions`` ``[T]`` of these policies; ``is_complete`` unless it was cut at its longest.
* ``policy_version``: the oldest of ``versions``.
* ``reward``: of the completion.
"""


def prompt_rows(
    tokens: Sequence[torch.Tensor],
    texts: Sequence[str],
    answers: Sequence[str],
    *,
    group_size: int,
    first_group: int,
    seed: int = 0,
    data: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the columns of prompt groups: each prompt ``group_size`` times, one after the other.

    Args:
        tokens: ``[P_i]`` int64 of each prompt.
        texts: of each prompt.
        answers: of each prompt.
        group_size: completions of a prompt.
        first_group: number of the first group.
        seed: of the run; each row gets one of its own.
        data: of each prompt, what else its reward needs: numbers and texts by name.
    """
    encoded = [msgspec.json.encode(values).decode() for values in data or [{}] * len(tokens)]
    numbers = range(len(tokens) * group_size)
    return {
        "prompt.tokens": [tokens[number // group_size] for number in numbers],
        "prompt.text": [texts[number // group_size] for number in numbers],
        "prompt.answer": [answers[number // group_size] for number in numbers],
        "prompt.data": [encoded[number // group_size] for number in numbers],
        "prompt.group_id": [first_group + number // group_size for number in numbers],
        "prompt.seed": [(seed << 40) + first_group * group_size + number for number in numbers],
    }
