"""Samplers hand out each row once, in the order they promise."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import (
    Candidates,
    Demand,
    OldestFirst,
    PromptGroups,
    Sampler,
    StalenessAware,
    TokenBalanced,
)
from lightning_flashrl.streaming.samplers import karmarkar_karp


def _rows(*rows: int, tokens: int | list[int] = 1, **tags: list[int]) -> Candidates:
    sizes = [tokens] * len(rows) if isinstance(tokens, int) else tokens
    return Candidates(
        np.array(rows, np.int64), np.array(sizes, np.int64), {name: np.array(values) for name, values in tags.items()}
    )


class TestOldestFirst:
    def test_a_count_is_met_whole_or_not_at_all(self) -> None:
        sampler = OldestFirst()
        sampler.add(_rows(4, 2, 9))
        assert sampler.take(Demand(count=4)) == []
        assert sampler.take(Demand(count=2)) == [2, 4]
        assert sampler.take(Demand(count=2)) == []
        assert len(sampler) == 1

    def test_less_will_do_when_nothing_more_comes_or_the_caller_says_so(self) -> None:
        sampler = OldestFirst()
        sampler.add(_rows(1, 2, 3))
        assert sampler.take(Demand(count=2, allow_partial=True)) == [1, 2]
        assert sampler.take(Demand(count=2, is_last=True)) == [3]
        assert sampler.take(Demand(count=2, is_last=True)) == []

    def test_tokens_fill_a_budget_and_a_long_row_comes_alone(self) -> None:
        sampler = OldestFirst()
        sampler.add(_rows(1, 2, 3, 4, tokens=[50, 40, 20, 500]))
        assert sampler.take(Demand(tokens=100)) == [1, 2]
        assert sampler.take(Demand(tokens=100)) == [3]
        assert sampler.take(Demand(tokens=100)) == [4]

    def test_a_budget_that_is_not_filled_waits(self) -> None:
        sampler = OldestFirst()
        sampler.add(_rows(1, tokens=60))
        assert sampler.take(Demand(tokens=100)) == []
        sampler.add(_rows(2, tokens=40))
        assert sampler.take(Demand(tokens=100)) == [1, 2]

    def test_rows_that_come_back_are_oldest_again(self) -> None:
        sampler = OldestFirst()
        sampler.add(_rows(1, 2, 3))
        first = sampler.take(Demand(count=2))
        sampler.add(_rows(*first))
        assert sampler.take(Demand(count=3)) == [1, 2, 3]

    def test_discarded_rows_are_not_handed_out(self) -> None:
        sampler = OldestFirst()
        sampler.add(_rows(1, 2, 3))
        sampler.discard([2, 77])
        assert sampler.take(Demand(count=3)) == []
        assert sampler.take(Demand(count=2)) == [1, 3]


class TestOwnSampler:
    def test_one_method_is_enough(self) -> None:
        class ShortestFirst(Sampler):
            def order(self, candidates: Candidates) -> Any:
                return candidates.num_tokens

        sampler = ShortestFirst()
        sampler.add(_rows(1, 2, 3, tokens=[30, 10, 20]))
        assert sampler.take(Demand(count=2)) == [2, 3]


class TestPromptGroups:
    def test_groups_come_whole(self) -> None:
        sampler = PromptGroups(3)
        sampler.add(_rows(1, 2, 3, 4, 5, group_id=[0, 1, 0, 1, 1]))
        assert sampler.take(Demand(count=3)) == [2, 4, 5]
        assert sampler.take(Demand(count=3)) == []
        sampler.add(_rows(9, group_id=[0]))
        assert sampler.take(Demand(count=3)) == [1, 3, 9]

    def test_a_count_that_cuts_a_group_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"count=4 cuts a prompt group of 3"):
            PromptGroups(3).check(Demand(count=4))

    def test_a_group_does_not_wait_for_rows_that_were_dropped(self) -> None:
        sampler = PromptGroups(3)
        sampler.add(_rows(1, 2, group_id=[0, 0]))
        sampler.drop(_rows(3, group_id=[0]))  # never ready, never held
        assert sampler.take(Demand(count=3, allow_partial=True)) == [1, 2]

    def test_the_end_brings_incomplete_groups(self) -> None:
        sampler = PromptGroups(3)
        sampler.add(_rows(1, 2, group_id=[0, 0]))
        assert sampler.take(Demand(count=3, allow_partial=True)) == []
        assert sampler.take(Demand(count=3, is_last=True)) == [1, 2]

    def test_a_group_that_comes_back_whole_is_offered_again(self) -> None:
        sampler = PromptGroups(2)
        sampler.add(_rows(1, 2, group_id=[5, 5]))
        rows = sampler.take(Demand(count=2))
        sampler.add(_rows(*rows, group_id=[5, 5]))
        assert sampler.take(Demand(count=2)) == [1, 2]


class TestStalenessAware:
    def test_old_versions_first_and_too_old_ones_never(self) -> None:
        sampler = StalenessAware(2)
        sampler.add(_rows(1, 2, 3, 4, policy_version=[7, 5, 4, 6]))
        assert sampler.take(Demand(count=2, policy_version=7)) == [2, 4]
        assert sampler.take_stale() == [3]
        assert sampler.take_stale() == []

    def test_the_oldest_row_of_a_group_counts(self) -> None:
        sampler = StalenessAware(1, group_size=2)
        sampler.add(_rows(1, 2, 3, 4, policy_version=[3, 5, 5, 5], group_id=[0, 0, 1, 1]))
        assert sampler.take(Demand(count=2, policy_version=5)) == [3, 4]
        assert sorted(sampler.take_stale()) == [1, 2]

    def test_the_version_must_be_said(self) -> None:
        with pytest.raises(ConfigurationError, match="policy_version"):
            StalenessAware(1).check(Demand(count=1))

    @given(
        versions=st.lists(st.integers(0, 12), max_size=40),
        asks=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=12),
        bound=st.integers(0, 4),
    )
    def test_nothing_beyond_the_bound_is_handed_out(
        self, versions: list[int], asks: list[tuple[int, int]], bound: int
    ) -> None:
        sampler = StalenessAware(bound)
        if versions:
            sampler.add(_rows(*range(len(versions)), policy_version=versions))
        handed: list[int] = []
        for version, count in asks:
            rows = sampler.take(Demand(count=count, allow_partial=True, policy_version=version))
            assert all(version - versions[row] <= bound for row in rows)
            handed += rows + sampler.take_stale()
        assert len(handed) == len(set(handed))
        assert len(handed) + len(sampler) == len(versions)


class TestTokenBalanced:
    def test_replicas_get_equal_counts_and_nearly_equal_tokens(self) -> None:
        sampler = TokenBalanced(2)
        sampler.add(_rows(*range(8), tokens=[100, 1, 1, 100, 60, 50, 40, 48]))
        assert len(sampler) == 8
        parts = [sampler.take(Demand(count=4, replica_rank=rank)) for rank in (1, 0)]
        sizes = [100, 1, 1, 100, 60, 50, 40, 48]
        assert sorted(parts[0] + parts[1]) == list(range(8))
        assert [sum(sizes[row] for row in part) for part in parts] == [199, 201]  # in turn: [211, 189]

    def test_a_slow_replica_finds_its_parts_in_order(self) -> None:
        sampler = TokenBalanced(2)
        sampler.add(_rows(0, 1, 2, 3))
        first, second = (sampler.take(Demand(count=1, replica_rank=0)) for _ in range(2))
        late = [sampler.take(Demand(count=1, replica_rank=1)) for _ in range(2)]
        assert sorted(first + late[0]) == [0, 1]
        assert sorted(second + late[1]) == [2, 3]

    def test_a_row_that_goes_leaves_its_part(self) -> None:
        sampler = TokenBalanced(2)
        sampler.add(_rows(0, 1, 2, 3))
        mine = sampler.take(Demand(count=2, replica_rank=0))
        other = [row for row in range(4) if row not in mine]
        sampler.discard([other[0]])
        assert sampler.take(Demand(count=2, replica_rank=1)) == [other[1]]

    @pytest.mark.parametrize(
        ("demand", "words"), [(Demand(tokens=9), "tokens"), (Demand(count=1, replica_rank=2), "replica_rank=2 of 2")]
    )
    def test_demands_that_cannot_be_are_refused(self, demand: Demand, words: str) -> None:
        with pytest.raises(ConfigurationError, match=words):
            TokenBalanced(2).check(demand)


class TestKarmarkarKarp:
    @given(sizes=st.lists(st.integers(0, 2000), max_size=60), num_parts=st.integers(1, 6))
    def test_each_thing_is_in_one_part_and_numbers_are_equal(self, sizes: list[int], num_parts: int) -> None:
        parts = karmarkar_karp(sizes, num_parts)
        assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_better_balanced_than_dealing_in_turn(self) -> None:
        draw = random.Random(3)
        for _ in range(50):
            sizes = [int(draw.lognormvariate(6, 1)) for _ in range(64)]
            spread = [
                max(totals) - min(totals)
                for totals in (
                    [sum(sizes[index] for index in part) for part in karmarkar_karp(sizes, 4)],
                    [sum(sorted(sizes)[rank::4]) for rank in range(4)],
                )
            ]
            assert spread[0] <= spread[1]


@pytest.mark.parametrize("make", [lambda: Sampler(group_size=0), lambda: StalenessAware(-1), lambda: TokenBalanced(0)])
def test_settings_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


@settings(max_examples=200)
@given(data=st.data(), group_size=st.integers(1, 3), replicas=st.integers(1, 3))
def test_no_row_is_lost_or_doubled(data: st.DataObject, group_size: int, replicas: int) -> None:
    """Whatever comes, goes and comes back, in any order: the sampler's account is that of a set."""
    samplers: list[Sampler] = [
        Sampler(group_size=group_size),
        StalenessAware(99, group_size=group_size),
        TokenBalanced(replicas, group_size=group_size),
    ]
    sampler = data.draw(st.sampled_from(samplers))
    held: set[int] = set()
    out: list[int] = []
    following = 0

    def candidates(rows: list[int]) -> Candidates:
        return _rows(
            *rows,
            tokens=[row % 5 for row in rows],
            group_id=[row // group_size for row in rows],
            policy_version=[row % 3 for row in rows],
        )

    for _ in range(data.draw(st.integers(1, 25))):
        step = data.draw(st.sampled_from(["add", "take", "return", "discard", "drop"]))
        if step == "add":
            rows = list(range(following, following + data.draw(st.integers(1, 6))))
            following = rows[-1] + 1
            sampler.add(candidates(rows))
            held.update(rows)
        elif step == "return" and out:
            sampler.add(candidates(out))
            held.update(out)
            out = []
        elif step in ("discard", "drop") and held:
            row = data.draw(st.sampled_from(sorted(held)))
            held.remove(row)
            sampler.discard([row]) if step == "discard" else sampler.drop(candidates([row]))
        elif step == "take":
            taken = sampler.take(
                Demand(
                    count=group_size * data.draw(st.integers(1, 4)),
                    allow_partial=data.draw(st.booleans()),
                    replica_rank=data.draw(st.integers(0, replicas - 1)),
                    policy_version=5,
                )
            )
            assert len(taken) == len(set(taken))
            assert set(taken) <= held
            held.difference_update(taken)
            out += taken
        assert len(sampler) == len(held)
