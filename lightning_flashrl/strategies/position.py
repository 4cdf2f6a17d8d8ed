"""Where in the training data a rank is, and how a replacement gets there.

What a loader without workers gives depends on the random states at the moment at which it is asked: a data set that
augments at random draws from them. So these states are remembered for the first and the last two batches; two, because
a loader of unknown length is asked for one batch ahead.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch.loops.fetchers import _DataFetcher
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from lightning_flashrl.recovery.random_states import capture_rng, restore_rng
from lightning_flashrl.strategies.worker_history import WorkerHistory

_SEEDED_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler, BatchSampler)
"""Samplers that draw nothing from the global generators after they gave their first batch."""
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_SEARCH_DEPTH = 6
_MOST_PARTS = 10_000
_LONGEST_LIST = 64
"""Longer lists in a data set are its data."""


class DataPosition:
    """Counts the batches taken from the training iterator and remembers how that iterator was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rng_at_setup: dict[str, tuple[Any, ...]] = {}
        """Random states before the loaders of training and of validation were made."""
        self._rng_at_iter: tuple[Any, ...] = ()
        self._generators: tuple[bytes, ...] = ()
        self._owned: list[Any] = []
        """Generators that loaders, samplers and data sets hold."""
        self._owned_now: tuple[bytes, ...] = ()
        self._loads_here = False
        self._lengths: frozenset[int] = frozenset()
        """Of loaders that begin again before the longest has ended: each draws its seeds anew then."""
        self._before: dict[int, tuple[Any, ...]] = {}
        """Random states before the first and the last two batches were asked for, and at each loader's last begin."""
        self._epoch = 0
        self._past: tuple[tuple[Any, ...], ...] = ()
        """Earlier epochs of loaders whose workers live on, and their random states with them."""
        self.consumed = 0
        self._made: tuple[Any, ...] | None = None
        """Of a replacement: how its own set-up made the iterator."""
        self.offset = 0
        """Batches that the loop counts as fetched although this iterator did not give them (a resumed epoch)."""
        self._validation: list[WorkerHistory] = []
        """Of validation loaders with persistent workers."""

    def begin_loaders(self, stage: str) -> None:
        """New loaders of a stage are about to be made."""
        self._rng_at_setup[stage] = capture_rng(self._device)
        if stage == "train":
            self._rng_at_iter, self._past, self._made = (), (), None

    def recall_setup(self, stage: str) -> None:
        """Set the random states to those before the loaders of a stage were made."""
        restore_rng(self._rng_at_setup[stage], self._device)

    def begin_iterator(self, epoch: int, loaders: list[Any]) -> None:
        """The training iterator is about to be made: its seeds come from the random states of this moment."""
        if self._rng_at_iter and any(getattr(loader, "persistent_workers", False) for loader in loaders):
            self._past += ((self._rng_at_iter, self._generators, self._epoch, self.consumed),)
        self._find(loaders)
        self._rng_at_iter = capture_rng(self._device)
        self._generators = self._capture_owned()
        self._before = {}
        self._epoch = epoch
        self.consumed = 0
        self.offset = 0

    def note_fetch(self) -> None:
        """A batch is about to be asked for."""
        begins = {self.consumed - self.consumed % length for length in self._lengths}
        if self._loads_here or self.consumed in begins:
            self._before[self.consumed] = (capture_rng(self._device), self._capture_owned())
            kept = {0, self.consumed - 1, self.consumed, *begins}
            self._before = {number: states for number, states in self._before.items() if number in kept}
        self.consumed += 1

    def recall_fetch(self) -> None:
        """Set the random states to those before the last batch was asked for: it is asked for again."""
        self._recall(self.consumed - 1)

    def _recall(self, number: int) -> None:
        states = self._before.get(number)
        if states is not None:
            restore_rng(states[0], self._device)
            self._restore_owned(states[1])

    def _find(self, loaders: list[Any]) -> None:
        self._owned = list(_generators(loaders))
        self._loads_here = any(not getattr(loader, "num_workers", 0) for loader in loaders)
        lengths = [length for loader in loaders if (length := sized_len(loader))]
        self._lengths = frozenset(lengths) - ({max(lengths)} if len(lengths) == len(loaders) else set())

    def _capture_owned(self) -> tuple[bytes, ...]:
        return tuple(_state_of(generator) for generator in self._owned)

    def _restore_owned(self, states: tuple[bytes, ...]) -> None:
        for generator, state in zip(self._owned, states, strict=False):
            _set_state(generator, state)

    def follow_validation(self, loaders: list[Any]) -> None:
        """The loaders of validation are these."""
        self._validation = [
            WorkerHistory(loader, self._device) for loader in loaders if WorkerHistory.is_needed(loader)
        ]

    def begin_validation(self, epoch: int) -> None:
        """The iterator of validation is about to be made or reset."""
        for history in self._validation:
            history.begin(epoch)

    def capture(self) -> tuple[Any, ...]:
        """This position as plain values."""
        origin = (dict(self._rng_at_setup), self._rng_at_iter, self._generators, self._epoch, self._past)
        validation = tuple(history.capture() for history in self._validation)
        return (origin, dict(self._before), self._capture_owned(), self.consumed, self.offset, validation)

    def restore(self, captured: tuple[Any, ...]) -> None:
        """Take over a captured position; the iterator follows with :meth:`seek`."""
        self._made = self._made or (self._rng_at_iter, self._generators, self._epoch)
        origin, before, self._owned_now, self.consumed, self.offset, validation = captured
        rng_at_setup, self._rng_at_iter, self._generators, self._epoch, self._past = origin
        self._rng_at_setup = dict(rng_at_setup)
        self._before = dict(before)
        self._restore_owned(self._owned_now)
        for history, passes in zip(self._validation, validation, strict=False):
            history.adopt(passes)

    def seek(self, fetcher: _DataFetcher, consumed: int) -> None:
        """Make the training iterator anew, as it was made, and step over ``consumed`` batches.

        Batches that worker processes or stateful loaders produce are produced again, so that the random states inside
        them move on as well; plain loaders only step their sampler. Workers that live longer than an epoch produce all
        their epochs again.
        """
        self._find(fetcher.combined_loader.flattened)
        epochs = [*self._past, (self._rng_at_iter, self._generators, self._epoch, consumed)]
        is_made = self._made == epochs[0][:3] and not self._owned
        for number, (rng, generators, epoch, count) in enumerate(epochs, 1):
            if not is_made:
                self._make(fetcher, rng, generators, epoch, is_first=number == 1)
            is_made = False
            is_last = number == len(epochs)
            if is_last:
                fetcher.fetched += self.offset
                self._recall(0)
            if count and not self._skip_samples(fetcher, count):
                for index in range(count):
                    if is_last:
                        self._recall(index)
                    next(fetcher)
        self._restore_owned(self._owned_now)

    def _make(
        self, fetcher: _DataFetcher, rng: tuple[Any, ...], generators: tuple[bytes, ...], epoch: int, *, is_first: bool
    ) -> None:
        loaders = fetcher.combined_loader.flattened
        restore_rng(rng, self._device)
        self._restore_owned(generators)
        for loader in loaders:
            _set_sampler_epoch(loader, epoch)
            if is_first and getattr(loader, "persistent_workers", False):
                loader._iterator = None  # workers of this process's own set-up
        iter(fetcher)

    @staticmethod
    def _skip_samples(fetcher: _DataFetcher, count: int) -> bool:
        """Step the samplers of plain loaders over ``count`` batches, loading none; false if that is not exact."""
        combined = fetcher.combined_loader
        iterator = combined._iterator
        if fetcher.length is None or combined._mode != "max_size_cycle" or iterator is None:
            return False
        loaders = combined.flattened
        if not all(_is_plain(loader) and len(loader) >= count for loader in loaders):
            return False
        plain = [it for it in iterator.iterators if isinstance(it, _SingleProcessDataLoaderIter)]
        if len(plain) < len(iterator.iterators):
            return False
        for loader_iterator in plain:
            for _ in range(count):
                loader_iterator._next_index()  # type: ignore[no-untyped-call]
            loader_iterator._num_yielded += count
        iterator._idx += count
        fetcher.fetched += count
        fetcher.done = fetcher.fetched >= fetcher.length
        return True


