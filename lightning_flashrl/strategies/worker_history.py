"""What persistent workers of validation loaders have done, so that a replacement's workers can do it again.

Such workers live from the first validation to the last, and the random states inside them go on from one to the next.
Only the processes themselves have these states; what can be kept is how the iterator was made and how many batches it
gave in each pass. A replacement's workers load those batches again, before its first validation and not before it
enters: the other ranks go on training meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_flashrl.recovery.random_states import capture_rng, restore_rng

_DRAWLESS_SAMPLERS = (SequentialSampler, DistributedSampler)
"""Draw nothing from the global generators."""


Pass = tuple[tuple[Any, ...] | None, int, int]
"""One passage through a loader: random states before it began, or ``None`` if it drew nothing from them; epoch of
training, for the sampler; number of batches taken."""


class WorkerHistory:
    """The passes of one loader with persistent workers.

    Args:
        loader: has persistent workers, and no iterator yet.
        device: of this rank.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self._passes: list[Pass] = []
        self._num_made = 0
        """Passes that the workers of this process have made; the others are a predecessor's."""
        self._epoch = 0
        self._is_repeating = False
        self._make_iterator = loader._get_iterator
        loader._get_iterator = self._make  # type: ignore[method-assign]

    @staticmethod
    def is_needed(loader: Any) -> bool:
        """Whether a loader has workers that remember."""
        return isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.persistent_workers

    def begin(self, epoch: int) -> None:
        """A validation is about to go through the loader: let the workers catch up with a predecessor's."""
        self._epoch = epoch
        if self._num_made < len(self._passes):
            self._repeat()

    def _make(self) -> Any:
        if not self._is_repeating:
            self._passes, self._num_made = [], 0
            self._note(capture_rng(self._device))
        iterator = self._make_iterator()
        reset = iterator._reset

        def noted_reset(loader: Any, first_iter: bool = False) -> None:
            if not self._is_repeating:
                self._settle()
                self._note(None if self._draws_nothing() else capture_rng(self._device))
            reset(loader, first_iter)

        iterator._reset = noted_reset  # type: ignore[method-assign]
        return iterator

    def _note(self, rng: tuple[Any, ...] | None) -> None:
        self._passes.append((rng, self._epoch, 0))
        self._num_made += 1

    def _settle(self) -> None:
        """Take over the number of batches of the pass that runs or ran last."""
        iterator = self._loader._iterator
        if iterator is not None and self._passes and self._num_made == len(self._passes):
            self._passes[-1] = (*self._passes[-1][:2], iterator._num_yielded)

    def _draws_nothing(self) -> bool:
        sampler: Any = self._loader.batch_sampler or self._loader.sampler
        while type(sampler) is BatchSampler:
            sampler = sampler.sampler
        return isinstance(sampler, _DRAWLESS_SAMPLERS)

    def _repeat(self) -> None:
        now = capture_rng(self._device)
        self._is_repeating = True
        try:
            for rng, epoch, num_batches in self._passes[self._num_made :]:
                if rng is not None:
                    restore_rng(rng, self._device)
                _set_sampler_epoch(self._loader, epoch)
                iterator = iter(self._loader)
                for _ in range(num_batches):
                    next(iterator)
        finally:
            self._is_repeating = False
            restore_rng(now, self._device)
        self._num_made = len(self._passes)

    def capture(self) -> tuple[Pass, ...]:
        """All passes, a predecessor's included."""
        self._settle()
        return tuple(self._passes)

    def adopt(self, passes: tuple[Pass, ...]) -> None:
        """Take over a predecessor's passes. Those of the set-up were made in this process as well."""
        self._settle()
        made = self._passes[: self._num_made]
        if made != list(passes[: len(made)]):
            self._loader._iterator = None
            made = []
        self._passes, self._num_made = list(passes), len(made)
