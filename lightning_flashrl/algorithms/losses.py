"""Policy and value losses of each token, and how tokens become one number."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_flashrl.errors import ConfigurationError

Reduction = Literal["token", "sequence", "constant"]


def reduce_tokens(losses: Tensor, loss_mask: Tensor, reduction: Reduction, *, length: int = 0) -> Tensor:
    """Turn losses of tokens into one number.

    Args:
        losses: ``[N, T]``.
        loss_mask: ``[N, T]`` bool, the completion's tokens.
        reduction: ``"sequence"``: mean over each completion, then over completions (GRPO). ``"token"``: mean over all
            tokens, so that long completions weigh more (DAPO). ``"constant"``: sum of each completion over a constant
            length, then mean, so that length does not bias (Dr. GRPO).
        length: the constant; only for ``"constant"``.

    Returns:
        A scalar; 0 if nothing is in the mask.

    Raises:
        ConfigurationError: no such reduction, or a constant that is none.

    Source: DAPO, arXiv 2503.14476, section 3.3; Dr. GRPO, arXiv 2503.20783.

    >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> [reduce_tokens(losses, mask, how, length=2).item() for how in ("sequence", "token", "constant")]
    [3.5, 3.0, 2.25]
    """
    total, count = sum_tokens(losses, loss_mask, reduction, length=length)
    return total / max(1, count)


def sum_tokens(losses: Tensor, loss_mask: Tensor, reduction: Reduction, *, length: int = 0) -> tuple[Tensor, int]:
    """What :func:`reduce_tokens` divides, and by what: parts of a batch are added up before they are divided.

    Args:
        losses: ``[N, T]``.
        loss_mask: ``[N, T]`` bool, the completion's tokens.
        reduction: as there.
        length: the constant; only for ``"constant"``.

    Returns:
        The sum, and the number of tokens or completions.

    Raises:
        ConfigurationError: no such reduction, or a constant that is none.
    """
    kept = torch.where(loss_mask, losses, 0.0)
    match reduction:
        case "token":
            return kept.sum(), int(loss_mask.sum())
        case "sequence":
            lengths = loss_mask.sum(dim=1).clamp(min=1).to(losses.dtype)
            return (kept.sum(dim=1) / lengths).sum(), len(losses)
        case "constant":
            if length < 1:
                raise ConfigurationError(f"length={length}; give the constant length, 1 or more")
            return kept.sum() / length, len(losses)
    raise ConfigurationError(f"reduction={reduction!r}; use 'token', 'sequence' or 'constant'")


def clipped_surrogate(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's loss of each token: the ratio to the proximal policy is not rewarded for leaving a range.

    With the proximal policy's own log-probs as ``proximal_logprobs`` (those at the batch's start) and the rollout's
    difference put into a weight (:mod:`.corrections`), this is decoupled PPO; with the rollout's log-probs it is PPO.

    Args:
        policy_logprobs: ``[N, T]`` now, with gradient.
        proximal_logprobs: ``[N, T]`` of the policy that the step starts from, or of the rollout.
        advantages: ``[N, T]`` or ``[N, 1]``.
        clip_low: the ratio is cut below 1 − this.
        clip_high: the ratio is cut above 1 + this; larger than ``clip_low`` keeps rare tokens alive (DAPO).
        dual_clip: bound of the loss for negative advantages, above 1; ``None`` for none.

    Returns:
        ``[N, T]``.

    Raises:
        ConfigurationError: a range that is none.

    Source: PPO, arXiv 1707.06347, equation 7; decoupled PPO, arXiv 2110.00641, for asynchronous RL arXiv 2505.24298;
    clip-higher, arXiv 2503.14476, section 3.1; dual clip, arXiv 1912.09729.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ConfigurationError(f"clip_low={clip_low}, clip_high={clip_high}; use 0 to 1, and 0 or more")
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigurationError(f"dual_clip={dual_clip}; use a number above 1")
    ratio = (policy_logprobs - proximal_logprobs).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses


def sequence_surrogate(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """GSPO's loss: the ratio is that of the whole completion, its length taken out, and so is the clipping.

    Args:
        policy_logprobs: ``[N, T]`` now, with gradient.
        proximal_logprobs: ``[N, T]`` of the policy that the step starts from.
        advantages: ``[N, 1]``.
        loss_mask: ``[N, T]`` bool, the completion's tokens.
        clip_low: the ratio is cut below 1 − this.
        clip_high: the ratio is cut above 1 + this.

    Returns:
        ``[N, T]``, the same for all tokens of a completion in value; each token has its own gradient.

    Source: GSPO, arXiv 2507.18071 (GSPO-token).
    """
    mask = loss_mask.to(policy_logprobs.dtype)
    log_ratio = (policy_logprobs - proximal_logprobs) * mask
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    token_ratio = (mean.detach() + policy_logprobs - policy_logprobs.detach()).exp()
    return torch.maximum(-advantages * token_ratio, -advantages * token_ratio.clamp(1 - clip_low, 1 + clip_high))


def clipped_weight_policy_gradient(
    policy_logprobs: Tensor, proximal_logprobs: Tensor, advantages: Tensor, *, cap: float = 5.0
) -> Tensor:
    """CISPO's loss: the ratio is a weight without gradient, cut off above; no token loses its gradient.

    Args:
        policy_logprobs: ``[N, T]`` now, with gradient.
        proximal_logprobs: ``[N, T]`` of the policy that the step starts from, or of the rollout.
        advantages: ``[N, T]`` or ``[N, 1]``.
        cap: largest weight.

    Returns:
        ``[N, T]``.

    Raises:
        ConfigurationError: a cap that is not above 0.

    Source: MiniMax-M1 (CISPO), arXiv 2506.13585.
    """
    if not cap > 0:
        raise ConfigurationError(f"cap={cap}; use a number above 0")
    weight = (policy_logprobs - proximal_logprobs).detach().exp().clamp(max=cap)
    return -weight * advantages * policy_logprobs


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """A critic's squared error of each token, not rewarded for moving further than ``clip`` at once.

    Args:
        values: ``[N, T]`` now, with gradient.
        old_values: ``[N, T]`` of the critic that the step starts from.
        returns: ``[N, T]`` to be learned.
        clip: how far a value may move.

    Returns:
        ``[N, T]``.

    Source: value clipping, as described in arXiv 2005.12729.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
