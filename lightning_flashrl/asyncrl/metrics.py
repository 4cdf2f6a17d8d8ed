"""What a step was like, added up over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flashrl.algorithms import kl_estimate, mismatch_metrics
from lightning_flashrl.engines.trainer import ExperienceBatch

_TOKEN_MEANS = ("kl_k1", "kl_k3", "logprob_diff_mean", "ratio_mean", "clip_fraction", "ess")
_MAXIMA = ("logprob_diff_max", "ratio_max")
_SUMS = ("loss", "count", "rows", "tokens", "prompt_tokens", "reward", "complete", "oldest", "newest")
_CRITIC_SUMS = ("value_loss", "value_count", "value", "return", "return_square", "error", "error_square")
_REFERENCE_SUMS = ("ref_kl", "ref_tokens")


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
        names = [*_SUMS, *_TOKEN_MEANS, *_CRITIC_SUMS, *_REFERENCE_SUMS]
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
        if batch.ref_logprobs is not None:
            distance = kl_estimate(policy_logprobs, batch.ref_logprobs, "k3")
            self._sums["ref_kl"] += float(distance[batch.loss_mask].sum())
            self._sums["ref_tokens"] += num_tokens

    def add_values(self, loss: Tensor, count: int, values: Tensor, returns: Tensor, loss_mask: Tensor) -> None:
        """Count a critic's loss, and compare its values ``[N, L - 1]`` with the returns that it should have guessed."""
        values, returns = values[loss_mask], returns[loss_mask]
        error = returns - values
        sums = (values.sum(), returns.sum(), returns.square().sum(), error.sum(), error.square().sum())
        found = [float(loss), float(count), *map(float, sums)]
        for name, number in zip(_CRITIC_SUMS, found, strict=True):
            self._sums[name] += number

    def vector(self) -> Tensor:
        """Return all numbers ``[K]`` float64, to be gathered over ranks."""
        return torch.tensor([*self._sums.values(), *self._maxima.values()], dtype=torch.float64)

    def of_all_ranks(self, vectors: Tensor) -> dict[str, float]:
        """Put together what all ranks counted.

        Args:
            vectors: ``[W, K]``, one of each rank.

        Returns:
            By name; ``count``, ``value_count``, ``rows`` and ``tokens`` are sums, all others means over rows or tokens.
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
            "value_count": sums["value_count"],
            **_of_critic(sums),
            **({"reference/kl": sums["ref_kl"] / sums["ref_tokens"]} if sums["ref_tokens"] else {}),
        }


def _of_critic(sums: dict[str, float]) -> dict[str, float]:
    """Return numbers of the critic, if there is one; 1 is the best explained variance, 0 that of a constant."""
    count = sums["value_count"]
    if not count:
        return {}
    loss, value, mean, square, error, error_square = (
        sums[name] / count for name in _CRITIC_SUMS if name != "value_count"
    )
    spread = square - mean**2
    explained = 1 - (error_square - error**2) / spread if spread > 1e-12 else 0.0
    return {"critic/loss": loss, "critic/value": value, "critic/explained_variance": explained}
