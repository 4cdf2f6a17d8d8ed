"""Every exception of the package, grouped by what its catcher does.

::

    FlashRLError
    ├── ConfigurationError (ValueError)      change a setting; never retried
    ├── TransientError                       retry or plan again
    │   ├── RankLostError
    │   └── RendezvousTimeoutError (TimeoutError)
    └── FatalError                           stop the run, keep the evidence
        ├── NoDonorError
        ├── RecoveryBudgetExhaustedError
        ├── ReplayMismatchError
        ├── SnapshotTooLargeError
        └── UserCodeError
"""

from __future__ import annotations

from typing import Any


class FlashRLError(Exception):
    """Root of every error that this package raises on purpose.

    Arguments are kept as attributes and the text is built in ``__str__``, so that each class survives pickling.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.args = args  # some built-in bases keep only two

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self.args)


class ConfigurationError(FlashRLError, ValueError):
    """A setting is wrong; the text names it, its value and what to set instead."""


class TransientError(FlashRLError):
    """The operation may succeed when it is tried again or planned anew."""


class RankLostError(TransientError):
    """A rank left the quorum while others waited for it."""

    def __init__(self, global_rank: int, reason: str) -> None:
        super().__init__(global_rank, reason)
        self.global_rank = global_rank
        self.reason = reason

    def __str__(self) -> str:
        return f"rank {self.global_rank} was lost ({self.reason}); survivors wait for its replacement"


class RendezvousTimeoutError(TransientError, TimeoutError):
    """Not all ranks of a quorum arrived in time."""

    def __init__(self, num_arrived: int, num_expected: int, timeout_s: float, endpoint: str) -> None:
        super().__init__(num_arrived, num_expected, timeout_s, endpoint)
        self.num_arrived = num_arrived
        self.num_expected = num_expected
        self.timeout_s = timeout_s
        self.endpoint = endpoint

    def __str__(self) -> str:
        return (
            f"{self.num_arrived} of {self.num_expected} ranks arrived within {self.timeout_s:g} s; check that the "
            f"missing hosts reach {self.endpoint}, or raise rendezvous_timeout_s"
        )


class FatalError(FlashRLError):
    """The run cannot go on; the evidence is kept and the text says what to do."""


class NoDonorError(FatalError):
    """No living rank holds a copy of the lost state."""

    def __init__(self, lost: tuple[int, ...], newest_checkpoint: str | None = None) -> None:
        super().__init__(lost, newest_checkpoint)
        self.lost = lost
        self.newest_checkpoint = newest_checkpoint

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.lost))
        if self.newest_checkpoint is None:
            remedy = (
                "no checkpoint was saved either; start again, or add ModelCheckpoint and FlashRecovery(fallback='last')"
            )
        else:
            remedy = (
                f"resume from the newest checkpoint {self.newest_checkpoint} with trainer.fit(ckpt_path=...), "
                "or let FlashRecovery(fallback='last') do it"
            )
        return f"no donor is left for rank(s) {ranks}: every copy of their state is lost; {remedy}"


class RecoveryBudgetExhaustedError(FatalError):
    """More faults than the budget allows within its window: a crash loop."""

    def __init__(self, num_faults: int, max_faults: int, window_s: float, newest_checkpoint: str | None = None) -> None:
        super().__init__(num_faults, max_faults, window_s, newest_checkpoint)
        self.num_faults = num_faults
        self.max_faults = max_faults
        self.window_s = window_s
        self.newest_checkpoint = newest_checkpoint

    def __str__(self) -> str:
        checkpoint = self.newest_checkpoint or "none was saved"
        return (
            f"{self.num_faults} faults within {self.window_s:g} s, the budget is {self.max_faults}; look at the logs "
            "of the lost ranks, raise --max-restarts if the machine is that unreliable "
            f"(newest checkpoint: {checkpoint})"
        )


class ReplayMismatchError(FatalError):
    """A replacement rank took another path through the program than the rank it replaces."""

    def __init__(self, seq: int, recorded: str, issued: str) -> None:
        super().__init__(seq, recorded, issued)
        self.seq = seq
        self.recorded = recorded
        self.issued = issued

    def __str__(self) -> str:
        return (
            f"collective {self.seq}: the lost rank called {self.recorded}, its replacement called {self.issued}; "
            "make the code before the first training step the same at every start (no time, no random path)"
        )


class SnapshotTooLargeError(FatalError):
    """The rank-local state of a step does not fit into its shared-memory slot."""

    def __init__(self, size_bytes: int, capacity_bytes: int) -> None:
        super().__init__(size_bytes, capacity_bytes)
        self.size_bytes = size_bytes
        self.capacity_bytes = capacity_bytes

    def __str__(self) -> str:
        return (
            f"the rank-local state has {self.size_bytes} bytes, its slot holds {self.capacity_bytes}; keep large "
            "tensors in parameters or optimizer state, or raise FLASHRL_SLOT_MB"
        )


class UserCodeError(FatalError):
    """The user's code raised on one rank; the job stops once and shows that rank's traceback."""

    def __init__(self, global_rank: int, traceback: str) -> None:
        super().__init__(global_rank, traceback)
        self.global_rank = global_rank
        self.traceback = traceback

    def __str__(self) -> str:
        return f"rank {self.global_rank} raised:\n{self.traceback}"
