"""Where in the training data a rank is, and how a replacement gets there."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
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

from lightning_flashrl.recovery.snapshot import capture_rng, restore_rng

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_SEEDED_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler, BatchSampler)
"""Samplers that draw nothing from the global generators after their iterator was made."""


class DataPosition:
    """Counts the batches taken from the training iterator and remembers how that iterator was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rng_at_iter: tuple[Any, ...] = ()
        self._generators: tuple[bytes, ...] = ()
        self._epoch = 0
        self._past: tuple[tuple[Any, ...], ...] = ()
        """Earlier epochs of loaders whose workers live on, and their random states with them."""
        self.consumed = 0
        self._made: tuple[Any, ...] | None = None
        """Of a replacement: how its own set-up made the iterator."""
        self.offset = 0
        """Batches that the loop counts as fetched although this iterator did not give them (a resumed epoch)."""

    def begin_iterator(self, epoch: int, loaders: list[Any]) -> None:
        """The training iterator is about to be made: its seeds come from the random states of this moment."""
        if self._rng_at_iter and any(getattr(loader, "persistent_workers", False) for loader in loaders):
            self._past += ((self._rng_at_iter, self._generators, self._epoch, self.consumed),)
        self._rng_at_iter = capture_rng(self._device)
        self._generators = tuple(g.get_state().numpy().tobytes() for g in _generators(loaders))
        self._epoch = epoch
        self.consumed = 0
        self.offset = 0

    def capture(self) -> tuple[Any, ...]:
        """This position as plain values."""
        return (self._rng_at_iter, self._generators, self._epoch, self._past, self.consumed, self.offset)

    def restore(self, captured: tuple[Any, ...]) -> None:
        """Take over a captured position; the iterator follows with :meth:`seek`."""
        self._made = self._made or (self._rng_at_iter, self._generators, self._epoch)
        self._rng_at_iter, self._generators, self._epoch, self._past, self.consumed, self.offset = captured

    def seek(self, fetcher: _DataFetcher, consumed: int) -> None:
        """Make the training iterator anew, as it was made, and step over ``consumed`` batches.

        Batches that worker processes or stateful loaders produce are produced again, so that the random states inside
        them move on as well; plain loaders only step their sampler. Workers that live longer than an epoch produce all
        their epochs again.
        """
        epochs = [*self._past, (self._rng_at_iter, self._generators, self._epoch, consumed)]
        is_made = self._made == epochs[0][:3]
        for number, (rng, generators, epoch, count) in enumerate(epochs, 1):
            if not is_made:
                self._make(fetcher, rng, generators, epoch, is_first=number == 1)
            is_made = False
            if number == len(epochs):
                fetcher.fetched += self.offset
            if count and not self._skip_samples(fetcher, count):
                for _ in range(count):
                    next(fetcher)

    def _make(
        self, fetcher: _DataFetcher, rng: tuple[Any, ...], generators: tuple[bytes, ...], epoch: int, *, is_first: bool
    ) -> None:
        loaders = fetcher.combined_loader.flattened
        restore_rng(rng, self._device)
        for generator, state in zip(_generators(loaders), generators, strict=False):
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
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


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    """The generators that loaders and their samplers own, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        sampler = getattr(loader, "sampler", None)
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _is_plain(loader: Any) -> bool:
    """Whether a loader's position is its sampler's position and nothing else."""
    if type(loader) is not DataLoader or loader.num_workers or isinstance(loader.dataset, IterableDataset):
        return False
    if any(isinstance(value, _GENERATORS) for value in getattr(loader.dataset, "__dict__", {}).values()):
        return False  # it moves on with every sample that is loaded
    batch_sampler = loader.batch_sampler
    if batch_sampler is None or type(batch_sampler) is not BatchSampler:
        return False
    sampler = batch_sampler.sampler
    if isinstance(sampler, RandomSampler):
        return sampler.generator is None
    return isinstance(sampler, _SEEDED_SAMPLERS)
