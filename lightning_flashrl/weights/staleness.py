"""How old may a row be when it is trained? Rollouts are paced so that none ever has to be thrown away.

A row that begins under policy version w must be trained by a step that starts from version w + s at the latest, where s
is ``max_staleness``: that step is its *deadline*. Two rules keep every deadline, whatever the rollouts' speeds:

* **Admission.** Rows that have begun and are not trained yet never exceed (s + 1) batches. So there is a step for each.
* **Selection.** A step takes rows as they become ready, the most urgent first, and only as long as all others can still
  meet their deadlines: for each step j, the rows due by then must fit into what is left of this batch and the batches
  up to j. Otherwise it waits for urgent rows.

A slow prompt is therefore waited for, at its deadline and not before; it is never starved and never discarded. With
s = 0 a step takes all rows of its batch, and the next ones begin after it: on-policy training.

A row here is whatever is trained as one: with prompt groups, a group.

Source: the capacity bound is that of AReaL (arXiv 2505.24298); deadlines make it hold for each row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from lightning_flashrl.errors import ConfigurationError, StalenessExceededError


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided, and why.

    Attributes:
        rows: those that the step takes now.
        reason: for the log and for tests.
    """

    rows: tuple[int, ...]
    reason: str


class GateState(msgspec.Struct, frozen=True):
    """What a gate must know to go on in another process.

    Attributes:
        version: the policy version that the current step starts from.
        taken: rows of the current step.
        began: version under which each row that is not trained yet began.
        max_seen: the largest staleness of a trained row so far.
        num_trained: rows that were trained.
    """

    version: int
    taken: list[int]
    began: dict[int, int]
    max_seen: int
    num_trained: int


