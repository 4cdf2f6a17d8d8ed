"""What must hold of the formulas, whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_flashrl import algorithms as rl
from lightning_flashrl.errors import ConfigurationError

SEEDS = st.integers(0, 10_000)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mask(seed: int, rows: int, length: int) -> Tensor:
    lengths = torch.randint(1, length + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(length) < lengths[:, None]


class TestGroupAdvantages:
    @given(seed=SEEDS, size=st.integers(2, 6))
    def test_they_sum_to_zero_in_each_group_and_know_no_offset(self, seed: int, size: int) -> None:
        # Multiples of 1/64: adding 3 is exact, so that only the law is tried and not the rounding of the input.
        rewards = (_normal(seed, 4 * size) * 64).round().float() / 64
        for scale in (True, False):
            found = rl.group_advantages(rewards, size, scale=scale)
            torch.testing.assert_close(found.view(4, size).sum(1), torch.zeros(4), atol=1e-4, rtol=0)
            torch.testing.assert_close(rl.group_advantages(rewards + 3, size, scale=scale), found, atol=1e-4, rtol=1e-3)

    @given(seed=SEEDS)
    def test_scaled_ones_know_no_unit(self, seed: int) -> None:
        rewards = _normal(seed, 12).float()
        found = [rl.group_advantages(rewards * factor, 4, epsilon=0) for factor in (1, 7)]
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)

    def test_equal_rewards_teach_nothing(self) -> None:
        assert rl.group_advantages(torch.full((6,), 0.7), 3).tolist() == [0.0] * 6
        assert rl.is_informative(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2).tolist() == [False, False, True, True]

    @given(seed=SEEDS)
    def test_leaving_one_out_is_what_its_name_says(self, seed: int) -> None:
        rewards = _normal(seed, 5).float()
        expected = [rewards[i] - (rewards.sum() - rewards[i]) / 4 for i in range(5)]
        torch.testing.assert_close(rl.leave_one_out_advantages(rewards, 5), torch.stack(expected))

    def test_half_groups_are_refused(self) -> None:
        for call in (rl.group_advantages, rl.leave_one_out_advantages, rl.is_informative):
            with pytest.raises(ConfigurationError, match="groups of 4"):
                call(torch.zeros(6), 4)
        with pytest.raises(ConfigurationError, match="2 or more"):
            rl.leave_one_out_advantages(torch.zeros(4), 1)


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    lengths = torch.tensor([0, 80, 90, 100, 500])
    assert rl.overlong_penalty(lengths, 100, 20).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ConfigurationError, match="buffer=0"):
        rl.overlong_penalty(lengths, 100, 0)


class TestGeneralizedAdvantages:
    @given(seed=SEEDS)
    def test_full_smoothing_gives_returns_minus_values(self, seed: int) -> None:
        rewards, values = _normal(seed, 2, 6), _normal(seed + 1, 2, 6)
        everything = torch.ones(2, 6, dtype=torch.bool)
        advantages, returns = rl.generalized_advantages(rewards, values, everything, discount=0.9, smoothing=1.0)
        for start in range(6):
            expected = sum(0.9**k * rewards[:, start + k] for k in range(6 - start))
            torch.testing.assert_close(returns[:, start], expected)
        torch.testing.assert_close(advantages, returns - values)

    @given(seed=SEEDS)
    def test_no_smoothing_gives_one_step_differences(self, seed: int) -> None:
        rewards, values = _normal(seed, 2, 5), _normal(seed + 1, 2, 5)
        everything = torch.ones(2, 5, dtype=torch.bool)
        advantages, _ = rl.generalized_advantages(rewards, values, everything, discount=0.8, smoothing=0.0)
        following = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
        torch.testing.assert_close(advantages, rewards + 0.8 * following - values)

    @given(seed=SEEDS)
    def test_masked_tokens_are_as_if_they_were_not_there(self, seed: int) -> None:
        rewards, values = _normal(seed, 1, 7), _normal(seed + 1, 1, 7)
        mask = torch.rand(1, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
        advantages, returns = rl.generalized_advantages(rewards, values, mask, discount=0.9, smoothing=0.7)
        kept = mask[0]
        everything = torch.ones(1, int(kept.sum()), dtype=torch.bool)
        if kept.any():
            short = rl.generalized_advantages(
                rewards[:, kept], values[:, kept], everything, discount=0.9, smoothing=0.7
            )
            torch.testing.assert_close(advantages[:, kept], short[0])
            torch.testing.assert_close(returns[:, kept], short[1])
        assert not advantages[~mask].any()
        assert not returns[~mask].any()


class TestKL:
    @given(seed=SEEDS)
    def test_k1_and_k3_have_the_exact_divergence_as_their_mean(self, seed: int) -> None:
        log_p, log_q = _normal(seed, 8).log_softmax(0), _normal(seed + 1, 8).log_softmax(0)
        exact = (log_p.exp() * (log_p - log_q)).sum()
        for estimator in ("k1", "k3"):
            torch.testing.assert_close((log_p.exp() * rl.kl_estimate(log_p, log_q, estimator)).sum(), exact)  # type: ignore[arg-type]

    @given(seed=SEEDS)
    def test_k2_and_k3_are_never_negative_and_zero_for_equals(self, seed: int) -> None:
        log_p, log_q = _normal(seed, 8).log_softmax(0), _normal(seed + 1, 8).log_softmax(0)
        for estimator in ("k2", "k3"):
            assert (rl.kl_estimate(log_p, log_q, estimator) >= 0).all()  # type: ignore[arg-type]
            assert not rl.kl_estimate(log_p, log_p, estimator).any()  # type: ignore[arg-type]

    def test_another_estimator_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="'k4'"):
            rl.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


class TestPolicyLosses:
    @given(seed=SEEDS)
    def test_on_policy_all_of_them_are_the_policy_gradient(self, seed: int) -> None:
        """At a ratio of 1 the gradient of each loss is −A ∇ log p."""
        mask = torch.ones(3, 4, dtype=torch.bool)
        advantages = _normal(seed + 1, 3, 1)
        losses = {
            "clipped": lambda now, then: rl.clipped_surrogate(now, then, advantages),
            "dual": lambda now, then: rl.clipped_surrogate(now, then, advantages, dual_clip=3.0),
            "sequence": lambda now, then: rl.sequence_surrogate(now, then, advantages, mask),
            "cispo": lambda now, then: rl.clipped_weight_policy_gradient(now, then, advantages),
        }
        for loss in losses.values():
            now = _normal(seed, 3, 4).requires_grad_()
            loss(now, now.detach()).sum().backward()
            torch.testing.assert_close(now.grad, -advantages.expand(3, 4).clone())

    @pytest.mark.parametrize(
        ("ratio", "advantage", "has_gradient"),
        [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
    )
    def test_clipping_takes_the_gradient_of_those_who_went_too_far(
        self, ratio: float, advantage: float, has_gradient: bool
    ) -> None:
        now = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss = rl.clipped_surrogate(now, torch.zeros(1, 1), torch.tensor([[advantage]]))
        loss.sum().backward()
        assert now.grad is not None
        assert bool(now.grad.any()) is has_gradient

    def test_clip_higher_lets_rare_tokens_grow(self) -> None:
        now = torch.tensor([[math.log(1.25)]], requires_grad=True)
        rl.clipped_surrogate(now, torch.zeros(1, 1), torch.ones(1, 1), clip_high=0.28).sum().backward()
        assert now.grad is not None
        assert now.grad.item() == pytest.approx(-1.25)

    def test_the_dual_clip_bounds_the_loss_of_bad_tokens(self) -> None:
        now = torch.tensor([[math.log(50.0)]])
        found = rl.clipped_surrogate(now, torch.zeros(1, 1), -torch.ones(1, 1), dual_clip=3.0)
        assert found.item() == 3.0

    @given(seed=SEEDS)
    def test_for_completions_of_one_token_the_sequence_is_the_token(self, seed: int) -> None:
        now, then, advantages = _normal(seed, 5, 1), _normal(seed + 1, 5, 1), _normal(seed + 2, 5, 1)
        mask = torch.ones(5, 1, dtype=torch.bool)
        torch.testing.assert_close(
            rl.sequence_surrogate(now, then, advantages, mask, clip_low=0.2, clip_high=0.2),
            rl.clipped_surrogate(now, then, advantages),
        )

    @given(seed=SEEDS)
    def test_tokens_outside_the_mask_do_not_move_the_sequence(self, seed: int) -> None:
        now, then, advantages = _normal(seed, 3, 6), _normal(seed + 1, 3, 6), _normal(seed + 2, 3, 1)
        mask = _mask(seed, 3, 6)
        other = torch.where(mask, now, 9.0)
        found = [rl.sequence_surrogate(each, then, advantages, mask)[mask] for each in (now, other)]
        torch.testing.assert_close(found[0], found[1])

    @given(seed=SEEDS)
    def test_decoupled_and_plain_ppo_agree_where_nothing_is_clipped(self, seed: int) -> None:
        """exp(proximal − rollout) · exp(policy − proximal) is exp(policy − rollout)."""
        now, near, then = _normal(seed, 2, 3) * 0.01, _normal(seed + 1, 2, 3) * 0.01, _normal(seed + 2, 2, 3)
        advantages = _normal(seed + 3, 2, 1)
        weight = rl.truncated_importance_weights(near, then, cap=1e9)
        decoupled = weight * rl.clipped_surrogate(now, near, advantages)
        torch.testing.assert_close(decoupled, -advantages * (now - then).exp())

    def test_cispo_cuts_the_weight_but_not_the_gradient(self) -> None:
        now = torch.tensor([[2.0]], requires_grad=True)
        rl.clipped_weight_policy_gradient(now, torch.zeros(1, 1), torch.ones(1, 1), cap=3.0).sum().backward()
        assert now.grad is not None
        assert now.grad.item() == -3.0

    def test_ranges_that_are_none_are_refused(self) -> None:
        one = torch.zeros(1, 1)
        for call in (
            lambda: rl.clipped_surrogate(one, one, one, clip_low=2.0),
            lambda: rl.clipped_surrogate(one, one, one, clip_high=-0.1),
            lambda: rl.clipped_surrogate(one, one, one, dual_clip=1.0),
            lambda: rl.clipped_weight_policy_gradient(one, one, one, cap=0),
            lambda: rl.truncated_importance_weights(one, one, cap=-1),
            lambda: rl.icepop_weights(one, one, 2.0, 1.0),
            lambda: rl.sequence_mask_weights(one, one, one.bool(), -1.0, 1.0),
        ):
            with pytest.raises(ConfigurationError):
                call()


class TestCorrections:
    @given(seed=SEEDS)
    def test_on_policy_every_weight_is_one(self, seed: int) -> None:
        logprobs, mask = _normal(seed, 3, 5), _mask(seed, 3, 5)
        for weights in (
            rl.truncated_importance_weights(logprobs, logprobs),
            rl.icepop_weights(logprobs, logprobs),
            rl.sequence_mask_weights(logprobs, logprobs, mask),
            rl.no_correction(logprobs, logprobs),
        ):
            assert (weights == 1).all()

    def test_they_cut_where_they_say(self) -> None:
        rollout = torch.zeros(1, 4)
        policy = torch.tensor([[0.4, 1.0, 3.0, 8.0]]).log()
        torch.testing.assert_close(
            rl.truncated_importance_weights(policy, rollout, cap=2.0), torch.tensor([[0.4, 1.0, 2.0, 2.0]])
        )
        torch.testing.assert_close(rl.icepop_weights(policy, rollout), torch.tensor([[0.0, 1.0, 3.0, 0.0]]))

    def test_a_whole_completion_is_masked(self) -> None:
        policy = torch.tensor([[1.0, 1.0, 50.0], [0.0, 0.1, 0.0]])
        mask = torch.tensor([[True, True, False], [True, True, True]])
        assert rl.sequence_mask_weights(policy, torch.zeros(2, 3), mask).tolist() == [[0.0], [1.0]]

    def test_weights_have_no_gradient(self) -> None:
        policy = torch.zeros(2, 2, requires_grad=True)
        mask = torch.ones(2, 2, dtype=torch.bool)
        assert not rl.truncated_importance_weights(policy, torch.zeros(2, 2)).requires_grad
        assert not rl.icepop_weights(policy, torch.zeros(2, 2)).requires_grad
        assert not rl.sequence_mask_weights(policy, torch.zeros(2, 2), mask).requires_grad


class TestReductions:
    @given(seed=SEEDS)
    def test_for_equal_lengths_they_agree(self, seed: int) -> None:
        losses, mask = _normal(seed, 4, 3), torch.ones(4, 3, dtype=torch.bool)
        expected = losses.mean()
        for reduction in ("token", "sequence", "constant"):
            torch.testing.assert_close(rl.reduce_tokens(losses, mask, reduction, length=3), expected)  # type: ignore[arg-type]

    @given(seed=SEEDS)
    def test_what_is_outside_the_mask_does_not_count(self, seed: int) -> None:
        losses, mask = _normal(seed, 4, 6), _mask(seed, 4, 6)
        other = torch.where(mask, losses, math.inf)
        for reduction in ("token", "sequence", "constant"):
            found = [rl.reduce_tokens(each, mask, reduction, length=6) for each in (losses, other)]  # type: ignore[arg-type]
            torch.testing.assert_close(found[0], found[1])

    def test_nothing_to_train_is_zero(self) -> None:
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        for reduction in ("token", "sequence", "constant"):
            assert rl.reduce_tokens(torch.ones(2, 3), nothing, reduction, length=3).item() == 0.0  # type: ignore[arg-type]

    def test_bad_ones_are_refused(self) -> None:
        mask = torch.ones(1, 1, dtype=torch.bool)
        with pytest.raises(ConfigurationError, match="'mean'"):
            rl.reduce_tokens(torch.ones(1, 1), mask, "mean")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="length=0"):
            rl.reduce_tokens(torch.ones(1, 1), mask, "constant")


def test_a_value_is_not_rewarded_for_jumping() -> None:
    values = torch.tensor([[5.0, 0.1]], requires_grad=True)
    loss = rl.clipped_value_loss(values, torch.zeros(1, 2), torch.full((1, 2), 10.0))
    assert loss[0, 0].item() == pytest.approx(0.5 * 9.8**2)
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0.0, -9.9])


class TestDiagnostics:
    def test_equal_policies_do_not_differ(self) -> None:
        logprobs, mask = _normal(1, 2, 5), _mask(1, 2, 5)
        found = rl.mismatch_metrics(logprobs, logprobs, mask, clip_low=0.2, clip_high=0.2)
        assert found["ratio_mean"] == found["ratio_max"] == found["ess"] == 1
        assert not any(found[name] for name in ("kl_k1", "kl_k3", "logprob_diff_mean", "logprob_diff_max"))
        assert found["clip_fraction"] == 0

    def test_only_tokens_in_the_mask_count(self) -> None:
        policy = torch.tensor([[0.0, math.log(2.0), 100.0]])
        mask = torch.tensor([[True, True, False]])
        found = rl.mismatch_metrics(policy, torch.zeros(1, 3), mask, clip_low=0.2, clip_high=0.2)
        assert found["ratio_max"].item() == pytest.approx(2.0)
        assert found["ratio_mean"].item() == pytest.approx(1.5)
        assert found["clip_fraction"].item() == 0.5
        assert found["ess"].item() == pytest.approx(0.9)

    def test_nothing_in_the_mask_is_no_error(self) -> None:
        found = rl.mismatch_metrics(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), clip_low=0.2, clip_high=0.2
        )
        assert found["ess"] == 1
        assert found["kl_k3"] == 0

    @given(seed=SEEDS)
    def test_the_effective_share_is_between_one_sample_and_all(self, seed: int) -> None:
        weights = _normal(seed, 9).exp()
        assert 1 / 9 <= rl.effective_sample_share(weights).item() <= 1 + 1e-9


class TestRecipes:
    @pytest.mark.parametrize("correction", ["truncated", "icepop"])
    def test_a_ratio_is_not_applied_twice(self, correction: str) -> None:
        with pytest.raises(ConfigurationError, match="set is_decoupled=True"):
            rl.GRPO(correction=correction)
        assert rl.GRPO(correction=correction, is_decoupled=True).correction == correction

    def test_what_stands_outside_the_mask_has_no_gradient(self) -> None:
        policy = torch.tensor([[-1.0, -500.0]], requires_grad=True)
        mask = torch.tensor([[True, False]])
        reference = torch.tensor([[-1.5, 0.0]])
        losses = rl.GRPO(kl_coefficient=0.1).token_losses(policy, reference, torch.ones(1, 1), mask, reference)
        loss, _ = rl.sum_tokens(losses, mask, "token")
        loss.backward()
        assert policy.grad is not None
        assert policy.grad[0, 1] == 0
        assert policy.grad[0, 0].isfinite()
