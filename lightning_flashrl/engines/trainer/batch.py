"""Leased rows as tensors of one shape, for a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lightning_flashrl.errors import SchemaMismatchError
from lightning_flashrl.streaming import Batch


@dataclass(frozen=True, slots=True, eq=False)
class ExperienceBatch:
    """Prompts with their completions. Position t of a ``[N, L - 1]`` tensor is about token t + 1.

    Attributes:
        tokens: ``[N, L]`` int64, prompt and completion, padded at the end.
        attention_mask: ``[N, L]`` int64, 1 where there is a token.
        loss_mask: ``[N, L - 1]`` bool, the completion's tokens.
        rollout_logprobs: ``[N, L - 1]`` float32 under the policy that sampled; 0 outside the loss mask.
        versions: ``[N, L - 1]`` int64 of that policy; −1 outside the loss mask.
        rewards: ``[N]`` float32.
        group_ids: ``[N]`` int64, the prompt group.
        policy_versions: ``[N]`` int64, the oldest version of each row.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    versions: Tensor
    rewards: Tensor
    group_ids: Tensor
    policy_versions: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, rows: Batch, pad_token_id: int = 0) -> Self:
        """Pad leased rows.

        Args:
            rows: with the fields of :data:`~lightning_flashrl.engines.experience.EXPERIENCE`.
            pad_token_id: fills up; it is masked everywhere.

        Raises:
            SchemaMismatchError: a completion without tokens, or with other numbers of tokens and log-probs.
        """
        prompts, answers = rows["prompt.tokens"], rows["response.tokens"]
        num_prompt, num_answer = prompts.lengths, answers.lengths
        if not torch.equal(num_answer, rows["response.rollout_logprobs"].lengths) or (num_answer == 0).any():
            raise SchemaMismatchError(
                "response",
                f"has {num_answer.tolist()} tokens and {rows['response.rollout_logprobs'].lengths.tolist()} log-probs",
                "write one log-prob for each token, and at least one token",
            )
        lengths = num_prompt + num_answer
        places = torch.arange(int(lengths.max()))
        is_token = places < lengths[:, None]  # [N, L]
        is_answer = is_token & (places >= num_prompt[:, None])
        tokens = torch.full(is_token.shape, pad_token_id, dtype=torch.int64)
        tokens[is_token & ~is_answer] = prompts.values
        tokens[is_answer] = answers.values
        loss_mask = is_answer[:, 1:]
        rollout_logprobs = torch.zeros(loss_mask.shape)
        rollout_logprobs[loss_mask] = rows["response.rollout_logprobs"].values
        versions = torch.full(loss_mask.shape, -1, dtype=torch.int64)
        versions[loss_mask] = rows["response.versions"].values
        return cls(
            tokens,
            is_token.long(),
            loss_mask,
            rollout_logprobs,
            versions,
            torch.tensor(rows["reward"], dtype=torch.float32),
            torch.tensor(rows["prompt.group_id"], dtype=torch.int64),
            torch.tensor(rows["policy_version"], dtype=torch.int64),
        )

    def split(self, max_tokens: int) -> list[Self]:
        """Cut into parts of at most so many tokens, padding included; a longer row comes alone. In order.

        Args:
            max_tokens: of each part.
        """
        rows = max(1, max_tokens // self.tokens.shape[1])
        if rows >= len(self):
            return [self]
        parts = zip(*(getattr(self, field.name).split(rows) for field in fields(self)), strict=True)
        return [type(self)(*part) for part in parts]

    def to(self, device: torch.device | str, *_: Any, **options: Any) -> Self:
        """Return the batch on another device."""
        return type(self)(*(getattr(self, field.name).to(device, **options) for field in fields(self)))
