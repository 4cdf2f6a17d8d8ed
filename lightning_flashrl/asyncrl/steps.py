"""Which rows each training step gets, and when the next prompts begin: the queue's view of the staleness gate.

::

    Feeder ─ prompts, as many as the gate has room for ─▶ queue ─▶ rollouts ─▶ queue
                                                            │ complete prompt groups
    training loop ◀─ micro-batches of the current step ─ StepSampler ─ asks ─▶ StalenessGate

The sampler hands the micro-batches of a step to whichever data-parallel rank asks first, and tells each rank when the
step has no more: the stream of that step ends. The next step begins with :meth:`StepPlan.step_done`.

A lease is no promise to train: rows are committed with the step that they feed, all at once, when that step can no
longer be redone. Until then a replica that asks again for a micro-batch gets the same rows in the same order, and so
does its successor.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import msgspec
import numpy as np

from lightning_flashrl.errors import ConfigurationError, EndOfStream
from lightning_flashrl.streaming import Candidates, Demand, OldestFirst, Sampler
from lightning_flashrl.weights import StalenessGate
from lightning_flashrl.weights.staleness import GateState

UPDATE = "update"
"""The queue's task that trains."""
VALUES = "values"
CRITIC, CRITIC_UPDATE = "critic", "critic_update"
"""The queue's tasks that guess values, and that train the critic."""
GROUP = "prompt.group_id"
"""The field that says which prompt group a row belongs to."""
_REWARD = "reward"


class PlanState(msgspec.Struct, frozen=True):
    """What a plan must know to go on in another process.

    Attributes:
        gate: state of the gate.
        limit: groups to be trained in all; ``None`` for no limit.
        next_group: number of the next group that begins.
        num_begun: groups that have begun.
        awaited: groups that have begun and are not in the queue yet.
        first_rows: first row of each that is.
        shares: rows by task and step, with replica rank and number of the micro-batch.
        final_version: steps that start from earlier versions are final.
        has_ended: there are no more prompts.
        num_uninformative: rows that were replaced because their group had equal rewards.
        num_uninformative_in_a_row: those since a step last took a group.
    """

    gate: GateState
    limit: int | None
    next_group: int
    num_begun: int
    awaited: list[int]
    first_rows: dict[int, int]
    shares: dict[str, dict[int, list[tuple[int, int, list[int]]]]]
    final_version: int
    has_ended: bool
    num_uninformative: int
    num_uninformative_in_a_row: int


