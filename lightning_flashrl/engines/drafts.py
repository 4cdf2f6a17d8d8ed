"""Completions under way, in memory that outlives their worker: whoever gets their prompts next goes on with them.

A worker writes down a few times a second what its engine has produced, into memory without a name. Its fleet holds a
descriptor of that, also when the worker is gone, and says to each worker where those of the others are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import torch

from lightning_flashrl import clock
from lightning_flashrl.engines.base import Completion, Finish, Prompt, Sampling
from lightning_flashrl.engines.rollout.request import Request
from lightning_flashrl.messaging.memory import Bytes, attach_memory, make_memory

MAX_BOOKS = 4
"""Drafts of so many workers that are gone are kept."""
_KEEP_S = 0.1
_HEADER_BYTES = 64
_NOBODY = -1


@runtime_checkable
class Draftable(Protocol):
    """A rollout engine whose unfinished completions can be seen at any time."""

    sampling: Sampling

    def under_way(self) -> Iterable[Request]:
        """Requests that have begun and are not finished; only to be looked at."""


class DraftsAddress(msgspec.Struct, frozen=True):
    """Where a worker's drafts are.

    Attributes:
        pid: a process that holds the memory.
        fd: its descriptor there.
        num_places: completions that are under way together.
        max_tokens: tokens of each.
        mark: bytes at the memory's beginning.
    """

    pid: int
    fd: int
    num_places: int
    max_tokens: int
    mark: bytes

    @property
    def capacity_bytes(self) -> int:
        """Size of the memory."""
        return _HEADER_BYTES + self.num_places * (16 + 20 * self.max_tokens)


class Books(msgspec.Struct, frozen=True, tag=True):
    """Where the drafts are of all workers there are, and of the last that are gone."""

    addresses: list[DraftsAddress]


class _Book:
    """The drafts of one worker, seen through the memory: a line for each completion."""

    def __init__(self, address: DraftsAddress, memory: Bytes) -> None:
        count, longest = address.num_places, address.max_tokens
        at = _HEADER_BYTES

        def part(dtype: type[np.generic], width: int) -> np.ndarray:
            nonlocal at
            size = count * width * np.dtype(dtype).itemsize
            view = memory[at : at + size].view(dtype).reshape(count, width)
            at += size
            return view

        self.rows = part(np.int64, 1)[:, 0]
        self.lengths = part(np.int64, 1)[:, 0]
        self.tokens = part(np.int64, longest)
        self.versions = part(np.int64, longest)
        self.logprobs = part(np.float32, longest)

    def find(self, row: int) -> Completion | None:
        """Return what there is of a row, if there is anything."""
        for line in np.flatnonzero(self.rows == row).tolist():
            length = int(self.lengths[line])
            draft = Completion(
                row,
                torch.from_numpy(self.tokens[line, :length].copy()),
                torch.from_numpy(self.logprobs[line, :length].copy()),
                torch.from_numpy(self.versions[line, :length].copy()),
                Finish.INTERRUPTED,
            )
            if length and self.rows[line] == row:  # still: its worker may be there and have gone on to another row
                return draft
        return None


class Drafts:
    """What a worker has begun, and what others have.

    Args:
        sampling: of its engine.
        num_places: completions that are under way together.
        may_mix: whether a completion may be of several policy versions; else it is only gone on with under its own.

    Attributes:
        address: of the memory, in this process.
    """

    def __init__(self, sampling: Sampling, num_places: int, *, may_mix: bool) -> None:
        self._longest = sampling.max_new_tokens
        self._may_mix = may_mix
        capacity = DraftsAddress(0, 0, num_places, self._longest, b"").capacity_bytes
        self._memory, mark = make_memory(capacity)
        self.address = DraftsAddress(0, self._memory.fd, num_places, self._longest, mark)
        self._book = _Book(self.address, self._memory.array)
        self._book.rows[:] = _NOBODY
        self._lines: dict[int, int] = {}  # row → line
        self._free = list(range(num_places))
        self._kept_s = clock.now_s()
        self._others: dict[bytes, _Book] = {}  # by their marks

    def keep(self, engine: Draftable) -> None:
        """Write down what an engine has produced, unless that was done just now."""
        now_s = clock.now_s()
        if now_s < self._kept_s + _KEEP_S:
            return
        self._kept_s = now_s
        book, ended = self._book, set(self._lines)
        for request in engine.under_way():
            row, end = request.prompt.request_id, len(request.tokens)
            ended.discard(row)
            line = self._lines.get(row)
            if line is None:
                if not self._free:
                    continue
                line = self._lines[row] = self._free.pop()
                book.lengths[line] = 0
                book.rows[line] = row
            begin = int(book.lengths[line])
            book.tokens[line, begin:end] = request.tokens[begin:]
            book.versions[line, begin:end] = request.versions[begin:]
            book.logprobs[line, begin:end] = request.logprobs[begin:]
            book.lengths[line] = end  # last: a worker that dies before this leaves what there was
        for row in ended:
            line = self._lines.pop(row)
            book.rows[line] = _NOBODY
            self._free.append(line)

    def learn(self, addresses: Sequence[DraftsAddress]) -> None:
        """Look into the drafts of these workers too. It may be called by another thread.

        What cannot be read any more is left out. Of those known before and not among these, only the last are kept:
        whoever says so may be new, and not know of workers that are gone.
        """
        named = {address.mark for address in addresses}
        others = dict([(mark, book) for mark, book in self._others.items() if mark not in named][-MAX_BOOKS:])
        for address in addresses:
            book = self._others.get(address.mark)
            if book is None and address.mark != self.address.mark:
                with contextlib.suppress(OSError):
                    memory = attach_memory(address.pid, address.fd, address.capacity_bytes, address.mark)
                    book = _Book(address, memory.array)
            if book is not None:
                others[address.mark] = book
        self._others = others

    def begun(self, prompt: Prompt, min_version: int, version: int) -> Prompt:
        """Return a prompt, with what somebody has begun of it if that may be gone on with.

        Args:
            prompt: the prompt.
            min_version: no older policy may generate it.
            version: the policy version that goes on.
        """
        longest: Completion | None = None
        for book in self._others.values():
            draft = book.find(prompt.request_id)
            if draft is None:
                continue
            oldest, num_tokens = int(draft.versions.min()), len(draft.tokens)
            is_one = oldest == int(draft.versions.max()) == version
            if num_tokens < self._longest and oldest >= min_version and (self._may_mix or is_one):
                longest = draft if longest is None or num_tokens > len(longest.tokens) else longest
        return prompt if longest is None else Prompt(prompt.request_id, prompt.tokens, prompt.seed, longest)

    def close(self) -> None:
        """Let go of the memory; the fleet still has it."""
        self._memory.close()
