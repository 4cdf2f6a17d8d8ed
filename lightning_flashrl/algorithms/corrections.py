"""Weights for tokens that another policy sampled than the one that is trained.

Rollouts come from an older policy, and from another implementation of it. Each function here turns the difference of
log-probs into a factor for a token's loss, without a gradient of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flashrl.errors import ConfigurationError


def truncated_importance_weights(policy_logprobs: Tensor, rollout_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Importance ratio of each token, cut off above (token-level TIS).

    Args:
        policy_logprobs: ``[...]`` by the trainer.
        rollout_logprobs: ``[...]`` by whoever sampled.
        cap: largest weight.

    Returns:
        ``[...]`` from 0 to ``cap``, detached.

    Raises:
        ConfigurationError: a cap that is not above 0.

    Source: F. Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025.
    """
    if not cap > 0:
        raise ConfigurationError(f"cap={cap}; use a number above 0")
    return (policy_logprobs - rollout_logprobs).detach().exp().clamp(max=cap)


def icepop_weights(policy_logprobs: Tensor, rollout_logprobs: Tensor, low: float = 0.5, high: float = 5.0) -> Tensor:
    """Importance ratio of each token, and 0 where it leaves ``[low, high]`` (IcePop).

    Args:
        policy_logprobs: ``[...]`` by the trainer.
        rollout_logprobs: ``[...]`` by whoever sampled.
        low: smallest ratio that counts.
        high: largest ratio that counts.

    Returns:
        ``[...]``, detached.

    Raises:
        ConfigurationError: not 0 ≤ low < high.

    Source: IcePop, in arXiv 2510.18855.
    """
    _check_range(low, high)
    ratio = (policy_logprobs - rollout_logprobs).detach().exp()
    return ratio * ((ratio >= low) & (ratio <= high))


def sequence_mask_weights(
    policy_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """1 for completions whose geometric mean of ratios lies in ``[low, high]``, else 0 (masked importance sampling).

    Args:
        policy_logprobs: ``[N, T]`` by the trainer.
        rollout_logprobs: ``[N, T]`` by whoever sampled.
        loss_mask: ``[N, T]`` bool, the completion's tokens.
        low: smallest mean ratio that counts.
        high: largest mean ratio that counts.

    Returns:
        ``[N, 1]`` 0 or 1, detached.

    Raises:
        ConfigurationError: not 0 ≤ low < high.
    """
    _check_range(low, high)
    mask = loss_mask.to(policy_logprobs.dtype)
    log_ratio = ((policy_logprobs - rollout_logprobs).detach() * mask).sum(dim=1, keepdim=True)
    mean_ratio = (log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp()
    return ((mean_ratio >= low) & (mean_ratio <= high)).to(policy_logprobs.dtype)


def _check_range(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ConfigurationError(f"low={low}, high={high}; use 0 <= low < high")


def no_correction(policy_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """1 for every token: on-policy data, or a naive run to compare with.

    Args:
        policy_logprobs: ``[...]`` by the trainer.
        rollout_logprobs: ``[...]`` by whoever sampled.

    Returns:
        ``[...]`` ones.
    """
    return torch.ones_like(policy_logprobs - rollout_logprobs)
