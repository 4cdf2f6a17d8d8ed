"""Is the data still that of the policy? Numbers that say so each step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flashrl.algorithms.divergence import kl_estimate


def mismatch_metrics(
    policy_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, *, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Compare the trainer's log-probs with those under which tokens were sampled.

    Args:
        policy_logprobs: ``[N, T]`` by the trainer.
        rollout_logprobs: ``[N, T]`` by whoever sampled.
        loss_mask: ``[N, T]`` bool, the completion's tokens.
        clip_low: ratios below 1 − this count as clipped.
        clip_high: ratios above 1 + this count as clipped.

    Returns:
        Scalars by name. ``kl_k1`` and ``kl_k3``: KL(rollout ‖ trainer) a token. ``logprob_diff_mean`` and ``_max``:
        |Δ log p|. ``ratio_mean``, ``ratio_max``, ``clip_fraction``. ``ess``: effective sample size of the tokens as a
        share, 1 if all ratios are equal. All are 0 (and ``ess`` 1) if nothing is in the mask.
    """
    rollout, policy = rollout_logprobs[loss_mask].detach(), policy_logprobs[loss_mask].detach()
    if not len(policy):
        zero = torch.zeros((), device=policy_logprobs.device)
        names = ("kl_k1", "kl_k3", "logprob_diff_mean", "logprob_diff_max", "ratio_mean", "ratio_max", "clip_fraction")
        return {**dict.fromkeys(names, zero), "ess": zero + 1}
    difference = policy - rollout
    ratio = difference.exp()
    is_clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    return {
        "kl_k1": kl_estimate(rollout, policy, "k1").mean(),
        "kl_k3": kl_estimate(rollout, policy, "k3").mean(),
        "logprob_diff_mean": difference.abs().mean(),
        "logprob_diff_max": difference.abs().max(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_fraction": is_clipped.float().mean(),
        "ess": effective_sample_share(ratio),
    }


def effective_sample_share(weights: Tensor) -> Tensor:
    """Return how many samples weighted ones are worth, as a share of their number.

    Args:
        weights: ``[N]`` 0 or more, not all 0.

    Returns:
        A scalar from 1/N to 1.

    Source: L. Kish, Survey Sampling, 1965.

    >>> effective_sample_share(torch.tensor([1.0, 1.0, 0.0, 0.0])).item()
    0.5
    """
    return weights.sum().square() / (len(weights) * weights.square().sum())
