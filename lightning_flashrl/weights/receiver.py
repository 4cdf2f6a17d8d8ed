"""The rollout's side: the newest whole version is taken out of host memory, loaded, and proven to be there.

An engine was seen to accept new weights and go on with an old copy of one of them. So every swap ends with a proof: the
engine's log-probs of a probe sequence must be those that the trainer published with the weights.
"""

from __future__ import annotations

import enum
import fcntl
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from lightning_flashrl.errors import ConfigurationError, WeightMismatchError
from lightning_flashrl.messaging.memory import attach_memory
from lightning_flashrl.weights.publisher import (
    CHECKSUM,
    NUM_BUFFERS,
    PROBE_LENGTH,
    SEQUENCE,
    VERSION,
    Records,
    WeightsAddress,
    checksum,
)


class Swap(enum.StrEnum):
    """When a worker takes new weights."""

    ITERATION = "iteration"
    """When it has finished all that it generates: delayed update."""
    STAGGERED = "staggered"
    """Then too, but one worker at a time, so that others always generate: sub-step asynchrony."""
    IN_FLIGHT = "in_flight"
    """Between any two tokens."""


class Scorer(Protocol):
    """What a receiver needs of a rollout engine."""

    version: int

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Use other weights from now on."""

    def score(self, tokens: Tensor) -> Tensor:
        """Return the log-probs ``[L - 1]`` of tokens ``[L]`` but the first."""


class WeightReceiver:
    """Brings a publisher's weights to an engine on the same host.

    Args:
        address: of the publisher.
        swap: when :meth:`maybe_swap` takes new weights.
        tolerance: largest difference of a probe's log-prob between trainer and engine.

    Raises:
        ConfigurationError: the publisher's memory cannot be mapped from here.
    """

    def __init__(self, address: WeightsAddress, swap: Swap = Swap.ITERATION, *, tolerance: float = 1e-3) -> None:
        self.address = address
        self.swap = swap
        self.tolerance = tolerance
        try:
            self._memory = attach_memory(address.pid, address.fd, address.capacity_bytes, address.mark)
            self._turn_fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigurationError(
                f"the weights of process {address.pid} cannot be mapped from here ({error}); receivers run on the "
                "trainer's host and as its user"
            ) from error
        self._records = Records(address, self._memory.array)
        self._has_turn = False

    @property
    def newest_version(self) -> int:
        """The newest whole version; −1 before the first."""
        versions = [int(numbers[VERSION]) for numbers in self._records.numbers if int(numbers[SEQUENCE]) % 2 == 0]
        return max(versions, default=-1)

    def maybe_swap(self, engine: Scorer, *, is_between_iterations: bool) -> bool:
        """Load the newest version if there is one that the engine has not, and if it is the moment.

        Args:
            engine: the engine.
            is_between_iterations: whether the engine has nothing under way.

        Returns:
            Whether the weights were swapped.

        Raises:
            WeightMismatchError: the engine does not compute with what it was given.
        """
        if self.newest_version <= engine.version or (self.swap is not Swap.IN_FLIGHT and not is_between_iterations):
            return False
        if self.swap is Swap.STAGGERED and not self._take_turn():
            return False
        try:
            self.load(engine)
        finally:
            self._give_turn()
        return True

    def should_drain(self, engine: Scorer) -> bool:
        """Whether the engine should begin nothing new, so that its iteration ends and :meth:`maybe_swap` can load.

        With :attr:`Swap.STAGGERED` one worker at a time is told so; the others go on with their old weights.
        """
        if self.swap is Swap.IN_FLIGHT or self.newest_version <= engine.version:
            return False
        return self.swap is Swap.ITERATION or self._take_turn()

    def load(self, engine: Scorer) -> int:
        """Load the newest version into the engine and prove that it is there. Returns the version.

        Raises:
            ConfigurationError: nothing has been published yet.
            WeightMismatchError: the engine does not compute with what it was given.
        """
        weights, version, tokens, expected = self._read()
        engine.load_weights(weights, version)
        found = engine.score(tokens)
        difference = float((found - expected).abs().max())
        if not difference <= self.tolerance:
            raise WeightMismatchError(version, difference, self.tolerance)
        return version

    def _read(self) -> tuple[dict[str, Tensor], int, Tensor, Tensor]:
        """Copy a version out that was whole before and after."""
        while True:
            whole = [buffer for buffer in range(NUM_BUFFERS) if int(self._records.numbers[buffer][SEQUENCE]) % 2 == 0]
            buffer = max(whole, key=lambda number: int(self._records.numbers[number][VERSION]), default=-1)
            numbers = self._records.numbers[buffer].copy()
            version, length = int(numbers[VERSION]), int(numbers[PROBE_LENGTH])
            if buffer < 0 or version < 0:
                raise ConfigurationError("no weights have been published yet; publish version 0 before rollouts begin")
            start = self.address.buffer_offset(buffer)
            data = self._memory.array[start : start + self.address.buffer_bytes].copy()
            tokens = torch.from_numpy(self._records.probe_tokens[buffer][:length].copy())
            logprobs = torch.from_numpy(self._records.probe_logprobs[buffer][: length - 1].copy())
            is_same = (self._records.numbers[buffer] == numbers).all() and int(numbers[SEQUENCE]) % 2 == 0
            if is_same and checksum(data) == int(numbers[CHECKSUM]):
                break
        values = torch.from_numpy(data)
        weights = {
            spec.name: values[spec.offset : spec.offset + spec.size_bytes]
            .view(getattr(torch, spec.dtype))
            .view(spec.shape)
            for spec in self.address.weights
        }
        return weights, version, tokens, logprobs

    def _take_turn(self) -> bool:
        """Whether no other worker drains or swaps; the kernel takes the turn back from one that dies."""
        if not self._has_turn:
            try:
                fcntl.flock(self._turn_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._has_turn = True
        return True

    def _give_turn(self) -> None:
        if self._has_turn:
            fcntl.flock(self._turn_fd, fcntl.LOCK_UN)
            self._has_turn = False

    def close(self) -> None:
        """Let go of the memory."""
        os.close(self._turn_fd)
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