class StalenessGate:
    """Which rollouts may begin, and which rows the current step trains.

    Args:
        max_staleness: s, in policy versions.
        batch_rows: rows of a global batch.

    Attributes:
        version: the policy version that the current step starts from.
        taken: rows of the current step, in the order in which it took them.
        max_seen: the largest staleness of a trained row so far.
        num_trained: rows that were trained.

    Raises:
        ConfigurationError: a negative bound or an empty batch.

    >>> gate = StalenessGate(max_staleness=1, batch_rows=2)
    >>> gate.room()
    4
    >>> gate.begin([1, 2, 3, 4])
    >>> gate.take([3, 4]).rows
    (3, 4)
    >>> gate.trained()
    >>> gate.begin([5, 6])
    >>> gate.take([5, 6])
    Decision(rows=(), reason='step 1 waits for 2 row(s) that are due by step 1 and not ready')
    """

    def __init__(self, max_staleness: int, batch_rows: int) -> None:
        if max_staleness < 0:
            raise ConfigurationError(f"weights.max_staleness={max_staleness}; use 0 or more")
        if batch_rows < 1:
            raise ConfigurationError(f"a global batch of {batch_rows} rows; use 1 or more")
        self.max_staleness = max_staleness
        self.batch_rows = batch_rows
        self.version = 0
        self.taken: list[int] = []
        self.max_seen = 0
        self.num_trained = 0
        self._began: dict[int, int] = {}  # row → version under which it began

    @property
    def num_open(self) -> int:
        """Rows that have begun and are not trained yet."""
        return len(self._began)

    @property
    def open_rows(self) -> tuple[int, ...]:
        """Rows that have begun and are not trained yet."""
        return tuple(self._began)

    @property
    def waiting(self) -> list[int]:
        """Rows that the current step has not taken, in the order in which they began."""
        return sorted(self._began.keys() - set(self.taken), key=lambda row: (self._began[row], row))

    # ------------------------------------------------------------------ admission
    def room(self) -> int:
        """Return how many rows may begin now."""
        return max(0, (self.max_staleness + 1) * self.batch_rows - len(self._began))

    def begin(self, rows: Iterable[int]) -> None:
        """Take note that rollouts of these rows begin, under the current version.

        Raises:
            StalenessExceededError: there is no room for them.
        """
        rows = list(rows)
        if len(set(rows) - self._began.keys()) > self.room():
            raise StalenessExceededError(self.version, self.max_staleness, len(rows), self.room())
        for row in rows:
            self._began.setdefault(row, self.version)  # a rollout that is done again keeps its deadline

    def drop(self, rows: Iterable[int]) -> None:
        """Take note that rows will never be trained: they failed."""
        for row in rows:
            if self._began.pop(row, None) is not None and row in self.taken:
                self.taken.remove(row)

    # ------------------------------------------------------------------ selection
    def take(self, ready: Iterable[int]) -> Decision:
        """Take rows for the current step: as many as are ready, fit in, and may go before the others.

        Args:
            ready: rows that are complete; those that the step has already are ignored.

        Returns:
            The rows that were taken by this call, the most urgent first.
        """
        in_step = set(self.taken)
        waiting = sorted(
            (row for row in ready if row in self._began and row not in in_step),
            key=lambda row: (self._began[row], row),
        )
        others = {row: began + self.max_staleness for row, began in self._began.items() if row not in in_step}
        taken: list[int] = []
        reason = ""
        for row in waiting:
            if len(self.taken) == self.batch_rows:
                break
            deadline = self._late(others, but=row)
            if deadline is not None:
                missing = sum(due <= deadline and other not in waiting for other, due in others.items())
                reason = f"step {self.version} waits for {missing} row(s) that are due by step {deadline} and not ready"
                break
            del others[row]
            self.taken.append(row)
            taken.append(row)
        reason = reason or f"step {self.version} has {len(self.taken)} of {self.batch_rows} row(s)"
        return Decision(tuple(taken), reason)

    def _late(self, deadlines: dict[int, int], but: int) -> int | None:
        """Return the first deadline that could not be met if the step took a row now."""
        left = self.batch_rows - len(self.taken) - 1
        due = sorted(deadline for row, deadline in deadlines.items() if row != but)
        for index, deadline in enumerate(due):
            if index + 1 > left + max(0, deadline - self.version) * self.batch_rows:
                return deadline
        return None

    def is_complete(self, *, is_last: bool = False) -> bool:
        """Whether the current step has all rows that it will get.

        Args:
            is_last: whether no more rows will begin, so that a smaller batch will do when nothing else is under way.
        """
        num_taken = len(self.taken)
        return num_taken == self.batch_rows or (is_last and 0 < num_taken == len(self._began))

    def trained(self) -> None:
        """Take note that the step has been committed: the version counts one up.

        Raises:
            StalenessExceededError: a row was older than the bound: an error of this package.
        """
        for row in self.taken:
            staleness = self.version - self._began.pop(row)
            if staleness > self.max_staleness:
                raise StalenessExceededError(self.version, self.max_staleness, 1, 0)
            self.max_seen = max(self.max_seen, staleness)
        self.num_trained += len(self.taken)
        self.taken.clear()
        self.version += 1

    # ------------------------------------------------------------------ recovery
    def state(self) -> GateState:
        """Return what :meth:`load` takes."""
        return GateState(self.version, list(self.taken), dict(self._began), self.max_seen, self.num_trained)

    def load(self, state: GateState) -> None:
        """Go on where another gate, of the same bound and batch, has stopped."""
        self.version, self.max_seen, self.num_trained = state.version, state.max_seen, state.num_trained
        self.taken[:] = state.taken
        self._began = dict(state.began)

    def began(self, row: int) -> int:
        """Return the version under which a row began that is not trained yet."""
        return self._began[row]

    def restored(self, version: int) -> None:
        """Go on from the version that a recovery restored.

        Rows that began under a later version began, as far as deadlines go, under this one: no burst is admitted, and
        nothing that is under way is lost. What the step in flight had taken it takes again.
        """
        self.version = version
        self.taken.clear()
        self._began = {row: min(began, version) for row, began in self._began.items()}
