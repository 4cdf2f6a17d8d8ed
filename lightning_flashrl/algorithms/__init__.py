"""Reinforcement learning as pure functions: advantages, losses, corrections, and numbers to watch."""

from lightning_flashrl.algorithms.advantages import (
    generalized_advantages,
    group_advantages,
    is_informative,
    leave_one_out_advantages,
    overlong_penalty,
)
from lightning_flashrl.algorithms.corrections import (
    icepop_weights,
    no_correction,
    sequence_mask_weights,
    truncated_importance_weights,
)
from lightning_flashrl.algorithms.diagnostics import effective_sample_share, mismatch_metrics
from lightning_flashrl.algorithms.divergence import kl_estimate
from lightning_flashrl.algorithms.losses import (
    clipped_surrogate,
    clipped_value_loss,
    clipped_weight_policy_gradient,
    reduce_tokens,
    sequence_surrogate,
    sum_tokens,
)
from lightning_flashrl.algorithms.recipes import CISPO, DAPO, GRPO, GSPO, PPO, DrGRPO, PolicyOptimization

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "PPO",
    "DrGRPO",
    "PolicyOptimization",
    "clipped_surrogate",
    "clipped_value_loss",
    "clipped_weight_policy_gradient",
    "effective_sample_share",
    "generalized_advantages",
    "group_advantages",
    "icepop_weights",
    "is_informative",
    "kl_estimate",
    "leave_one_out_advantages",
    "mismatch_metrics",
    "no_correction",
    "overlong_penalty",
    "reduce_tokens",
    "sequence_mask_weights",
    "sequence_surrogate",
    "sum_tokens",
    "truncated_importance_weights",
]
