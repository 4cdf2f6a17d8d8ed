"""How old may a row be when it is trained? Rollouts are paced so that none ever has to be thrown away.

A row that begins under policy version w must be trained by a step that starts from version w + s at the latest, where s
is ``max_staleness``: that step is its *deadline*. Two rules keep every deadline, whatever the rollouts' speeds:

* **Admission.** Rows that have begun and are not trained yet never exceed (s + 1) batches. So there is a step for each.
* **Selection.** A step takes the most urgent rows that are ready, and only if the rest can still meet their deadlines:
  for each later step j, the rows due by then must fit into the batches up to j. Otherwise it waits for urgent rows.

A slow prompt is therefore waited for, at its deadline and not before; it is never starved and never discarded. With
s = 0 a step waits for all rows of its batch, and the next ones begin after it: on-policy training.

Source: the capacity bound is that of AReaL (arXiv 2505.24298); deadlines make it hold for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_flashrl.errors import ConfigurationError, StalenessExceededError


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided, and why.

    Attributes:
        rows: those to train, or none.
        reason: for the log and for tests.
    """

    rows: tuple[int, ...]
    reason: str


class StalenessGate:
    """Which rollouts may begin, and which rows the next step trains.

    Args:
        max_staleness: s, in policy versions.
        batch_rows: rows of a global batch.

    Attributes:
        version: the policy version that the next step starts from.
        max_seen: the largest staleness of a trained row so far.

    Raises:
        ConfigurationError: a negative bound or an empty batch.

    >>> gate = StalenessGate(max_staleness=1, batch_rows=2)
    >>> gate.room()
    4
    >>> gate.begin([1, 2, 3, 4])
    >>> gate.select([3, 4]).rows
    (3, 4)
    >>> gate.trained((3, 4))
    >>> gate.begin([5, 6])
    >>> gate.select([5, 6])
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
        self.max_seen = 0
        self._began: dict[int, int] = {}  # row → version under which it began

    @property
    def num_open(self) -> int:
        """Rows that have begun and are not trained yet."""
        return len(self._began)

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
            self._began.pop(row, None)

    # ------------------------------------------------------------------ selection
    def select(self, ready: Sequence[int], *, is_last: bool = False) -> Decision:
        """Choose the rows of the next step.

        Args:
            ready: rows that are complete.
            is_last: whether no more rows will begin, so that a smaller batch will do when nothing is under way.

        Returns:
            A whole batch, the most urgent rows first, or no rows.
        """
        known = sorted((row for row in ready if row in self._began), key=lambda row: (self._began[row], row))
        chosen = known[: self.batch_rows]
        if len(chosen) < self.batch_rows and not (is_last and chosen and len(known) == len(self._began)):
            return Decision((), f"step {self.version} waits: {len(chosen)} of {self.batch_rows} row(s) are ready")
        taken = set(chosen)
        left = sorted(began + self.max_staleness for row, began in self._began.items() if row not in taken)
        for index, deadline in enumerate(left):
            # Rows 0 … index are due by `deadline`: they must fit into the batches after this step.
            num_late = index + 1 - max(0, deadline - self.version) * self.batch_rows
            if num_late > 0:
                return Decision(
                    (),
                    f"step {self.version} waits for {self._num_missing(known, deadline)} row(s) that are due by step "
                    f"{deadline} and not ready",
                )
        return Decision(tuple(chosen), f"step {self.version} trains its {len(chosen)} most urgent row(s)")

    def _num_missing(self, ready: Sequence[int], deadline: int) -> int:
        is_ready = set(ready)
        return sum(began + self.max_staleness <= deadline and row not in is_ready for row, began in self._began.items())

    def trained(self, rows: Iterable[int]) -> None:
        """Take note that a step has been committed: the version counts one up.

        Raises:
            StalenessExceededError: a row was older than the bound: an error of this package.
        """
        for row in rows:
            staleness = self.version - self._began.pop(row, self.version)
            if staleness > self.max_staleness:
                raise StalenessExceededError(self.version, self.max_staleness, 1, 0)
            self.max_seen = max(self.max_seen, staleness)
        self.version += 1

    # ------------------------------------------------------------------ recovery
    def restored(self, version: int) -> None:
        """Go on from the version that a recovery restored.

        Rows that began under a later version began, as far as deadlines go, under this one: no burst is admitted, and
        nothing that is under way is lost.
        """
        self.version = version
        self._began = {row: min(began, version) for row, began in self._began.items()}
