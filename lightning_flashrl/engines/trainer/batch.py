"""Leased rows as tensors of one shape, for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lightning_flashrl.errors import SchemaMismatchError
from lightning_flashrl.streaming import Batch, Ragged


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

    def split(self, max_tokens: int) -> list[Self]:
        """Cut into parts of at most so many tokens, padding included; a longer row comes alone. In order.

        Args:
            max_tokens: of each part.
        """
        rows = max(1, max_tokens // self.tokens.shape[1])
        if rows >= len(self):
            return [self]
        num_parts = -(-len(self) // rows)
        columns = (getattr(self, field.name) for field in fields(self))
        parts: Iterator[tuple[Any, ...]] = zip(
            *([None] * num_parts if column is None else column.split(rows) for column in columns), strict=True
        )
        return [type(self)(*part) for part in parts]

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
