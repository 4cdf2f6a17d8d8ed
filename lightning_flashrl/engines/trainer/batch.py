"""Leased rows as tensors of one shape, for a forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lightning_flashrl.errors import SchemaMismatchError
from lightning_flashrl.streaming import Batch, Ragged

_PASS_TOKENS, _PASS_SHARE = 128, 1 / 32
"""What beginning another forward and backward pass costs: as much as so many tokens, or a share of the largest one."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Prompts with their completions, without what rollouts said of them.

    Position t of a ``[N, L - 1]`` tensor is about token t + 1.

    Attributes:
        tokens: ``[N, L]`` int64, prompt and completion, padded at the end.
        attention_mask: ``[N, L]`` int64, 1 where there is a token.
        loss_mask: ``[N, L - 1]`` bool, the completion's tokens.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, rows: Batch, pad_token_id: int = 0) -> Self:
        """Pad leased rows.

        Args:
            rows: with ``prompt.tokens`` and ``response.tokens``.
            pad_token_id: fills up; it is masked everywhere.

        Raises:
            SchemaMismatchError: a completion without tokens.
        """
        return cls(*_padded(rows["prompt.tokens"], rows["response.tokens"], pad_token_id))

    def passes(self, max_tokens: int) -> list[Tensor]:
        """Sort rows into forward passes, those of about the same length together, so that little is padded.

        Args:
            max_tokens: of each pass, padding included; a longer row comes alone. A further pass must save a part of
                these.

        Returns:
            ``[n]`` int64, the rows of each pass.
        """
        order = self.attention_mask.sum(dim=1).argsort(stable=True)
        lengths, counts = self.attention_mask.sum(dim=1)[order].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        sizes = cheapest_passes(lengths.tolist(), counts.tolist(), max_tokens)
        return list(order.split(sizes))  # type: ignore[no-untyped-call]

    def select(self, rows: Tensor) -> Self:
        """Return some rows, padded no further than they need.

        Args:
            rows: ``[n]`` int64.
        """
        length = int(self.attention_mask[rows].sum(dim=1).max())

        def selected(column: Any, name: str) -> Any:
            if column is None or column.dim() == 1:
                return None if column is None else column[rows]
            return column[rows, : length if name in ("tokens", "attention_mask") else length - 1]

        return type(self)(*(selected(getattr(self, field.name), field.name) for field in fields(self)))

    def to(self, device: torch.device | str, *_: Any, **options: Any) -> Self:
        """Return the batch on another device."""
        columns = (getattr(self, field.name) for field in fields(self))
        moved: list[Any] = [None if column is None else column.to(device, **options) for column in columns]
        return type(self)(*moved)

    def ragged(self, values: Tensor) -> Ragged:
        """Return numbers of the completions' tokens as a column of the queue.

        Args:
            values: ``[N, L - 1]``.
        """
        mask = self.loss_mask
        return Ragged(values[mask].float().cpu(), mask.sum(dim=1).cpu())


