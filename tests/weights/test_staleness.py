"""Every deadline is kept, whatever the rollouts' speeds, crashes and failures; and the gate never locks up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flashrl.errors import ConfigurationError, StalenessExceededError
from lightning_flashrl.weights import StalenessGate


def test_on_policy_training_waits_for_the_whole_batch() -> None:
    gate = StalenessGate(0, 2)
    gate.begin([1, 2])
    assert gate.room() == 0
    decision = gate.take([2])
    assert decision.rows == (2,)
    assert decision.reason == "step 0 has 1 of 2 row(s)"
    assert not gate.is_complete()
    assert gate.take([2, 1]).rows == (1,)
    assert gate.is_complete()
    gate.trained()
    assert gate.version == 1
    assert gate.room() == 2


def test_newer_rows_may_overtake_as_long_as_the_slow_one_is_not_due() -> None:
    gate = StalenessGate(1, 1)
    gate.begin([1, 2])
    assert gate.take([2]).rows == (2,)
    gate.trained()
    gate.begin([3])
    decision = gate.take([3])
    assert decision.rows == ()
    assert decision.reason == "step 1 waits for 1 row(s) that are due by step 1 and not ready"
    assert gate.take([3, 1]).rows == (1,)


def test_two_slow_rows_that_are_due_together_are_not_left_to_the_last_step() -> None:
    """With batches of one, two rows due at step 2 need the steps 1 and 2: step 1 may not take a newer row."""
    gate = StalenessGate(2, 1)
    gate.begin([1, 2, 3])
    assert gate.take([1]).rows == (1,)
    gate.trained()
    gate.begin([4])
    assert gate.take([4]).rows == ()
    assert gate.take([4, 3]).rows == (3,)


def test_a_place_is_kept_for_the_row_that_is_due() -> None:
    gate = StalenessGate(1, 2)
    gate.begin([1, 2, 3, 4])
    assert gate.take([2, 3]).rows == (2, 3)
    gate.trained()
    gate.begin([5, 6])
    assert gate.take([4, 5, 6]).rows == (4,)
    assert gate.take([5, 6]).rows == ()
    assert gate.take([5, 6, 1]).rows == (1,)


def test_failed_rows_make_room() -> None:
    gate = StalenessGate(0, 2)
    gate.begin([1, 2])
    assert gate.take([1]).rows == (1,)
    gate.drop([1, 99])
    assert gate.taken == []
    assert gate.room() == 1
    gate.begin([3])
    assert gate.take([2, 3]).rows == (2, 3)


def test_the_last_batch_may_be_smaller() -> None:
    gate = StalenessGate(1, 3)
    gate.begin([1, 2])
    gate.take([1])
    assert not gate.is_complete(is_last=True)
    gate.take([2])
    assert not gate.is_complete()
    assert gate.is_complete(is_last=True)
    gate.trained()
    assert not gate.is_complete(is_last=True)


def test_a_rollout_that_is_done_again_keeps_its_deadline() -> None:
    gate = StalenessGate(1, 1)
    gate.begin([1, 2])
    gate.take([2])
    gate.trained()
    gate.begin([1])
    gate.begin([3])
    assert gate.take([3]).rows == ()


def test_more_than_there_is_room_for_is_refused() -> None:
    gate = StalenessGate(1, 2)
    with pytest.raises(StalenessExceededError, match=r"5 row\(s\) exceed max_staleness=1"):
        gate.begin(range(5))
    assert gate.num_open == 0


def test_after_a_recovery_no_burst_is_admitted() -> None:
    gate = StalenessGate(1, 2)
    gate.begin([1, 2, 3, 4])
    gate.take([1, 2])
    gate.trained()
    gate.begin([5, 6])
    gate.take([3])
    gate.restored(0)
    assert gate.room() == 0
    assert gate.take([3, 4, 5, 6]).rows == (3, 4)
    gate.trained()
    gate.take([5, 6])
    gate.trained()
    assert gate.max_seen == 1


@pytest.mark.parametrize("arguments", [(-1, 1), (0, 0)])
def test_settings_that_cannot_be_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError):
        StalenessGate(*arguments)


@settings(max_examples=300)
@given(data=st.data(), bound=st.integers(0, 4), batch=st.integers(1, 4))
def test_no_row_is_trained_too_late_and_none_waits_for_ever(data: st.DataObject, bound: int, batch: int) -> None:
    """The staleness is counted here, from what the test itself knows of each row."""
    gate = StalenessGate(bound, batch)
    version = 0
    began: dict[int, int] = {}
    ready: list[int] = []
    taken: list[int] = []
    done: set[int] = set()
    following = 0

    def take() -> None:
        rows = gate.take(ready).rows
        assert set(rows) <= set(ready)
        for row in rows:
            ready.remove(row)
            taken.append(row)
        assert len(taken) <= batch

    def train() -> bool:
        nonlocal version
        take()
        assert gate.is_complete() == (len(taken) == batch)
        if len(taken) < batch:
            return False
        for row in taken:
            assert 0 <= version - began[row] <= bound
            done.add(row)
        taken.clear()
        gate.trained()
        version += 1
        return True

    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["begin", "begin", "complete", "take", "train", "fail", "recover"]))
        under_way = sorted(began.keys() - done - set(ready) - set(taken))
        if action == "begin" and gate.room():
            count = data.draw(st.integers(1, gate.room()))
            rows = range(following, following + count)
            following += count
            gate.begin(rows)
            began.update(dict.fromkeys(rows, version))
        elif action == "complete" and under_way:
            ready.append(data.draw(st.sampled_from(under_way)))
        elif action == "fail" and (under_way or taken):
            row = data.draw(st.sampled_from(under_way + taken))
            gate.drop([row])
            done.add(row)
            if row in taken:
                taken.remove(row)
        elif action == "take":
            take()
        elif action == "train":
            train()
        elif action == "recover":
            gate.restored(gate.version)
            ready += taken
            taken.clear()
        assert gate.num_open <= (bound + 1) * batch
    # Let everything complete: it is all trained, and new rows find room.
    ready += sorted(began.keys() - done - set(ready) - set(taken))
    while train():
        pass
    assert not ready
    assert gate.num_open == len(taken) < batch
    assert gate.room() > bound * batch