class StepPlan:
    """What feeder, sampler and training loop share. Everything here is called under :attr:`changed`.

    Args:
        gate: counts prompt groups.
        group_size: completions of a prompt.
        waits_for_all: whether a step begins only when it has all its groups (synchronous training).
        filters_uninformative: whether groups with equal rewards are replaced.
        limit: groups to be trained in all; ``None`` for no limit.
        redoes_steps: whether a replica that is gone has a successor, which does its part of the step again. Its rows
            wait for that; else they go to others, and a step is final when it is done.
        first_group: number of the first group.

    Attributes:
        changed: the lock, and the bell when there may be room.
        shares: rows by task, step, and replica rank with the number of its micro-batch; of steps that are not final.
        homes: step and share of each of these rows, by task.
        final_version: steps that start from earlier versions are final: they are never redone.
        next_group: number of the next group that begins.
        num_begun: groups that have begun.
        has_ended: there are no more prompts.
        num_uninformative: rows that were replaced because their group had equal rewards.
        num_uninformative_in_a_row: those since a step last took a group.
        num_failed_in_a_row: rows that were cleared before they were complete, since the last complete one.
        keep: is called after each change that :meth:`state` tells of, under :attr:`changed`.
    """

    def __init__(
        self,
        gate: StalenessGate,
        group_size: int,
        *,
        waits_for_all: bool,
        filters_uninformative: bool = False,
        limit: int | None = None,
        redoes_steps: bool = False,
        first_group: int = 0,
    ) -> None:
        self.gate = gate
        self.next_group = first_group
        self.num_begun = 0
        self._awaited: set[int] = set()  # groups that have begun and are not in the queue yet
        self._first_rows: dict[int, int] = {}  # … of those that are
        self.group_size = group_size
        self.redoes_steps = redoes_steps
        self.shares: dict[str, dict[int, dict[tuple[int, int], list[int]]]] = {}
        self.homes: dict[str, dict[int, tuple[int, tuple[int, int]]]] = {}
        self.final_version = gate.version
        self.waits_for_all = waits_for_all
        self.filters_uninformative = filters_uninformative and group_size > 1
        self.changed = threading.Condition(threading.RLock())
        self.limit = limit
        self.has_ended = False
        self.num_uninformative = 0
        self.num_uninformative_in_a_row = 0
        self.num_failed_in_a_row = 0
        self.keep: Callable[[], None] = lambda: None

    # ------------------------------------------------------------------ another process
    def state(self) -> PlanState:
        """Return what :meth:`load` takes."""
        with self.changed:
            shares = {
                task: {
                    step: [(rank, number, rows) for (rank, number), rows in shares.items()]
                    for step, shares in steps.items()
                }
                for task, steps in self.shares.items()
            }
            return PlanState(
                self.gate.state(),
                self.limit,
                self.next_group,
                self.num_begun,
                sorted(self._awaited),
                dict(self._first_rows),
                shares,
                self.final_version,
                self.has_ended,
                self.num_uninformative,
                self.num_uninformative_in_a_row,
            )

    def load(self, state: PlanState) -> None:
        """Go on where another plan, of the same settings, has stopped."""
        with self.changed:
            self.gate.load(state.gate)
            self.limit = state.limit
            self.next_group, self.num_begun = state.next_group, state.num_begun
            self._awaited, self._first_rows = set(state.awaited), dict(state.first_rows)
            self.final_version, self.has_ended = state.final_version, state.has_ended
            self.num_uninformative = state.num_uninformative
            self.num_uninformative_in_a_row = state.num_uninformative_in_a_row
            for task, steps in state.shares.items():
                for step, shares in steps.items():
                    for rank, number, rows in shares:
                        self.set_share(task, step, (rank, number), rows)

    def begin_anew(self, version: int, limit: int | None) -> None:
        """Go on from a checkpoint that this plan has been loaded from: no replica has any rows.

        Args:
            version: of the policy.
            limit: groups to be trained from now on; ``None`` for no limit.
        """
        with self.changed:
            for task, steps in self.shares.items():
                for step in [step for step in steps if step >= version]:
                    for rows in steps.pop(step).values():
                        for row in rows:
                            del self.homes[task][row]
            self.gate.restored(version)
            self.final_version = version
            self.limit = None if limit is None else limit + self.gate.num_trained
            self.has_ended = False
            self.num_begun = self.gate.num_open

    def set_share(self, task: str, step: int, share: tuple[int, int], rows: list[int]) -> None:
        """A replica gets rows as a micro-batch of a step."""
        self.shares.setdefault(task, {}).setdefault(step, {})[share] = rows
        self.homes.setdefault(task, {}).update(dict.fromkeys(rows, (step, share)))

    def settle(self, groups: Mapping[int, int], open_rows: Mapping[str, Set[int]]) -> None:
        """Take note of what was done after the last state was told, as the queue has it.

        Args:
            groups: prompt group of each row in the queue.
            open_rows: rows that each task which trains has not committed.
        """
        with self.changed:
            for row in sorted(groups):
                self.arrived(groups[row], row)
            for task, steps in self.shares.items():
                for shares in steps.values():
                    for share, rows in shares.items():
                        shares[share] = [row for row in rows if row in open_rows[task]]
                self.homes[task] = {row: home for row, home in self.homes[task].items() if row in open_rows[task]}
            members = self.members(groups, open_rows[UPDATE])
            self.gate.drop([group for group, rows in members.items() if not rows])

    def members(self, groups: Mapping[int, int], rows: Set[int]) -> dict[int, list[int]]:
        """Return the rows of each group that is not trained yet, without those of a group that came twice."""
        found: dict[int, list[int]] = {group: [] for group in self.gate.open_rows if group not in self._awaited}
        for row in rows:
            if groups[row] in found and self._has(groups[row], row):
                found[groups[row]].append(row)
        return found

    @property
    def is_last(self) -> bool:
        """Whether no more groups will begin."""
        return self.has_ended or self._num_left() == 0

    def room(self) -> int:
        """Return how many groups may begin now."""
        left = self._num_left()
        room = 0 if self.has_ended else self.gate.room()
        return room if left is None else min(room, left)

    def _num_left(self) -> int | None:
        """Groups that are neither trained nor under way; those that fail are replaced."""
        return None if self.limit is None else max(0, self.limit - self.gate.num_trained - self.gate.num_open)

    def begin(self, first_group: int, count: int) -> int:
        """Groups begin, whose prompts will be put next. To say so again changes nothing.

        Args:
            first_group: number of the first one: the next that has not begun.
            count: how many.

        Returns:
            The oldest policy version that may generate them.

        Raises:
            StalenessExceededError: there is no room for them.
            ConfigurationError: others should begin.
        """
        with self.changed:
            groups = range(first_group, first_group + count)
            if first_group != self.next_group:
                if not self._awaited.issuperset(groups):
                    raise ConfigurationError(f"group {first_group} begins, and should be {self.next_group}")
                return self.gate.began(first_group)
            self.gate.begin(groups)
            self._awaited.update(groups)
            self.next_group += count
            self.num_begun += count
            self.keep()
            return self.gate.version

    def arrived(self, group: int, row: int) -> bool:
        """Take note that a group is in the queue, from a row on; return whether these rows are those it has."""
        with self.changed:
            if group in self._awaited:
                self._awaited.discard(group)
                self._first_rows[group] = row
            return self._has(group, row)

    def _has(self, group: int, row: int) -> bool:
        first_row = self._first_rows.get(group)
        return first_row is not None and first_row <= row < first_row + self.group_size

    def resume(self) -> int:
        """Whoever gave prompts is gone: groups that did not arrive have not begun. Returns the next group's number."""
        with self.changed:
            self.gate.drop(self._awaited)
            self.num_begun -= len(self._awaited)
            self.next_group = min(self._awaited, default=self.next_group)
            self._awaited.clear()
            self.keep()
            return self.next_group

    def end_prompts(self) -> None:
        """There are no more prompts."""
        with self.changed:
            self.has_ended = True
            self.keep()
            self.changed.notify_all()

    def step_done(self, version: int) -> None:
        """A step is decided, and the next one begins. To say so again changes nothing.

        Args:
            version: of the policy after it.
        """
        with self.changed:
            if version > self.gate.version:
                self.gate.trained()
                is_open = set(self.gate.open_rows)
                self._first_rows = {group: row for group, row in self._first_rows.items() if group in is_open}
                if not self.redoes_steps:
                    self.final_version = version
                self.keep()
                self.changed.notify_all()

    def finalize(self, version: int) -> None:
        """No replica will redo a step that starts from an earlier version."""
        with self.changed:
            if version > self.final_version:
                self.final_version = version
                self.keep()

    def num_decided(self, task: str) -> int:
        """Return the rows of steps that are done, but not final."""
        with self.changed:
            return sum(
                len(rows)
                for version, shares in self.shares.get(task, {}).items()
                for rows in shares.values()
                if version < self.gate.version
            )

    def drop(self, group: int) -> None:
        """A group will never be trained; another one may begin."""
        self.gate.drop([group])
        self.keep()
        self.changed.notify_all()


