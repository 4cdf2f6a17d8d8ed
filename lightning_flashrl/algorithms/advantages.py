"""How much better than expected was a completion, or a token? Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flashrl.errors import ConfigurationError


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Reward relative to the mean of its prompt group.

    Args:
        rewards: ``[N]``, groups one after the other.
        group_size: G; N is a multiple of it.
        scale: divide by the group's standard deviation (GRPO). Without it, easy and hard prompts weigh alike
            (Dr. GRPO).
        epsilon: keeps the division finite.

    Returns:
        ``[N]`` float32; zero for a group whose rewards are all equal.

    Raises:
        ConfigurationError: the rewards are not whole groups.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2, scale=False)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    grouped = _grouped(rewards, group_size)  # [N / G, G]
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale:
        centred = centred / (grouped.std(dim=1, keepdim=True, correction=0) + epsilon)
    return centred.flatten()


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward relative to the mean of the *others* of its prompt group: an unbiased baseline.

    Args:
        rewards: ``[N]``, groups one after the other.
        group_size: G, 2 or more; N is a multiple of it.

    Returns:
        ``[N]`` float32.

    Raises:
        ConfigurationError: the rewards are not whole groups, or groups of one.

    Source: RLOO, arXiv 2402.14740.
    """
    if group_size < 2:
        raise ConfigurationError(f"group_size={group_size}; leaving one out needs 2 or more")
    grouped = _grouped(rewards, group_size)
    return ((grouped - grouped.mean(dim=1, keepdim=True)) * group_size / (group_size - 1)).flatten()


def is_informative(rewards: Tensor, group_size: int) -> Tensor:
    """Whether a row's group has different rewards; the others give no gradient and may be left out.

    Args:
        rewards: ``[N]``, groups one after the other.
        group_size: G; N is a multiple of it.

    Returns:
        ``[N]`` bool, the same for all rows of a group.

    Raises:
        ConfigurationError: the rewards are not whole groups.

    Source: DAPO (dynamic sampling), arXiv 2503.14476, section 3.2.
    """
    grouped = _grouped(rewards, group_size)
    differs = (grouped != grouped[:, :1]).any(dim=1, keepdim=True)
    return differs.expand_as(grouped).flatten()


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """A reward that falls from 0 to −1 over the last ``buffer`` tokens: long answers are not cut without warning.

    Args:
        lengths: ``[N]`` tokens of each completion.
        max_length: beyond it the penalty is −1.
        buffer: tokens over which it grows.

    Returns:
        ``[N]`` float32 from −1 to 0.

    Raises:
        ConfigurationError: the buffer is empty or longer than the completion.

    Source: DAPO (soft overlong punishment), arXiv 2503.14476, section 3.4.
    """
    if not 0 < buffer <= max_length:
        raise ConfigurationError(f"buffer={buffer} of max_length={max_length}; use 1 to {max_length}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0).float()


def generalized_advantages(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, *, discount: float = 1.0, smoothing: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantage of each token from a critic's values (GAE), and the returns that the critic learns.

    Args:
        rewards: ``[N, T]`` reward of each token; usually all at the last one.
        values: ``[N, T]`` the critic's value before each token.
        loss_mask: ``[N, T]`` bool, the completion's tokens; masked tokens are skipped over.
        discount: gamma in the paper.
        smoothing: lambda in the paper; 1 gives returns minus values, 0 one-step differences.

    Returns:
        advantages ``[N, T]`` and returns ``[N, T]``, both zero outside the mask.

    Source: arXiv 1506.02438, equation 16.
    """
    advantages = torch.zeros_like(values)
    following_value = torch.zeros_like(values[:, 0])
    following_advantage = torch.zeros_like(following_value)
    for position in range(values.shape[1] - 1, -1, -1):
        counts = loss_mask[:, position].to(values.dtype)
        delta = rewards[:, position] + discount * following_value - values[:, position]
        advantage = delta + discount * smoothing * following_advantage
        advantages[:, position] = advantage * counts
        following_value = values[:, position] * counts + following_value * (1 - counts)
        following_advantage = advantage * counts + following_advantage * (1 - counts)
    mask = loss_mask.to(values.dtype)
    return advantages, (advantages + values) * mask


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or rewards.dim() != 1 or len(rewards) % group_size:
        raise ConfigurationError(
            f"rewards of shape {list(rewards.shape)} are not groups of {group_size}; give [N] with N a multiple of it"
        )
    return rewards.float().view(-1, group_size)
