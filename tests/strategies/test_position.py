"""A replacement's loader gives exactly the batches that the lost rank would have taken next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_flashrl.recovery.random_states import capture_rng, restore_rng
from lightning_flashrl.strategies.position import DataPosition

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it

CPU = torch.device("cpu")
SIZE = 23


class Numbers(Dataset[tuple[int, float, float, float]]):
    """An index beside draws from all global generators, as random augmentation makes them. Counts what it loads."""

    def __init__(self) -> None:
        self.num_loaded = 0

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        self.num_loaded += 1
        return index, torch.rand(()).item(), random.random(), float(np.random.rand())


class Stream(IterableDataset[int]):
    """Shuffles within a window, with a generator that it seeds itself."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        part, parts = (info.id, info.num_workers) if info is not None else (0, 1)
        order = random.Random(5 + part)
        window: list[int] = []
        for number in range(part, 40, parts):
            window.append(number)
            if len(window) == 6:
                yield window.pop(order.randrange(6))
        yield from window


class Draws(IterableDataset[float]):
    """Of unknown length, so that one batch is loaded ahead; draws as it loads."""

    def __iter__(self) -> Iterator[float]:
        for _ in range(SIZE):
            yield torch.rand(()).item() + random.random()


class Generators(Dataset[float]):
    """Holds generators of its own, one of them in a transform."""

    def __init__(self) -> None:
        self.transforms = [{"draw": random.Random(1)}]
        self.generator = np.random.default_rng(2)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> float:
        return index + self.transforms[0]["draw"].random() + float(self.generator.random())


class Backwards(Sampler[int]):
    """A sampler of the user's."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE - 1, -1, -1))

    def __len__(self) -> int:
        return SIZE


def _distributed(**settings: Any) -> DataLoader[Any]:
    data = Numbers()
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=True, seed=3)
    return DataLoader(data, batch_size=2, sampler=sampler, **settings)


def _own_generator(**settings: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(4)
    return DataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator, **settings)


def _generator_in_sampler() -> DataLoader[Any]:
    data = Numbers()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(4))
    return DataLoader(data, batch_size=4, sampler=sampler)


def _stateful(**settings: Any) -> Any:
    data = Numbers()
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True, seed=3)
    return StatefulDataLoader(data, batch_size=2, sampler=sampler, **settings)


LOADERS: dict[str, Callable[[], Any]] = {
    "distributed": _distributed,
    "in order": lambda: DataLoader(Numbers(), batch_size=3, drop_last=True),
    "own generator": _own_generator,
    "generator in the sampler": _generator_in_sampler,
    "shuffled by the global generator": lambda: DataLoader(Numbers(), batch_size=3, shuffle=True),
    "weighted by the global generator": lambda: DataLoader(
        Numbers(), batch_size=3, sampler=WeightedRandomSampler(list(range(SIZE)), SIZE)
    ),
    "own sampler": lambda: DataLoader(Numbers(), batch_size=3, sampler=Backwards()),
    "own batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(SequentialSampler(range(SIZE)), 5, drop_last=False)
    ),
    "weighted": lambda: DataLoader(
        Numbers(),
        batch_size=3,
        sampler=WeightedRandomSampler(list(range(SIZE)), SIZE, generator=torch.Generator().manual_seed(1)),
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=3),
    "stream that draws": lambda: DataLoader(Draws(), batch_size=3),
    "generators in the data set": lambda: DataLoader(Generators(), batch_size=3),
    "stateful": _stateful,
    "two of different length": lambda: {"short": DataLoader(range(7), batch_size=2), "long": _distributed()},
    "two alike": lambda: [_distributed(), _own_generator()],
}
WORKERS: dict[str, Callable[[], Any]] = {
    "distributed": lambda: _distributed(num_workers=2),
    "own generator": lambda: _own_generator(num_workers=1),
    "stream": lambda: DataLoader(Stream(), batch_size=3, num_workers=2),
    "stateful": lambda: _stateful(num_workers=2),
    "workers that live on": lambda: _distributed(num_workers=2, persistent_workers=True),
}


class Rank:
    """The parts of a training loop that touch the data, in the order in which Lightning calls them."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.combined = CombinedLoader(make(), "max_size_cycle")
        self.fetcher: _DataFetcher = _PrefetchDataFetcher()
        self.position = DataPosition(CPU)

    def set_up(self, epoch: int = 0) -> None:
        self.position.begin_iterator(epoch, self.combined.flattened)
        self.fetcher.setup(self.combined)
        iter(self.fetcher)

    def begin_epoch(self, epoch: int) -> None:
        for loader in self.combined.flattened:
            _set_sampler_epoch(loader, epoch)
        if epoch > 0:
            self.position.begin_iterator(epoch, self.combined.flattened)
            iter(self.fetcher)
        _draw()  # hooks between the iterator and its first batch

    def take(self) -> Any:
        self.position.note_fetch()
        batch, index, _ = next(self.fetcher)
        return _plain(batch), index, self.fetcher.done, self.fetcher.fetched

    def take_all(self) -> list[Any]:
        batches = []
        while not self.fetcher.done:
            batches.append((self.take(), _draw()))
        return batches


def _plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: _plain(value) for key, value in batch.items()}
    return [_plain(item) for item in batch] if isinstance(batch, (list, tuple)) else batch


def _draw() -> tuple[Any, ...]:
    """What a training step does to the random states, e.g. in dropout."""
    return (torch.rand(2).tolist(), random.random(), np.random.rand())


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture(autouse=True)
def _random_states_are_put_back() -> Iterator[None]:
    outer = capture_rng()
    yield
    restore_rng(outer)


