"""The trainer's side: weights go to host memory in the background, and are announced when they are whole.

Two buffers take turns. Copying runs beside the next forward and backward pass, in which weights are only read; whoever
is about to change them calls :meth:`WeightPublisher.wait` first. What that waits is all that the training loop pays.

=====================  =======================================  ============================
who                    waits for                                unblocked by
=====================  =======================================  ============================
the training loop      the copy of the last version             the thread
the thread             a version to publish                     the training loop
=====================  =======================================  ============================
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.messaging.memory import MARK_BYTES, Bytes, Memory, attach_memory, make_memory

MAX_PROBE = 256
"""Tokens of the probe sequence, at most."""
NUM_BUFFERS = 2
HEADER_BYTES = 4096
SEQUENCE, VERSION, CHECKSUM, PROBE_LENGTH = range(4)
"""What stands before each buffer, as int64. The sequence is odd while the buffer is written."""
RECORD_BYTES = 8 * 4 + 8 * MAX_PROBE + 4 * MAX_PROBE
"""… then the probe's tokens (int64) and their log-probs (float32)."""
_ALIGNMENT = 64


class WeightSpec(msgspec.Struct, frozen=True):
    """Where one weight lies in a buffer.

    Attributes:
        name: as in the state_dict.
        dtype: of torch, without the prefix.
        shape: of the weight.
        offset: in the buffer, in bytes.
        size_bytes: of the weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class WeightsAddress(msgspec.Struct, frozen=True):
    """How to reach a publisher's memory.

    Attributes:
        pid: the publisher's process.
        fd: descriptor of the memory there.
        capacity_bytes: its size.
        mark: bytes at its beginning.
        buffer_bytes: size of each buffer.
        weights: what is in a buffer.
    """

    pid: int
    fd: int
    capacity_bytes: int
    mark: bytes
    buffer_bytes: int
    weights: tuple[WeightSpec, ...]

    def record_offset(self, buffer: int) -> int:
        """Where the record of a buffer begins."""
        return MARK_BYTES + buffer * RECORD_BYTES

    def buffer_offset(self, buffer: int) -> int:
        """Where a buffer begins."""
        return HEADER_BYTES * NUM_BUFFERS + buffer * self.buffer_bytes


class Records:
    """What stands before the buffers, seen through the memory."""

    def __init__(self, address: WeightsAddress, memory: Bytes) -> None:
        self.numbers = []
        self.probe_tokens = []
        self.probe_logprobs = []
        for buffer in range(NUM_BUFFERS):
            start = address.record_offset(buffer)
            tokens, logprobs = start + 32, start + 32 + 8 * MAX_PROBE
            self.numbers.append(memory[start:tokens].view(np.int64))
            self.probe_tokens.append(memory[tokens:logprobs].view(np.int64))
            self.probe_logprobs.append(memory[logprobs : logprobs + 4 * MAX_PROBE].view(np.float32))


class WeightPublisher:
    """Publishes versions of one model's weights to rollout workers on this host.

    Args:
        weights: by name; names, dtypes and shapes stay the same for all versions.

    Attributes:
        address: for receivers; may be sent to other processes.
        version: the newest version that is whole, −1 before the first.
        exposed_s: how long :meth:`wait` has kept the training loop waiting, in all.

    Raises:
        ConfigurationError: no weights.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        if not weights:
            raise ConfigurationError("there are no weights to publish; give the model's state_dict()")
        self._begin(*_make(weights))

    @classmethod
    def attach(cls, address: WeightsAddress) -> WeightPublisher:
        """Go on where another publisher, which is gone, has stopped, in memory that is still there.

        Raises:
            ConfigurationError: it cannot be mapped from here.
        """
        try:
            memory = attach_memory(address.pid, address.fd, address.capacity_bytes, address.mark)
        except OSError as error:
            raise ConfigurationError(
                f"the weights that process {address.pid} keeps cannot be mapped from here ({error})"
            ) from error
        publisher = cls.__new__(cls)
        publisher._begin(address, memory)
        return publisher

    def _begin(self, address: WeightsAddress, memory: Memory) -> None:
        self.address, self._memory = address, memory
        self._records = Records(address, memory.array)
        for numbers in self._records.numbers:
            if int(numbers[SEQUENCE]) % 2:  # a predecessor died while it wrote this one
                numbers[VERSION] = -1
                numbers[SEQUENCE] += 1
        self.version = max(int(numbers[VERSION]) for numbers in self._records.numbers)
        self.exposed_s = 0.0
        self._jobs: list[tuple[Mapping[str, Tensor], int, Tensor, Tensor]] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="flashrl-publisher", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the training loop
    def publish(
        self, weights: Mapping[str, Tensor], version: int, probe_tokens: Tensor, probe_logprobs: Tensor
    ) -> None:
        """Begin to copy a version. The weights must not change before :meth:`wait` has returned.

        Args:
            weights: by name, as at the start.
            version: higher than any before.
            probe_tokens: ``[L]`` int64 a fixed sequence, from 2 to 256 tokens.
            probe_logprobs: ``[L - 1]`` float32 its log-probs under these weights, for receivers to compare with.

        Raises:
            ConfigurationError: other weights than at the start, a version that is not new, a probe that is none, or a
                publisher that is closed.
        """
        self.wait()
        if self._is_over:
            raise ConfigurationError(f"version {version} after close(); publish before")
        if version <= self.version:
            raise ConfigurationError(f"version {version} after {self.version}; count up")
        if not 2 <= len(probe_tokens) <= MAX_PROBE or len(probe_logprobs) != len(probe_tokens) - 1:
            raise ConfigurationError(
                f"a probe of {len(probe_tokens)} tokens and {len(probe_logprobs)} log-probs; give 2 to {MAX_PROBE} "
                "tokens and one log-prob for each but the first"
            )
        for spec in self.address.weights:
            weight = weights.get(spec.name)
            if weight is None or tuple(weight.shape) != spec.shape or str(weight.dtype) != f"torch.{spec.dtype}":
                found = "missing" if weight is None else f"{list(weight.shape)} of {weight.dtype}"
                raise ConfigurationError(
                    f"weight {spec.name!r} is {found}, was {list(spec.shape)} of torch.{spec.dtype}; publish the same "
                    "model"
                )
        with self._changed:
            self._jobs.append((weights, version, probe_tokens, probe_logprobs))
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when weights may change: nothing is being copied.

        Raises:
            Exception: what the copy raised.
        """
        begin_s = clock.now_s()
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._is_over)
        self.exposed_s += clock.now_s() - begin_s
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop. Receivers keep what they have."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_over)
                if self._is_over:
                    return
                job = self._jobs[0]
            try:
                self._copy(*job)
            except Exception as error:  # noqa: BLE001 - raised in the training loop
                self._error = error
            with self._changed:
                self._jobs.clear()
                self._changed.notify_all()

    def _copy(self, weights: Mapping[str, Tensor], version: int, tokens: Tensor, logprobs: Tensor) -> None:
        buffer = (self.version + 1) % NUM_BUFFERS if self.version < 0 else 1 - self._newest()
        numbers = self._records.numbers[buffer]
        numbers[SEQUENCE] += 1  # odd: being written
        start = self.address.buffer_offset(buffer)
        array = self._memory.array[start : start + self.address.buffer_bytes]
        with torch.no_grad():
            for spec in self.address.weights:
                if spec.size_bytes:
                    target = torch.from_numpy(array[spec.offset : spec.offset + spec.size_bytes])
                    target.view(getattr(torch, spec.dtype)).view(spec.shape).copy_(weights[spec.name])
        self._records.probe_tokens[buffer][: len(tokens)] = tokens.cpu().numpy()
        self._records.probe_logprobs[buffer][: len(logprobs)] = logprobs.detach().float().cpu().numpy()
        numbers[PROBE_LENGTH] = len(tokens)
        numbers[CHECKSUM] = checksum(array)
        numbers[VERSION] = version
        numbers[SEQUENCE] += 1  # even: whole
        self.version = version

    def _newest(self) -> int:
        return max(range(NUM_BUFFERS), key=lambda buffer: int(self._records.numbers[buffer][VERSION]))


def _make(weights: Mapping[str, Tensor]) -> tuple[WeightsAddress, Memory]:
    """Make memory for weights."""
    specs, end = [], 0
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        specs.append(WeightSpec(name, str(weight.dtype).removeprefix("torch."), tuple(weight.shape), end, size))
        end = -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
    capacity = HEADER_BYTES * NUM_BUFFERS + NUM_BUFFERS * end
    memory, mark = make_memory(capacity)
    address = WeightsAddress(os.getpid(), memory.fd, capacity, mark, end, tuple(specs))
    for numbers in Records(address, memory.array).numbers:
        numbers[VERSION] = -1
    return address, memory


def keep(address: WeightsAddress) -> WeightsAddress:
    """Keep a publisher's memory when its process is gone, as long as this process lives. Returns where it is now.

    Raises:
        ConfigurationError: it cannot be mapped from here.
    """
    try:
        fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
        if os.pread(fd, MARK_BYTES, 0) != address.mark:
            os.close(fd)
            raise FileNotFoundError("another process has its number now")
    except OSError as error:
        raise ConfigurationError(f"the weights of process {address.pid} cannot be kept from here ({error})") from error
    return msgspec.structs.replace(address, pid=os.getpid(), fd=fd)


def let_go(address: WeightsAddress) -> None:
    """Keep the memory no longer that :func:`keep` has kept."""
    os.close(address.fd)


def checksum(array: Bytes) -> int:
    """Return a checksum of bytes; fast rather than safe against intent."""
    return zlib.adler32(array.data)
