"""Which ready rows a task gets next.

A sampler holds the rows that are ready for one task and hands them out. It never sees their data, only their numbers,
how many tokens they have, and the scalar fields it asks for in ``tags``. One of your own needs one method::

    class ShortestFirst(Sampler):
        def order(self, candidates):
            return candidates.num_tokens
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_flashrl.errors import ConfigurationError

_NUM_STALE_ENTRIES = 1024
"""Entries of rows that are gone, which a heap may hold before it is made anew."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that became ready for a task.

    Attributes:
        rows: ``[N]`` int64, ascending where they were put together.
        num_tokens: ``[N]`` int64, entries of the row's ragged fields that the task reads.
        tags: ``[N]`` each, the values of the scalar fields that the sampler named in ``tags``.
    """

    rows: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    tags: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a consumer asks for.

    Attributes:
        count: this many rows, or
        tokens: as many rows as fit into so many tokens; a longer row comes alone.
        allow_partial: whether what is ready will do, however little.
        is_last: no more rows will become ready, so that what is ready will have to do.
        replica_rank: which of the task's data-parallel replicas asks.
        policy_version: the version that the consumer will train, for samplers that look at staleness.
        micro_batch: how many micro-batches of this step the replica has asked for before, for samplers that give the
            same rows again to who asks again.
    """

    count: int | None = None
    tokens: int | None = None
    allow_partial: bool = False
    is_last: bool = False
    replica_rank: int = 0
    policy_version: int | None = None
    micro_batch: int | None = None

    @property
    def takes_less(self) -> bool:
        """Whether fewer rows than asked for are an answer."""
        return self.allow_partial or self.is_last

    def __str__(self) -> str:
        return f"{self.count} row(s)" if self.count is not None else f"{self.tokens} tokens"


@dataclass(slots=True)
class _Unit:
    """What is handed out as one: a row, or the rows of one prompt group."""

    rows: dict[int, int]  # row → tokens
    key: Any
    num_tokens: int
    is_offered: bool = False


