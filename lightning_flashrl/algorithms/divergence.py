"""How far are two policies apart, on the tokens that one of them sampled?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_flashrl.errors import ConfigurationError

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Estimate KL(p ‖ q) for each token that p sampled.

    Args:
        logprobs: ``[...]`` log p of the sampled tokens.
        other_logprobs: ``[...]`` log q of the same tokens.
        estimator: ``"k1"``: log p − log q, unbiased, may be negative. ``"k2"``: half its square, low variance, biased.
            ``"k3"``: q/p − 1 − log(q/p), unbiased and never negative.

    Returns:
        ``[...]``.

    Raises:
        ConfigurationError: there is no such estimator.

    Source: J. Schulman, Approximating KL Divergence, 2020.

    >>> p, q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    >>> [round(kl_estimate(p, q, name).item(), 4) for name in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    log_ratio = other_logprobs - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio.square()
        case "k3":
            return torch.expm1(log_ratio) - log_ratio
    raise ConfigurationError(f"estimator={estimator!r}; use 'k1', 'k2' or 'k3'")