class PromptSampler(OldestFirst):
    """Prompts for the rollouts, in the order in which they were put. A group that comes twice is stale.

    Args:
        plan: which groups have begun.
    """

    tags = (GROUP,)

    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        self._plan = plan
        self._newest_row = -1

    def __deepcopy__(self, _: dict[int, Any]) -> PromptSampler:
        return PromptSampler(self._plan)

    def add(self, candidates: Candidates) -> None:
        """Hold prompts that were put, or came back from a lease."""
        rows, groups = candidates.rows, candidates.tags[GROUP]
        is_new = rows > self._newest_row
        self._newest_row = max(self._newest_row, int(rows.max()))
        first_rows = {group: int(rows[groups == group].min()) for group in np.unique(groups[is_new]).tolist()}
        twice = [group for group, row in first_rows.items() if not self._plan.arrived(group, row)]
        if first_rows:
            with self._plan.changed:
                self._plan.keep()  # before rows of these groups are leased
        is_stale = is_new & np.isin(groups, twice)
        self._stale += rows[is_stale].tolist()
        kept = ~is_stale
        if kept.any():
            super().add(Candidates(rows[kept], candidates.num_tokens[kept], {GROUP: groups[kept]}))


class StepSampler(Sampler):
    """Micro-batches of whole prompt groups, step by step.

    Leases name the step in ``policy_version``, the number of the replica's ``micro_batch`` in it and a budget in
    ``tokens``. A group larger than the budget comes alone.
    On-policy (without staleness) groups come in the order in which they were put, so that a step has the same
    micro-batches whether it waits for all its rows or not.

    Args:
        plan: which groups the step gets.
        task: whose sampler it is.
        leads: whether it is this sampler that lets the step take groups. One that does not hands out the groups that
            another task's sampler let it take, as they become ready for its own task.
        commits_steps: whether rows are committed with their step. If not, consumers commit them.
    """

    tags = (GROUP, _REWARD)

    def __init__(self, plan: StepPlan, task: str = UPDATE, *, leads: bool = True, commits_steps: bool = True) -> None:
        super().__init__()
        self._plan = plan
        self._task = task
        self._leads = leads
        self._commits_steps = commits_steps
        self._returned: set[int] = set()  # rows of a share that nobody has leased now
        self._groups: dict[int, dict[int, tuple[int, float]]] = {}  # group → row → tokens and reward
        self._group_of: dict[int, int] = {}
        self._num_gone: dict[int, int] = {}  # rows of a group that will never come
        self._picked: collections.deque[int] = collections.deque()
        self._step = -1
        self._handed: set[int] = set()  # groups of the step that were handed out

    @property
    def _shares(self) -> dict[int, dict[tuple[int, int], list[int]]]:
        return self._plan.shares.setdefault(self._task, {})

    @property
    def _home(self) -> dict[int, tuple[int, tuple[int, int]]]:
        return self._plan.homes.setdefault(self._task, {})

    def __deepcopy__(self, _: dict[int, Any]) -> StepSampler:
        return StepSampler(self._plan, self._task, leads=self._leads, commits_steps=self._commits_steps)

    def __len__(self) -> int:
        return len(self._group_of) + len(self._returned)

    def check(self, demand: Demand) -> None:
        """Refuse leases that do not say which step they are for.

        Raises:
            ConfigurationError: no step, no number or no budget.
        """
        if demand.tokens is None or demand.policy_version is None or demand.micro_batch is None:
            raise ConfigurationError(
                f"task {self._task!r} hands out micro-batches of a step; give lease(tokens=..., policy_version=..., "
                "micro_batch=...)"
            )

    # ------------------------------------------------------------------ rows come and go
    def add(self, candidates: Candidates) -> None:
        """Hold rows that are complete, or came back from a lease. Those of no step of this plan are stale."""
        with self._plan.changed:
            known = set(self._plan.gate.open_rows)
            self._plan.num_failed_in_a_row = 0
            groups, rewards = candidates.tags[GROUP].tolist(), candidates.tags[_REWARD].tolist()
            for row, group, reward, tokens in zip(
                candidates.rows.tolist(), groups, rewards, candidates.num_tokens.tolist(), strict=True
            ):
                if self._goes_home(row):
                    continue
                if group not in known:
                    self._stale.append(row)
                    continue
                self._groups.setdefault(group, {})[row] = (tokens, reward)
                self._group_of[row] = group
                self._handed.discard(group)

    def _goes_home(self, row: int) -> bool:
        """Whether a row that came back from a lease still belongs to a replica's share."""
        if row not in self._home:
            return False
        step, share = self._home[row]
        if self._plan.redoes_steps or step < self._plan.gate.version:
            self._returned.add(row)
            return True
        for other in self._shares[step].pop(share, ()):
            del self._home[other]
        return False

    def discard(self, rows: Iterable[int]) -> None:
        """Let go of rows; those that are not held are ignored."""
        for row in rows:
            self._returned.discard(row)
            group = self._group_of.pop(row, None)
            if group is not None:
                del self._groups[group][row]

    def drop(self, candidates: Candidates) -> None:
        """Forget rows that will never be ready: their groups do not wait for them."""
        rows = candidates.rows.tolist()
        self.discard(rows)
        with self._plan.changed:
            for row in rows:
                if row in self._home:
                    step, share = self._home.pop(row)
                    self._shares[step][share].remove(row)
            if self._leads:
                self._plan.num_failed_in_a_row += len(candidates.rows)
            for group in candidates.tags[GROUP].tolist() if GROUP in candidates.tags else ():
                self._num_gone[group] = self._num_gone.get(group, 0) + 1
                if self._num_gone[group] >= self._plan.group_size:
                    self._forget(group)

    def _forget(self, group: int) -> None:
        self._groups.pop(group, None)
        self._num_gone.pop(group, None)
        if group in self._picked:
            self._picked.remove(group)
        self._plan.drop(group)

    # ------------------------------------------------------------------ micro-batches
    def take(self, demand: Demand) -> list[int]:
        """Hand out the next micro-batch of a step.

        Raises:
            EndOfStream: the step has no more, or no more prompts come.
        """
        assert demand.tokens is not None
        assert demand.policy_version is not None
        assert demand.micro_batch is not None
        plan, step, share = self._plan, demand.policy_version, (demand.replica_rank, demand.micro_batch)
        with plan.changed:
            gate = plan.gate
            # Nobody begins a step before all are through with the one before: that one is never redone.
            plan.finalize(min(step, gate.version))
            if rows := self._shares.get(step, {}).get(share):
                self._returned.difference_update(rows)
                return list(rows)
            if step > gate.version:
                return []
            if step < gate.version:
                raise EndOfStream(self._task, f"step {step} is over")
            if self._step != gate.version:
                self._step = gate.version
                self._handed.clear()
            self._pick()
            is_complete = gate.is_complete(is_last=plan.is_last) and self._has_all()
            if not self._picked:
                if is_complete:
                    raise EndOfStream(self._task, f"step {demand.policy_version} has no more rows")
                if plan.is_last and not gate.num_open:
                    raise EndOfStream(self._task, "no more prompts come")
                return []
            if plan.waits_for_all and not is_complete:
                return []
            rows = self._portion(demand.tokens, is_complete)
            if rows and self._commits_steps:
                plan.set_share(self._task, step, share, rows)
            if rows:
                plan.keep()
            return list(rows)

    def settle(self, groups: Mapping[int, int], open_rows: Set[int]) -> None:
        """Go on in another process, after the plan has.

        Args:
            groups: prompt group of each row in the queue.
            open_rows: rows that the task has not committed.
        """
        with self._plan.changed:
            for group, rows in self._plan.members(groups, open_rows).items():
                if len(rows) < self._plan.group_size:
                    self._num_gone[group] = self._plan.group_size - len(rows)
            self._step = self._plan.gate.version
            if self._leads:
                self._handed = set(self._plan.gate.taken) - self._groups.keys()
            else:
                self._handed = {groups[row] for rows in self._shares.get(self._step, {}).values() for row in rows}

    def take_done(self) -> list[int]:
        """Return the rows of steps that have become final since the last call."""
        done = []
        with self._plan.changed:
            for step in [step for step in self._shares if step < self._plan.final_version]:
                done += [row for rows in self._shares.pop(step).values() for row in rows]
        for row in done:
            del self._home[row]
        self._returned.difference_update(done)
        return done

    def _pick(self) -> None:
        """Let the step take groups that are whole."""
        plan = self._plan
        is_open = set(plan.gate.open_rows)
        self._num_gone = {group: count for group, count in self._num_gone.items() if group in is_open}
        whole = [group for group in self._groups if self._is_whole(group)]
        if plan.filters_uninformative and self._leads:
            whole = [group for group in whole if not self._is_filtered(group)]
        # Those that the step had taken before come back when their consumer died.
        again = [group for group in plan.gate.taken if group in whole and group not in self._picked]
        self._picked.extend(again)
        if not self._leads:
            return
        if plan.gate.max_staleness == 0:
            is_whole = set(whole)
            in_order = []
            for group in plan.gate.waiting:
                if group not in is_whole:
                    break
                in_order.append(group)
            whole = in_order
        taken = plan.gate.take(whole).rows
        if taken:
            plan.num_uninformative_in_a_row = 0
        self._picked.extend(taken)

    def _has_all(self) -> bool:
        """Whether all groups that the step has taken are here, or were handed out."""
        return self._handed.union(self._picked).issuperset(self._plan.gate.taken)

    def _is_whole(self, group: int) -> bool:
        rows = self._groups[group]
        return bool(rows) and len(rows) + self._num_gone.get(group, 0) >= self._plan.group_size

    def _is_filtered(self, group: int) -> bool:
        """Whether a group teaches nothing; it is replaced then."""
        rows = self._groups[group]
        if group in self._plan.gate.taken or len({reward for _, reward in rows.values()}) > 1:
            return False
        self._plan.num_uninformative += len(rows)
        self._plan.num_uninformative_in_a_row += len(rows)
        self._stale += rows
        for row in rows:
            del self._group_of[row]
        self._forget(group)
        return True

    def _portion(self, tokens: int, is_complete: bool) -> list[int]:
        """Return the next groups that fill the budget; none if more might still fit in."""
        chosen: list[int] = []
        left = tokens
        for group in self._picked:
            size = sum(size for size, _ in self._groups[group].values())
            if chosen and size > left:
                break
            chosen.append(group)
            left -= size
        else:
            if not is_complete and left > 0:
                return []
        rows: list[int] = []
        for group in chosen:
            self._picked.popleft()
            self._handed.add(group)
            members = sorted(self._groups.pop(group))
            for row in members:
                del self._group_of[row]
            rows += members
        return rows
