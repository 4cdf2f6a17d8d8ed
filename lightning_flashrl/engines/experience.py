"""The rows of an RL workflow: which fields they have, and who writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from lightning_flashrl.errors import SchemaMismatchError
from lightning_flashrl.streaming import Field
from lightning_flashrl.tasks import Problem

EXPERIENCE: dict[str, Any] = {
    "prompt": {
        "tokens": Field(torch.int64, (None,)),
        "text": Field(str),
        "answer": Field(str),
        "group_id": Field(int),
        "data": Field(str),
        "seed": Field(int),
        "min_version": Field(int),
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

* ``prompt.tokens`` ``[P]``; ``text``, ``answer`` and ``data`` (JSON) for the reward; ``group_id`` of the prompt group;
  ``seed`` of its random numbers; ``min_version``: no older policy may generate it.
* ``response.tokens`` ``[T]`` with the end token; ``rollout_logprobs`` ``[T]`` under the policy that sampled each token;
  ``versions`` ``[T]`` of these policies; ``is_complete`` unless it was cut at its longest.
* ``policy_version``: the oldest of ``versions``.
* ``reward``: of the completion.
"""


def experience_fields(*, has_reference: bool = False, has_critic: bool = False) -> dict[str, Any]:
    """Return the fields of :data:`EXPERIENCE` and those that only some algorithms need.

    Args:
        has_reference: with ``ref_logprobs`` ``[T]``, of each token of the response under the reference policy.
        has_critic: with ``values`` ``[T]``, a critic's value before each token of the response.

    >>> sorted(experience_fields(has_critic=True).keys() - EXPERIENCE.keys())
    ['values']
    """
    fields = dict(EXPERIENCE)
    if has_reference:
        fields["ref_logprobs"] = Field(torch.float32, (None,))
    if has_critic:
        fields["values"] = Field(torch.float32, (None,))
    return fields


_NUM_SEEDS = 1 << 32
"""So many a generator of torch can tell apart: it takes the lower 32 bits."""
_SEED_STRIDE = 0x9E3779B1
"""Rows of a run have seeds one after the other. By the golden section of that ring, other runs' are far from them."""


def prompt_rows(
    tokens: Sequence[torch.Tensor],
    problems: Sequence[Problem],
    *,
    group_size: int,
    first_group: int,
    seed: int = 0,
    min_version: int = 0,
) -> dict[str, Any]:
    """Return the columns of prompt groups: each prompt ``group_size`` times, one after the other.

    Args:
        tokens: ``[P_i]`` int64 of each prompt.
        problems: what the prompts ask.
        group_size: completions of a prompt.
        first_group: number of the first group.
        seed: of the run; each row gets one of its own.
        min_version: the oldest policy that may generate them.

    Raises:
        SchemaMismatchError: a problem's data is not made of numbers and texts.
    """
    numbers = range(len(tokens) * group_size)
    first_seed = seed * _SEED_STRIDE + first_group * group_size
    data = [_as_json(problem.data) for problem in problems]
    return {
        "prompt.tokens": [tokens[number // group_size] for number in numbers],
        "prompt.text": [problems[number // group_size].prompt for number in numbers],
        "prompt.answer": [problems[number // group_size].answer for number in numbers],
        "prompt.data": [data[number // group_size] for number in numbers],
        "prompt.group_id": [first_group + number // group_size for number in numbers],
        "prompt.seed": [(first_seed + number) % _NUM_SEEDS for number in numbers],
        "prompt.min_version": [min_version] * len(numbers),
    }


def _as_json(data: Mapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(dict(data)).decode()
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise SchemaMismatchError(
            "prompt.data",
            f"is {data!r:.100} ({error})",
            "give a problem's data numbers, texts, lists and mappings only",
        ) from error
