"""What a step was like, added up over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flashrl.algorithms import mismatch_metrics
from lightning_flashrl.engines.trainer import ExperienceBatch

_TOKEN_MEANS = ("kl_k1", "kl_k3", "logprob_diff_mean", "ratio_mean", "clip_fraction", "ess")
_MAXIMA = ("logprob_diff_max", "ratio_max")
_SUMS = ("loss", "count", "rows", "tokens", "prompt_tokens", "reward", "complete", "oldest", "newest")


class StepMetrics:
    """Sums and maxima of one step on one rank, as a vector that can be gathered.

    Args:
        max_staleness: largest staleness that there can be, for the histogram.
        clip_low: ratios below 1 − this count as clipped.
        clip_high: ratios above 1 + this count as clipped.
    """

    def __init__(self, max_staleness: int, clip_low: float, clip_high: float) -> None:
        self._num_bins = max_staleness + 1
        self._clip = (clip_low, clip_high)
        names = [*_SUMS, *_TOKEN_MEANS]
        names += [f"{end}/{age}" for end in ("oldest", "newest") for age in range(self._num_bins)]
        self._sums = dict.fromkeys(names, 0.0)
        self._maxima = dict.fromkeys((*_MAXIMA, "oldest_max"), 0.0)

    def add_rows(self, batch: ExperienceBatch, version: int) -> None:
        """Count rows that the step trains.

        Args:
            batch: the rows.
            version: the policy version that the step starts from.
        """
        is_answer = batch.loss_mask
        sums = self._sums
        sums["rows"] += len(batch)
        sums["tokens"] += float(is_answer.sum())
        sums["prompt_tokens"] += float(batch.attention_mask.sum() - is_answer.sum())
        sums["reward"] += float(batch.rewards.sum())
        newest = version - batch.versions.amax(dim=1)
        oldest = version - batch.policy_versions
        for name, ages in (("oldest", oldest), ("newest", newest)):
            sums[name] += float(ages.sum())
            for age, count in enumerate(torch.bincount(ages.clamp(min=0), minlength=self._num_bins).tolist()):
                sums[f"{name}/{min(age, self._num_bins - 1)}"] += count
        self._maxima["oldest_max"] = max(self._maxima["oldest_max"], float(oldest.max()))

    def add_loss(self, loss: Tensor, count: int) -> None:
        """Count a loss, and by what it will be divided."""
        self._sums["loss"] += float(loss)
        self._sums["count"] += count

    def add_logprobs(self, policy_logprobs: Tensor, batch: ExperienceBatch) -> None:
        """Compare the trainer's log-probs ``[N, L - 1]`` with those of the rollouts."""
        low, high = self._clip
        found = mismatch_metrics(policy_logprobs, batch.rollout_logprobs, batch.loss_mask, clip_low=low, clip_high=high)
        num_tokens = float(batch.loss_mask.sum())
        for name in _TOKEN_MEANS:
            self._sums[name] += float(found[name]) * num_tokens
        for name in _MAXIMA:
            self._maxima[name] = max(self._maxima[name], float(found[name]))

    def vector(self) -> Tensor:
        """Return all numbers ``[K]`` float64, to be gathered over ranks."""
        return torch.tensor([*self._sums.values(), *self._maxima.values()], dtype=torch.float64)

    def of_all_ranks(self, vectors: Tensor) -> dict[str, float]:
        """Put together what all ranks counted.

        Args:
            vectors: ``[W, K]``, one of each rank.

        Returns:
            By name; ``count``, ``rows`` and ``tokens`` are sums, all others means over rows or tokens.
        """
        num_sums = len(self._sums)
        sums = dict(zip(self._sums, vectors[:, :num_sums].sum(dim=0).tolist(), strict=True))
        maxima = dict(zip(self._maxima, vectors[:, num_sums:].amax(dim=0).tolist(), strict=True))
        rows, tokens, count = (max(1.0, sums[name]) for name in ("rows", "tokens", "count"))
        means = {name: sums[name] / tokens for name in _TOKEN_MEANS}
        histogram = {name: value / rows for name, value in sums.items() if "/" in name}
        return {
            "loss": sums["loss"] / count,
            "count": sums["count"],
            "rows": sums["rows"],
            "tokens": sums["tokens"] + sums["prompt_tokens"],
            "trained_length": sums["tokens"] / rows,
            "reward": sums["reward"] / rows,
            "staleness/oldest": sums["oldest"] / rows,
            "staleness/newest": sums["newest"] / rows,
            "staleness/max": maxima.pop("oldest_max"),
            **{f"staleness/{name}": value for name, value in histogram.items()},
            **{f"mismatch/{name}": value for name, value in {**means, **maxima}.items()},
        }