def _check(make: Callable[[], Any], consumed: int, epoch: int, *, same_seed: bool) -> None:
    """Let a rank take some batches, then a replacement of it go on; compare all that follows."""
    _seed(11)
    lost = Rank(make)
    lost.set_up()
    for earlier in range(epoch):
        lost.begin_epoch(earlier)
        lost.take_all()
    lost.begin_epoch(epoch)
    for _ in range(consumed):
        lost.take()
        _draw()
    published, states = lost.position.capture(), capture_rng()
    expected = lost.take_all()
    lost.fetcher.teardown()

    _seed(11 if same_seed else 12)
    replacement = Rank(make)
    replacement.set_up()
    replacement.begin_epoch(0)
    replacement.position.restore(published)
    replacement.position.seek(replacement.fetcher, replacement.position.consumed)
    restore_rng(states)
    assert replacement.take_all() == expected
    assert replacement.position.consumed == consumed + len(expected)
    replacement.fetcher.teardown()


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("consumed", [0, 1, 4])
@pytest.mark.parametrize("name", LOADERS)
def test_a_replacement_takes_the_batches_that_follow(name: str, consumed: int, epoch: int) -> None:
    _check(LOADERS[name], consumed, epoch, same_seed=True)


@pytest.mark.parametrize("name", LOADERS)
def test_a_replacement_whose_own_start_was_another_takes_them_too(name: str) -> None:
    _check(LOADERS[name], 3, 0, same_seed=False)


@pytest.mark.parametrize("consumed", [1, 2, 5])
@pytest.mark.parametrize("name", LOADERS)
def test_the_last_batch_is_taken_once_more_as_it_was(name: str, consumed: int) -> None:
    _seed(11)
    lost = Rank(LOADERS[name])
    lost.set_up()
    lost.begin_epoch(0)
    for _ in range(consumed):
        last = lost.take()
        _draw()
    _seed(12)
    replacement = Rank(LOADERS[name])
    replacement.set_up()
    replacement.begin_epoch(0)
    replacement.position.restore(lost.position.capture())
    replacement.position.seek(replacement.fetcher, consumed - 1)
    replacement.position.recall_fetch()
    batch, index, _ = next(replacement.fetcher)
    assert (_plain(batch), index) == last[:2]


@pytest.mark.parametrize("consumed", [0, 3])
@pytest.mark.parametrize("same_seed", [True, False])
@pytest.mark.parametrize("name", WORKERS)
def test_worker_processes_are_where_they_were(name: str, same_seed: bool, consumed: int) -> None:
    _check(WORKERS[name], consumed, 0, same_seed=same_seed)


@pytest.mark.parametrize("consumed", [1, 2, 5])
@pytest.mark.parametrize("name", ["distributed", "stream that draws", "generators in the data set"])
def test_the_last_batch_can_be_taken_once_more(name: str, consumed: int) -> None:
    _seed(11)
    lost = Rank(LOADERS[name])
    lost.set_up()
    for _ in range(consumed):
        last = lost.take()
        _draw()
    published, states = lost.position.capture(), capture_rng()
    expected = lost.take_all()

    _seed(11)
    replacement = Rank(LOADERS[name])
    replacement.set_up()
    replacement.position.restore(published)
    replacement.position.seek(replacement.fetcher, replacement.position.consumed - 1)
    replacement.position.recall_fetch()
    batch, index, _ = next(replacement.fetcher)
    assert (_plain(batch), index) == last[:2]
    replacement.position.restore(published)
    restore_rng(states)
    assert replacement.take_all() == expected


def test_worker_processes_are_where_they_were_in_a_later_epoch() -> None:
    _check(WORKERS["distributed"], 2, 1, same_seed=True)


def test_samplers_with_a_state_between_epochs_go_on_from_it() -> None:
    _check(LOADERS["generator in the sampler"], 2, 2, same_seed=True)


@pytest.mark.parametrize("name", ["distributed", "in order"])
def test_plain_loaders_load_nothing_that_is_stepped_over(name: str) -> None:
    rank = Rank(LOADERS[name])
    rank.set_up()
    rank.begin_epoch(0)
    rank.position.seek(rank.fetcher, 4)
    (loader,) = rank.combined.flattened
    assert loader.dataset.num_loaded == 0
    assert rank.fetcher.fetched == 4


def test_the_last_batch_is_known_as_the_last() -> None:
    rank = Rank(LOADERS["in order"])
    rank.set_up()
    rank.begin_epoch(0)
    length = len(rank.combined)
    rank.position.seek(rank.fetcher, length)
    assert rank.fetcher.done


def test_batches_of_a_resumed_epoch_count_though_another_iterator_gave_them() -> None:
    rank = Rank(LOADERS["in order"])
    rank.set_up()
    rank.position.offset = 2
    rank.position.seek(rank.fetcher, 3)
    assert rank.fetcher.fetched == 5
    assert _plain(next(rank.fetcher)[0])[0] == [9, 10, 11]


def test_an_equal_start_keeps_the_iterator_and_its_workers() -> None:
    _seed(1)
    ranks = [Rank(LOADERS["distributed"]) for _ in range(2)]
    for rank in ranks:
        _seed(1)
        rank.set_up()
    kept = ranks[1].fetcher.iterator
    ranks[1].position.restore(ranks[0].position.capture())
    ranks[1].position.seek(ranks[1].fetcher, 2)
    assert ranks[1].fetcher.iterator is kept