def _generators(loaders: list[Any]) -> Iterator[Any]:
    """The generators that loaders, their samplers and data sets own, each once."""
    seen: set[int] = set()
    todo = [(loader, 0) for loader in reversed(loaders)]
    while todo and len(seen) < _MOST_PARTS:
        thing, depth = todo.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, torch.Tensor, np.ndarray, type(None))):
            continue
        seen.add(id(thing))
        if isinstance(thing, _GENERATORS):
            yield thing
        elif depth < _SEARCH_DEPTH:
            todo += [(part, depth + 1) for part in reversed(_parts_of(thing))]


def _parts_of(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= _LONGEST_LIST else []
    if isinstance(thing, (list, tuple)):
        return list(thing) if len(thing) <= _LONGEST_LIST else []
    if isinstance(thing, (type, ModuleType, FunctionType)):
        return []
    # Iterators of a loader hold worker processes and queues.
    return [part for name, part in getattr(thing, "__dict__", {}).items() if name != "_iterator"]


def _state_of(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    return pickle.dumps(generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate())


def _set_state(generator: Any, state: bytes) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    else:
        generator.setstate(pickle.loads(state))


def _is_plain(loader: Any) -> bool:
    """Whether a loader's position is its sampler's position and nothing else."""
    if type(loader) is not DataLoader or loader.num_workers or isinstance(loader.dataset, IterableDataset):
        return False
    batch_sampler = loader.batch_sampler
    if batch_sampler is None or type(batch_sampler) is not BatchSampler:
        return False
    sampler = batch_sampler.sampler
    if isinstance(sampler, RandomSampler):
        return sampler.generator is None
    return isinstance(sampler, _SEEDED_SAMPLERS)