@dataclass(frozen=True, slots=True, eq=False)
class ExperienceBatch(TokenBatch):
    """Prompts with their completions, and what the other tasks wrote of them.

    Attributes:
        rollout_logprobs: ``[N, L - 1]`` float32 under the policy that sampled; 0 outside the loss mask.
        versions: ``[N, L - 1]`` int64 of that policy; −1 outside the loss mask.
        rewards: ``[N]`` float32.
        group_ids: ``[N]`` int64, the prompt group.
        policy_versions: ``[N]`` int64, the oldest version of each row.
        ref_logprobs: ``[N, L - 1]`` float32 under the reference policy, if the rows have them; 0 outside the loss mask.
        values: ``[N, L - 1]`` float32 a critic's value before each token, if the rows have them; 0 outside the loss
            mask.
    """

    rollout_logprobs: Tensor
    versions: Tensor
    rewards: Tensor
    group_ids: Tensor
    policy_versions: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, rows: Batch, pad_token_id: int = 0) -> Self:
        """Pad leased rows.

        Args:
            rows: with the fields of :data:`~lightning_flashrl.engines.experience.EXPERIENCE`, and perhaps
                ``ref_logprobs`` and ``values``.
            pad_token_id: fills up; it is masked everywhere.

        Raises:
            SchemaMismatchError: a completion without tokens, or with other numbers of tokens and log-probs or values.
        """
        prompts, answers = rows["prompt.tokens"], rows["response.tokens"]
        of_tokens = {
            name: rows[name]
            for name in ("response.rollout_logprobs", "response.versions", "ref_logprobs", "values")
            if name in rows.columns
        }
        for name, column in of_tokens.items():
            if not torch.equal(answers.lengths, column.lengths):
                raise SchemaMismatchError(
                    name,
                    f"has {column.lengths.tolist()} numbers for {answers.lengths.tolist()} tokens",
                    "write one number for each token of the response",
                )
        tokens, attention_mask, loss_mask = _padded(prompts, answers, pad_token_id)

        def placed(name: str, outside: float, dtype: torch.dtype) -> Tensor | None:
            if name not in of_tokens:
                return None
            column = torch.full(loss_mask.shape, outside, dtype=dtype)
            column[loss_mask] = of_tokens[name].values
            return column

        rollout_logprobs = placed("response.rollout_logprobs", 0.0, torch.float32)
        versions = placed("response.versions", -1, torch.int64)
        assert rollout_logprobs is not None
        assert versions is not None
        return cls(
            tokens,
            attention_mask,
            loss_mask,
            rollout_logprobs,
            versions,
            torch.tensor(rows["reward"], dtype=torch.float32),
            torch.tensor(rows["prompt.group_id"], dtype=torch.int64),
            torch.tensor(rows["policy_version"], dtype=torch.int64),
            placed("ref_logprobs", 0.0, torch.float32),
            placed("values", 0.0, torch.float32),
        )


def cheapest_passes(lengths: Sequence[int], counts: Sequence[int], max_tokens: int) -> list[int]:
    """Cut rows that are sorted by length into passes with the least padding and the fewest passes.

    A pass costs the tokens of its rows, padded to its longest, and some more (:data:`_PASS_TOKENS`).

    Args:
        lengths: that occur, from the shortest.
        counts: rows of each length.
        max_tokens: of a pass.

    Returns:
        Rows of each pass.

    >>> cheapest_passes([10, 11, 100], [4, 4, 1], 4096)
    [8, 1]
    >>> cheapest_passes([10], [5], 20)
    [2, 2, 1]
    """
    pass_tokens = max(_PASS_TOKENS, max_tokens * _PASS_SHARE)
    total = [0, *itertools.accumulate(counts)]
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first so many lengths, and where their last run begins
    for end, length in enumerate(lengths, 1):
        rows_a_pass = max(1, max_tokens // length)
        best.append(
            min(
                (
                    best[begin][0]
                    + (total[end] - total[begin]) * length
                    + -(-(total[end] - total[begin]) // rows_a_pass) * pass_tokens,
                    begin,
                )
                for begin in range(end)
            )
        )
    sizes: list[int] = []
    end = len(lengths)
    while end:
        begin = best[end][1]
        num_rows, rows_a_pass = total[end] - total[begin], max(1, max_tokens // lengths[end - 1])
        runs = [rows_a_pass] * (num_rows // rows_a_pass)
        sizes = [*runs, *([num_rows % rows_a_pass] if num_rows % rows_a_pass else []), *sizes]
        end = begin
    return sizes


def _padded(prompts: Ragged, answers: Ragged, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens ``[N, L]``, attention mask ``[N, L]`` and loss mask ``[N, L - 1]``."""
    num_prompt, num_answer = prompts.lengths, answers.lengths
    if (num_answer == 0).any():
        raise SchemaMismatchError(
            "response.tokens", f"has {num_answer.tolist()} tokens", "write at least one token for each row"
        )
    lengths = num_prompt + num_answer
    places = torch.arange(int(lengths.max()))
    is_token = places < lengths[:, None]  # [N, L]
    is_answer = is_token & (places >= num_prompt[:, None])
    tokens = torch.full(is_token.shape, pad_token_id, dtype=torch.int64)
    tokens[is_token & ~is_answer] = prompts.values
    tokens[is_answer] = answers.values
    return tokens, is_token.long(), is_answer[:, 1:]