class Sampler:
    """Oldest row first, or in the order that :meth:`order` gives; single rows or whole prompt groups.

    Args:
        group_size: rows of a prompt group. With more than one, a group is handed out whole, once it is complete.
        group_by: the scalar field that says which group a row belongs to. A number is used once: rows of it that were
            cleared are not waited for ever after.

    Raises:
        ConfigurationError: a group size below 1.

    >>> sampler = Sampler()
    >>> sampler.add(Candidates(np.array([7, 3, 5]), np.array([10, 20, 30])))
    >>> sampler.take(Demand(count=2)), len(sampler), sampler.take(Demand(count=2))
    ([3, 5], 1, [])
    """

    tags: tuple[str, ...] = ()
    """Scalar fields whose values :attr:`Candidates.tags` holds."""

    def __init__(self, *, group_size: int = 1, group_by: str = "group_id") -> None:
        if group_size < 1:
            raise ConfigurationError(f"group_size={group_size}; use 1 or more")
        self.group_size = group_size
        self.group_by = group_by
        if group_size > 1:
            self.tags = (*self.tags, group_by)
        self._units: dict[int, _Unit] = {}  # by group, or by row
        self._unit_of: dict[int, int] = {}
        self._heap: list[tuple[Any, int]] = []
        self._num_offered = 0
        self._offered_tokens = 0
        self._stale: list[int] = []
        self._num_dropped: dict[int, int] = {}  # rows by group that will never come

    # ------------------------------------------------------------------ what a sampler of one's own may override
    def order(self, candidates: Candidates) -> Iterable[Any]:
        """Return a sort key for each row; lowest first. A group takes the lowest key of its rows."""
        return candidates.rows

    def check(self, demand: Demand) -> None:
        """Refuse a demand that can never be met.

        Raises:
            ConfigurationError: it cannot.
        """
        if demand.count is not None and demand.count % self.group_size:
            raise ConfigurationError(
                f"count={demand.count} cuts a prompt group of {self.group_size}; use a multiple of the group size"
            )

    # ------------------------------------------------------------------ rows come and go
    def __len__(self) -> int:
        """Return how many rows are held, handed out ones not counted."""
        return len(self._unit_of)

    def add(self, candidates: Candidates) -> None:
        """Hold more rows: they became ready, or came back from a lease."""
        rows = candidates.rows.tolist()
        groups = candidates.tags[self.group_by].tolist() if self.group_size > 1 else rows
        keys = self.order(candidates)
        keys = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
        sizes = candidates.num_tokens.tolist()
        self._unit_of.update(zip(rows, groups, strict=True))
        if self.group_size == 1:
            for row, key, tokens in zip(rows, keys, sizes, strict=True):
                self._units[row] = _Unit({row: tokens}, key, tokens, True)
                heapq.heappush(self._heap, (key, row))
            self._num_offered += len(rows)
            self._offered_tokens += sum(sizes)
            return
        for row, group, key, tokens in zip(rows, groups, keys, sizes, strict=True):
            unit = self._units.get(group)
            if unit is None:
                unit = self._units[group] = _Unit({row: tokens}, key, tokens)
            else:
                unit.rows[row] = tokens
                unit.num_tokens += tokens
                if unit.is_offered:
                    self._num_offered += 1
                    self._offered_tokens += tokens
                if key < unit.key:
                    unit.key = key
                    if unit.is_offered:
                        heapq.heappush(self._heap, (key, group))
            self._offer_if_complete(group, unit)

    def discard(self, rows: Iterable[int]) -> None:
        """Let go of rows that the task got in another way; those that are not held are ignored."""
        for row in rows:
            group = self._unit_of.pop(row, None)
            if group is not None:
                unit = self._units[group]
                tokens = unit.rows.pop(row)
                unit.num_tokens -= tokens
                if unit.is_offered:
                    self._num_offered -= 1
                    self._offered_tokens -= tokens
                if not unit.rows:
                    del self._units[group]
        if len(self._heap) > 2 * len(self._units) + _NUM_STALE_ENTRIES:
            self._heap = [(unit.key, group) for group, unit in self._units.items() if unit.is_offered]
            heapq.heapify(self._heap)

    def drop(self, candidates: Candidates) -> None:
        """Forget rows that will never (again) be ready: their groups do not wait for them.

        Args:
            candidates: whether or not they are held; their tags, where they are known.
        """
        self.discard(candidates.rows.tolist())
        if self.group_size > 1 and self.group_by in candidates.tags:
            for group in candidates.tags[self.group_by].tolist():
                self._num_dropped[group] = self._num_dropped.get(group, 0) + 1
                unit = self._units.get(group)
                if unit is not None:
                    self._offer_if_complete(group, unit)

    def take(self, demand: Demand) -> list[int]:
        """Hand out rows, or return none if the demand cannot be met yet.

        Returns:
            Rows in the order in which they are to be used.

        Raises:
            EndOfStream: a sampler may end the stream of the consumer that asks.
        """
        if demand.is_last:
            self._offer_all()
        self._drop_stale(demand)
        if demand.count is not None:
            if self._num_offered < demand.count and not demand.takes_less:
                return []
            return self._take_count(demand.count)
        assert demand.tokens is not None
        return self._take_tokens(demand.tokens, demand.takes_less)

    def take_stale(self) -> list[int]:
        """Return the rows that were found too old since the last call; they have been forgotten."""
        stale, self._stale = self._stale, []
        return stale

    def take_done(self) -> list[int]:
        """Return rows that are done with, whoever has leased them, since the last call; they have been forgotten.

        For samplers that know when that is. Here it is consumers who commit.
        """
        return []

    # ------------------------------------------------------------------ inside
    def _offer_if_complete(self, group: int, unit: _Unit) -> None:
        if len(unit.rows) + self._num_dropped.get(group, 0) >= self.group_size:
            self._offer(group, unit)

    def _offer(self, group: int, unit: _Unit) -> None:
        if not unit.is_offered:
            unit.is_offered = True
            self._num_offered += len(unit.rows)
            self._offered_tokens += unit.num_tokens
            heapq.heappush(self._heap, (unit.key, group))

    def _offer_all(self) -> None:
        if self.group_size > 1:
            for group, unit in self._units.items():
                self._offer(group, unit)

    def _drop_stale(self, demand: Demand) -> None:
        """Nothing is ever too old for this sampler."""

    def _peek(self) -> tuple[int, _Unit] | None:
        """Return the next unit; entries of rows that are gone are skipped."""
        while self._heap:
            key, group = self._heap[0]
            unit = self._units.get(group)
            if unit is not None and unit.is_offered and unit.key == key:
                return group, unit
            heapq.heappop(self._heap)
        return None

    def _pop(self, group: int, unit: _Unit) -> list[int]:
        heapq.heappop(self._heap)
        del self._units[group]
        for row in unit.rows:
            del self._unit_of[row]
        self._num_offered -= len(unit.rows)
        self._offered_tokens -= unit.num_tokens
        return sorted(unit.rows) if self.group_size > 1 else list(unit.rows)

    def _take_count(self, count: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < count:
            following = self._peek()
            if following is None or len(rows) + len(following[1].rows) > count:
                break
            rows += self._pop(*following)
        return rows

    def _take_tokens(self, tokens: int, takes_less: bool) -> list[int]:
        if self._offered_tokens < tokens and not takes_less:
            return []
        rows: list[int] = []
        left = tokens
        while (following := self._peek()) is not None and (not rows or following[1].num_tokens <= left):
            left -= following[1].num_tokens
            rows += self._pop(*following)
        return rows


class OldestFirst(Sampler):
    """Rows in the order in which they were put."""

    def __init__(self) -> None:
        super().__init__()


class PromptGroups(Sampler):
    """Whole prompt groups, the oldest first.

    Args:
        group_size: rows of a prompt group.
        group_by: the scalar field that says which group a row belongs to.

    >>> sampler = PromptGroups(group_size=2)
    >>> one = lambda row, group: Candidates(np.array([row]), np.array([1]), {"group_id": np.array([group])})
    >>> sampler.add(one(0, 7)); sampler.add(one(1, 8)); sampler.add(one(2, 8))
    >>> sampler.take(Demand(count=2))
    [1, 2]
    """

    def __init__(self, group_size: int, group_by: str = "group_id") -> None:
        super().__init__(group_size=group_size, group_by=group_by)


class StalenessAware(Sampler):
    """The oldest policy version first, and never a row that would be trained with more staleness than the bound.

    Rows beyond the bound are dropped and counted. Admission paces rollouts so that this does not happen
    (:mod:`lightning_flashrl.weights.staleness`); this is the wall behind it.

    Args:
        max_staleness: trainer version − row version that is still trained.
        version_by: the scalar field with the policy version under which a row was sampled.
        group_size: rows of a prompt group; its oldest row counts.
        group_by: the scalar field that says which group a row belongs to.

    Raises:
        ConfigurationError: a negative bound.
    """

    def __init__(
        self, max_staleness: int, *, version_by: str = "policy_version", group_size: int = 1, group_by: str = "group_id"
    ) -> None:
        super().__init__(group_size=group_size, group_by=group_by)
        if max_staleness < 0:
            raise ConfigurationError(f"max_staleness={max_staleness}; use 0 or more")
        self.max_staleness = max_staleness
        self.version_by = version_by
        self.tags = (*self.tags, version_by)

    def order(self, candidates: Candidates) -> Iterable[Any]:
        """Oldest version first, then oldest row."""
        return list(zip(candidates.tags[self.version_by].tolist(), candidates.rows.tolist(), strict=True))

    def check(self, demand: Demand) -> None:
        """Refuse a demand without the version that will be trained."""
        super().check(demand)
        if demand.policy_version is None:
            raise ConfigurationError("this task's sampler bounds staleness; give lease(..., policy_version=...)")

    def _drop_stale(self, demand: Demand) -> None:
        assert demand.policy_version is not None
        oldest = demand.policy_version - self.max_staleness
        while (following := self._peek()) is not None and following[1].key[0] < oldest:
            self._stale += self._pop(*following)


class TokenBalanced(Sampler):
    """Global batches, split so that all data-parallel replicas get as many rows and nearly as many tokens.

    When rows for all replicas are ready (``num_replicas`` × count), they are divided with Karmarkar and Karp's largest
    differencing method, and each replica that asks gets its part.

    Args:
        num_replicas: data-parallel replicas that lease this task, each with its ``replica_rank``.
        group_size: rows of a prompt group; a group stays whole.
        group_by: the scalar field that says which group a row belongs to.

    Raises:
        ConfigurationError: fewer than one replica.

    Source: Karmarkar and Karp, The differencing method of set partitioning, 1982; AsyncFlow section 3 (load balancing).
    """

    def __init__(self, num_replicas: int, *, group_size: int = 1, group_by: str = "group_id") -> None:
        super().__init__(group_size=group_size, group_by=group_by)
        if num_replicas < 1:
            raise ConfigurationError(f"num_replicas={num_replicas}; use 1 or more")
        self.num_replicas = num_replicas
        self._parts: list[collections.deque[dict[int, int]]] = [collections.deque() for _ in range(num_replicas)]
        self._part_of: dict[int, dict[int, int]] = {}

    def check(self, demand: Demand) -> None:
        """Refuse replicas that do not exist, and budgets: parts of a global batch have as many rows as asked for."""
        super().check(demand)
        if demand.count is None:
            raise ConfigurationError("this task's sampler makes global batches of rows; give count, not tokens")
        if not 0 <= demand.replica_rank < self.num_replicas:
            raise ConfigurationError(
                f"replica_rank={demand.replica_rank} of {self.num_replicas}; use 0 to {self.num_replicas - 1}"
            )

    def __len__(self) -> int:
        return super().__len__() + len(self._part_of)

    def discard(self, rows: Iterable[int]) -> None:
        """Let go of rows, also of those already assigned to a replica."""
        rows = list(rows)
        for row in rows:
            part = self._part_of.pop(row, None)
            if part is not None:
                del part[row]
        super().discard(rows)

    def take(self, demand: Demand) -> list[int]:
        """Hand out the replica's part of the oldest global batch."""
        assert demand.count is not None
        mine = self._parts[demand.replica_rank]
        while mine and not mine[0]:
            mine.popleft()
        if not mine and not self._divide(demand):
            return []
        part = mine.popleft() if mine else {}
        for row in part:
            del self._part_of[row]
        return list(part)

    def _divide(self, demand: Demand) -> bool:
        assert demand.count is not None
        if demand.is_last:
            self._offer_all()
        wanted = demand.count * self.num_replicas
        if self._num_offered < wanted and not demand.takes_less:
            return False
        units: list[tuple[int, list[int], dict[int, int]]] = []
        num_rows = 0
        while (following := self._peek()) is not None and num_rows + len(following[1].rows) <= wanted:
            unit = following[1]
            num_rows += len(unit.rows)
            units.append((unit.num_tokens, self._pop(*following), unit.rows))
        parts = karmarkar_karp([tokens for tokens, _, _ in units], self.num_replicas)
        for replica, members in enumerate(parts):
            part = {row: units[index][2][row] for index in sorted(members) for row in units[index][1]}
            self._parts[replica].append(part)
            self._part_of.update(dict.fromkeys(part, part))
        return bool(units)


def karmarkar_karp(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Divide things into parts of equal number and nearly equal total size.

    Args:
        sizes: ``[N]``.
        num_parts: how many parts. If it does not divide N, some parts have one thing less.

    Returns:
        The indices in each part.

    >>> parts = karmarkar_karp([8, 7, 6, 5, 4, 2], 2)
    >>> [sum([8, 7, 6, 5, 4, 2][i] for i in part) for part in parts]
    [16, 16]
    """
    by_size = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    # A solution is num_parts (total, indices), largest total first; (−spread, serial) orders the heap.
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for serial, start in enumerate(range(0, len(sizes), num_parts)):
        chunk = [(sizes[index], [index]) for index in by_size[start : start + num_parts]]
        chunk += [(0, [])] * (num_parts - len(chunk))
        heap.append((chunk[-1][0] - chunk[0][0], serial, chunk))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, serial, wide = heapq.heappop(heap)
        _, _, narrow = heapq.heappop(heap)
        merged = [
            (total + other, [*members, *more])
            for (total, members), (other, more) in zip(wide, reversed(narrow), strict=True)
        ]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], serial, merged))
    return [members for _, members in heap[0][2]] if heap else [[] for _ in range(num_parts)]
