"""Workers of a replacement's validation loader do what those of its predecessor did."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_flashrl.recovery.random_states import capture_rng, restore_rng
from lightning_flashrl.strategies.worker_history import WorkerHistory

CPU = torch.device("cpu")


class Draws(Dataset[tuple[int, float]]):
    """Each sample holds a random number of the process that loads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


class Rank:
    """A process with a validation loader."""

    def __init__(self, *, shuffle: bool, has_sanity_check: bool) -> None:
        torch.manual_seed(3)
        self.loader = DataLoader(Draws(), 2, shuffle=shuffle, num_workers=1, persistent_workers=True)
        self.history = WorkerHistory(self.loader, CPU)
        if has_sanity_check:
            self.validate(0, 1)

    def validate(self, epoch: int, num_batches: int | None = None) -> list[Any]:
        self.history.begin(epoch)
        return [[part.tolist() for part in batch] for batch in itertools.islice(iter(self.loader), num_batches)]

    def close(self) -> None:
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _random_states() -> Iterator[None]:
    before = capture_rng()
    yield
    restore_rng(before)


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("has_sanity_check", [False, True], ids=["no sanity check", "sanity check"])
def test_the_next_validation_of_a_replacement_is_that_of_its_predecessor(shuffle: bool, has_sanity_check: bool) -> None:
    lost = Rank(shuffle=shuffle, has_sanity_check=has_sanity_check)
    passes = [lost.validate(1), (torch.rand(5), lost.validate(2, 3))[1]]
    states, published = capture_rng(), pickle.dumps(lost.history.capture())
    expected = [lost.validate(3), capture_rng(), lost.validate(4), lost.history.capture()]
    lost.close()

    replacement = Rank(shuffle=shuffle, has_sanity_check=has_sanity_check)
    replacement.history.adopt(pickle.loads(published))
    assert replacement.history.capture() == pickle.loads(published)  # for the replacement's own replacement
    restore_rng(states)
    assert [
        replacement.validate(3),
        capture_rng(),
        replacement.validate(4),
        replacement.history.capture(),
    ] == expected
    replacement.close()
    drawn = [number for batches in (*passes, expected[0], expected[2]) for batch in batches for number in batch[1]]
    assert len(set(drawn)) == len(drawn)  # no worker began anew


def test_an_iterator_that_the_predecessor_did_not_make_in_its_set_up_is_made_anew() -> None:
    lost = Rank(shuffle=False, has_sanity_check=False)
    torch.rand(7)
    lost.validate(1)
    states, published = capture_rng(), lost.history.capture()
    expected = lost.validate(2)
    lost.close()
    replacement = Rank(shuffle=False, has_sanity_check=True)
    unused = replacement.loader._iterator
    replacement.history.adopt(published)
    restore_rng(states)
    assert replacement.validate(2) == expected
    unused._shutdown_workers()  # type: ignore[union-attr]
    replacement.close()


def test_random_states_are_kept_only_where_the_sampler_draws() -> None:
    for shuffle in (False, True):
        rank = Rank(shuffle=shuffle, has_sanity_check=False)
        for epoch in range(3):
            rank.validate(epoch)
        passes = rank.history.capture()
        assert [(rng is not None, epoch, count) for rng, epoch, count in passes] == [
            (True, 0, 4),
            (shuffle, 1, 4),
            (shuffle, 2, 4),
        ]
        rank.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, False), ({"num_workers": 1}, False), ({"num_workers": 1, "persistent_workers": True}, True)],
    ids=["no workers", "workers of a pass", "persistent workers"],
)
def test_only_workers_that_live_on_remember(options: dict[str, Any], expected: bool) -> None:
    assert WorkerHistory.is_needed(DataLoader(Draws(), **options)) is expected
    assert not WorkerHistory.is_needed([1, 2])
