"""How many faults a job may have per time. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

DEFAULT_MAX_FAULTS = 100
DEFAULT_WINDOW_S = 3600.0


@dataclass(slots=True)
class FaultBudget:
    """Counts faults in a sliding window.

    >>> budget = FaultBudget(max_faults=1, window_s=10.0)
    >>> [budget.is_exhausted_by(now_s) for now_s in (0.0, 11.0, 12.0)]
    [False, False, True]
    """

    max_faults: int = DEFAULT_MAX_FAULTS
    window_s: float = DEFAULT_WINDOW_S
    _times_s: deque[float] = field(default_factory=deque)

    @property
    def num_faults(self) -> int:
        """Faults in the window that ended with the newest one."""
        return len(self._times_s)

    def is_exhausted_by(self, now_s: float) -> bool:
        """Count one fault and return whether it is one too many."""
        self._times_s.append(now_s)
        while now_s - self._times_s[0] > self.window_s:
            self._times_s.popleft()
        return len(self._times_s) > self.max_faults
