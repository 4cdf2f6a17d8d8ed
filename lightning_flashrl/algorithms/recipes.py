"""Algorithms by name: which advantages, which loss, which correction. Settings only; the formulas stand beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_flashrl.algorithms.advantages import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    overlong_penalty,
)
from lightning_flashrl.algorithms.corrections import (
    icepop_weights,
    no_correction,
    sequence_mask_weights,
    truncated_importance_weights,
)
from lightning_flashrl.algorithms.divergence import Estimator, kl_estimate
from lightning_flashrl.algorithms.losses import (
    Reduction,
    clipped_surrogate,
    clipped_weight_policy_gradient,
    sequence_surrogate,
)
from lightning_flashrl.errors import ConfigurationError

Advantage = Literal["group", "group_unscaled", "leave_one_out", "generalized"]
Surrogate = Literal["clipped", "sequence", "weighted"]
Correction = Literal["none", "truncated", "icepop", "sequence_mask"]
_CHOICES = {
    "advantage": ("group", "group_unscaled", "leave_one_out", "generalized"),
    "surrogate": ("clipped", "sequence", "weighted"),
    "reduction": ("token", "sequence", "constant"),
    "correction": ("none", "truncated", "icepop", "sequence_mask"),
    "kl_estimator": ("k1", "k2", "k3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptimization:
    """A policy-gradient algorithm, put together from the functions of this folder. Its defaults are GRPO's.

    Attributes:
        advantage: ``"group"``: relative to the prompt group, scaled. ``"group_unscaled"``: not scaled.
            ``"leave_one_out"``: relative to the others of the group. ``"generalized"``: from a critic (GAE).
        surrogate: ``"clipped"``: PPO's. ``"sequence"``: GSPO's. ``"weighted"``: CISPO's.
        clip_low: ratios below 1 − this are not rewarded.
        clip_high: ratios above 1 + this are not rewarded; for ``"weighted"`` the weight is cut at 1 + this.
        dual_clip: bound of the loss for negative advantages; ``None`` for none. Only for ``"clipped"``.
        reduction: how losses of tokens become one number; see :func:`~lightning_flashrl.algorithms.reduce_tokens`.
        constant_length: for ``reduction="constant"``.
        is_decoupled: measure ratios against the policy that the step starts from, and put the distance from there to
            the rollout into ``correction`` (decoupled PPO). If not, ratios are measured against the rollout.
        correction: weight of each token for the distance between trainer and rollout: ``"truncated"`` (TIS),
            ``"icepop"``, ``"sequence_mask"`` or ``"none"``.
        correction_low: smallest ratio that counts, for the two that mask.
        correction_high: largest ratio that counts, or where it is cut.
        kl_coefficient: of the distance to the reference policy; 0 needs no reference.
        kl_estimator: of that distance.
        filters_uninformative: whether prompt groups with equal rewards are left out and replaced (DAPO).
        overlong_buffer: tokens before ``overlong_length`` over which the reward falls by 1; 0 for no penalty (DAPO).
        overlong_length: longest completion, for that penalty.
        discount: of ``"generalized"``.
        smoothing: of ``"generalized"``.
        value_clip: how far a critic's value may move in a step.

    Raises:
        ConfigurationError: a choice that there is not, or a number that cannot be.

    Source: see the functions.
    """

    advantage: Advantage = "group"
    surrogate: Surrogate = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    reduction: Reduction = "sequence"
    constant_length: int = 0
    is_decoupled: bool = False
    correction: Correction = "none"
    correction_low: float = 0.5
    correction_high: float = 2.0
    kl_coefficient: float = 0.0
    kl_estimator: Estimator = "k3"
    filters_uninformative: bool = False
    overlong_buffer: int = 0
    overlong_length: int = 0
    discount: float = 1.0
    smoothing: float = 0.95
    value_clip: float = 0.2

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"algorithm.{name}={getattr(self, name)!r}; use one of {', '.join(choices)}")
        if not (self.clip_low >= 0 and self.clip_high >= 0 and self.kl_coefficient >= 0):
            raise ConfigurationError(
                f"algorithm.clip_low={self.clip_low}, clip_high={self.clip_high}, kl_coefficient={self.kl_coefficient}"
                "; use 0 or more"
            )
        if self.reduction == "constant" and self.constant_length < 1:
            raise ConfigurationError(f"algorithm.constant_length={self.constant_length}; use the longest completion")
        if self.overlong_buffer and not 0 < self.overlong_buffer <= self.overlong_length:
            raise ConfigurationError(
                f"algorithm.overlong_buffer={self.overlong_buffer} of overlong_length={self.overlong_length}; use 1 to "
                "overlong_length"
            )
        if self.correction in ("truncated", "icepop") and not self.is_decoupled:
            raise ConfigurationError(
                f"algorithm.correction={self.correction!r} weighs by the ratio of policy and rollout, which is in the "
                "surrogate already unless is_decoupled; set is_decoupled=True, or take 'sequence_mask' or 'none'"
            )
        if not 0 <= self.correction_low < self.correction_high:
            raise ConfigurationError(
                f"algorithm.correction_low={self.correction_low}, correction_high={self.correction_high}; use "
                "0 <= low < high"
            )

    @property
    def uses_reference(self) -> bool:
        """Whether rows need log-probs of a reference policy."""
        return self.kl_coefficient > 0

    @property
    def uses_critic(self) -> bool:
        """Whether rows need values of a critic."""
        return self.advantage == "generalized"

    def shaped(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """Add what completions lose by being long.

        Args:
            rewards: ``[N]``.
            lengths: ``[N]`` tokens of each completion.

        Returns:
            ``[N]``.
        """
        if not self.overlong_buffer:
            return rewards
        return rewards + overlong_penalty(lengths, self.overlong_length, self.overlong_buffer)

    def group_advantages(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantage of each completion within its prompt group, whose size may differ: failed rows are missing.

        Args:
            rewards: ``[N]``.
            group_ids: ``[N]`` int64; rows of a group need not stand together.

        Returns:
            ``[N]`` float32; 0 for a row without others of its group.
        """
        advantages = torch.zeros(len(rewards), device=rewards.device)
        for group in sorted(set(group_ids.tolist())):
            member = group_ids == group
            size = int(member.sum())
            if size > 1:
                advantages[member] = self._of_group(rewards[member], size)
        return advantages

    def _of_group(self, rewards: Tensor, size: int) -> Tensor:
        if self.advantage == "leave_one_out":
            return leave_one_out_advantages(rewards, size)
        return group_advantages(rewards, size, scale=self.advantage == "group")

    def token_advantages(self, rewards: Tensor, values: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantage of each token from a critic's values, and the returns it learns; the reward is the last token's.

        Args:
            rewards: ``[N]``.
            values: ``[N, T]``.
            loss_mask: ``[N, T]`` bool.

        Returns:
            advantages ``[N, T]`` and returns ``[N, T]``.
        """
        places = torch.arange(loss_mask.shape[1], device=loss_mask.device)
        last = torch.where(loss_mask, places, -1).amax(dim=1)
        token_rewards = torch.zeros_like(values)
        token_rewards[torch.arange(len(rewards), device=values.device), last] = rewards.to(values.dtype)
        return generalized_advantages(
            token_rewards, values, loss_mask, discount=self.discount, smoothing=self.smoothing
        )

    def token_losses(
        self,
        policy_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        ref_logprobs: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each token.

        Args:
            policy_logprobs: ``[N, T]`` now, with gradient.
            rollout_logprobs: ``[N, T]`` of the policy that sampled.
            advantages: ``[N, T]`` or ``[N, 1]``.
            loss_mask: ``[N, T]`` bool, the completion's tokens.
            ref_logprobs: ``[N, T]`` of the reference policy, if the algorithm uses one.

        Returns:
            ``[N, T]``; what stands outside the mask means nothing.
        """
        # One update a step: the policy that the step starts from is the policy now.
        proximal = policy_logprobs.detach() if self.is_decoupled else rollout_logprobs
        match self.surrogate:
            case "clipped":
                losses = clipped_surrogate(
                    policy_logprobs,
                    proximal,
                    advantages,
                    clip_low=self.clip_low,
                    clip_high=self.clip_high,
                    dual_clip=self.dual_clip,
                )
            case "sequence":
                losses = sequence_surrogate(
                    policy_logprobs, proximal, advantages, loss_mask, clip_low=self.clip_low, clip_high=self.clip_high
                )
            case "weighted":
                losses = clipped_weight_policy_gradient(policy_logprobs, proximal, advantages, cap=1 + self.clip_high)
        losses = losses * self._correct(policy_logprobs, rollout_logprobs, loss_mask)
        if self.uses_reference:
            if ref_logprobs is None:
                raise ConfigurationError("algorithm.kl_coefficient is set, but the rows have no ref_logprobs")
            # Outside the mask the two need not be near each other, and an overflow there has a gradient of NaN.
            policy, reference = (torch.where(loss_mask, part, 0.0) for part in (policy_logprobs, ref_logprobs))
            losses = losses + self.kl_coefficient * kl_estimate(policy, reference, self.kl_estimator)
        return losses

    def _correct(self, policy_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        low, high = self.correction_low, self.correction_high
        match self.correction:
            case "truncated":
                return truncated_importance_weights(policy_logprobs, rollout_logprobs, high)
            case "icepop":
                return icepop_weights(policy_logprobs, rollout_logprobs, low, high)
            case "sequence_mask":
                return sequence_mask_weights(policy_logprobs, rollout_logprobs, loss_mask, low, high)
        return no_correction(policy_logprobs, rollout_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPO(PolicyOptimization):
    """Group-relative policy optimization.

    Source: arXiv 2402.03300.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class DrGRPO(PolicyOptimization):
    """GRPO without the two divisions that bias it: by a group's deviation, and by a completion's length.

    Source: arXiv 2503.20783.
    """

    advantage: Advantage = "group_unscaled"
    reduction: Reduction = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class DAPO(PolicyOptimization):
    """GRPO with a higher upper clip, losses averaged over tokens, and uninformative groups replaced.

    Source: arXiv 2503.14476.
    """

    clip_high: float = 0.28
    reduction: Reduction = "token"
    filters_uninformative: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GSPO(PolicyOptimization):
    """Ratios and clipping of whole completions.

    Source: arXiv 2507.18071.
    """

    surrogate: Surrogate = "sequence"
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPO(PolicyOptimization):
    """The ratio is a weight, cut off above; every token keeps its gradient.

    Source: arXiv 2506.13585.
    """

    surrogate: Surrogate = "weighted"
    clip_high: float = 4.0
    reduction: Reduction = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO(PolicyOptimization):
    """Proximal policy optimization with a critic.

    Source: arXiv 1707.06347.
    """

    advantage: Advantage = "generalized"
    reduction: Reduction = "token"
