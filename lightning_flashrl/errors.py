"""Every exception of the package, grouped by what its catcher does.

::

    FlashRLError
    ├── ConfigurationError (ValueError)      change a setting or an argument; never retried
    │   ├── UnknownFieldError
    │   └── UnknownTaskError
    ├── TransientError                       retry or plan again
    │   ├── RankLostError
    │   ├── RendezvousTimeoutError (TimeoutError)
    │   ├── QueueUnavailableError (ConnectionError)
    │   ├── LeaseLostError
    │   └── WouldBlock                       nothing was done; it may be possible later
    │       ├── LeaseTimeoutError (TimeoutError)
    │       └── QueueFullError (TimeoutError)
    ├── SampleError                          drop this sample, count it, go on
    │   ├── SchemaMismatchError (ValueError)
    │   ├── DuplicateRowError (ValueError)
    │   ├── UnknownRowError (LookupError)
    │   └── RewardError
    ├── FatalError                           stop the run, keep the evidence
    │   ├── JournalError
    │   ├── NoDonorError
    │   ├── RecoveryBudgetExhaustedError
    │   ├── ReplayMismatchError
    │   ├── SnapshotTooLargeError
    │   ├── StalenessExceededError
    │   ├── UserCodeError
    │   ├── WeightMismatchError
    │   └── WorkerFailedError
    ├── EndOfStream                          the normal end for who reads
    └── QueueClosedError                     a write after the end
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _listed(values: tuple[Any, ...], limit: int = 8) -> str:
    shown = ", ".join(map(str, values[:limit]))
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


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


class UnknownFieldError(ConfigurationError):
    """A field name that the schema does not have."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"unknown field {self.name!r}; the schema has {_listed(self.known)}"


class UnknownTaskError(ConfigurationError):
    """A task name that the queue was not made with."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"unknown task {self.name!r}; the queue was made with tasks={{{_listed(self.known)}}}"


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


class QueueUnavailableError(TransientError, ConnectionError):
    """The queue's server or one of its storage units does not answer."""

    def __init__(self, endpoint: str, waited_s: float, doing: str) -> None:
        super().__init__(endpoint, waited_s, doing)
        self.endpoint = endpoint
        self.waited_s = waited_s
        self.doing = doing

    def __str__(self) -> str:
        return (
            f"{self.endpoint} did not answer within {self.waited_s:g} s ({self.doing}); check that the process is "
            "alive, that this host reaches it, and that both have the same secret"
        )


class LeaseLostError(TransientError):
    """A lease is not (any more) the caller's: expired, over, or of somebody else. Its rows are with others now."""

    def __init__(self, lease_id: int, task: str, reason: str) -> None:
        super().__init__(lease_id, task, reason)
        self.lease_id = lease_id
        self.task = task
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"lease {self.lease_id:x} of task {self.task!r} {self.reason}; nothing was committed: lease again, and "
            "renew a lease (or raise lease_timeout_s) that is worked on for longer"
        )


class WouldBlock(TransientError):  # noqa: N818 - the name that anyio and trio users know
    """Not possible at this moment without waiting; nothing was done."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; try again later, or give timeout_s"


class LeaseTimeoutError(WouldBlock, TimeoutError):
    """The rows that were asked for did not become ready in time."""

    def __init__(self, task: str, timeout_s: float, num_ready: int, wanted: str) -> None:
        FlashRLError.__init__(self, task, timeout_s, num_ready, wanted)
        self.task = task
        self.timeout_s = timeout_s
        self.num_ready = num_ready
        self.wanted = wanted

    def __str__(self) -> str:
        return (
            f"task {self.task!r} waited {self.timeout_s:g} s for {self.wanted} and {self.num_ready} row(s) are ready; "
            "check that the fields it needs are written, or ask for fewer"
        )


class QueueFullError(WouldBlock, TimeoutError):
    """There was no room for new rows in time."""

    def __init__(self, timeout_s: float, num_rows: int, max_rows: int, num_bytes: int, max_bytes: int) -> None:
        FlashRLError.__init__(self, timeout_s, num_rows, max_rows, num_bytes, max_bytes)
        self.timeout_s = timeout_s
        self.num_rows = num_rows
        self.max_rows = max_rows
        self.num_bytes = num_bytes
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        max_rows, max_bytes = self.max_rows or "any number of", self.max_bytes or "any number of"
        return (
            f"no room for new rows within {self.timeout_s:g} s: {self.num_rows} of {max_rows} rows and "
            f"{self.num_bytes} of {max_bytes} bytes are taken; commit or clear rows, or raise max_rows and max_bytes"
        )


class SampleError(FlashRLError):
    """Something is wrong with these samples; the caller drops and counts them, and goes on."""


class SchemaMismatchError(SampleError, ValueError):
    """Data that is not what its field says. Nothing of the call was stored."""

    def __init__(self, field: str, fact: str, remedy: str) -> None:
        FlashRLError.__init__(self, field, fact, remedy)
        self.field = field
        self.fact = fact
        self.remedy = remedy

    def __str__(self) -> str:
        return f"field {self.field!r}: {self.fact}; {self.remedy}"


class DuplicateRowError(SampleError, ValueError):
    """A row twice in one call, or a field of a row that has been written before. Nothing of the call was stored."""

    def __init__(self, rows: tuple[int, ...], fact: str) -> None:
        FlashRLError.__init__(self, rows, fact)
        self.rows = rows
        self.fact = fact

    def __str__(self) -> str:
        return f"row(s) {_listed(self.rows)} {self.fact}; write each field of a row once"


class UnknownRowError(SampleError, LookupError):
    """Rows that were never put, or have been cleared. Nothing of the call was done."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        FlashRLError.__init__(self, rows)
        self.rows = rows

    def __str__(self) -> str:
        return (
            f"row(s) {_listed(self.rows)} are not in the queue: never put, or cleared; use the rows that put returned"
        )


class RewardError(SampleError):
    """A reward could not be computed for one completion.

    ``kind`` is ``"raised"``, ``"no number"``, ``"timeout"``, ``"crash"`` or ``"start"`` (no process for it).
    """

    def __init__(self, kind: str, row: Mapping[str, Any], text: str) -> None:
        super().__init__(kind, row, text)
        self.kind = kind
        self.row = row
        self.text = text

    def __str__(self) -> str:
        remedy = _REWARD_REMEDIES.get(self.kind, "mend the reward")
        return f"the reward of the row {_shortened(self.row)} failed ({self.kind}): {self.text}; {remedy}"


_REWARD_REMEDIES = {
    "raised": "let it return a number for any completion",
    "no number": "let it return a finite number for any completion",
    "timeout": "make it faster, or raise reward.timeout_s",
    "crash": "look at what it wrote to stderr, and how much memory it needs",
    "start": "look at what its module does when it is imported",
}


def _shortened(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


class EndOfStream(FlashRLError):  # noqa: N818 - the name that anyio and trio users know
    """There is nothing more for this consumer: the normal end."""

    def __init__(self, task: str, reason: str = "the queue is closed and all its rows are committed") -> None:
        super().__init__(task, reason)
        self.task = task
        self.reason = reason

    def __str__(self) -> str:
        return f"the stream of task {self.task!r} is over: {self.reason}"


class QueueClosedError(FlashRLError):
    """New rows were put after ``close()``."""

    def __str__(self) -> str:
        return "the queue is closed for new rows; close() it after the last put"


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


class StalenessExceededError(FatalError):
    """A row is, or would be, trained under too new a policy version: an invariant of this package broke."""

    def __init__(self, version: int, max_staleness: int, num_rows: int, room: int) -> None:
        super().__init__(version, max_staleness, num_rows, room)
        self.version = version
        self.max_staleness = max_staleness
        self.num_rows = num_rows
        self.room = room

    def __str__(self) -> str:
        return (
            f"{self.num_rows} row(s) exceed max_staleness={self.max_staleness} at policy version {self.version}, with "
            f"room for {self.room}; this is an error of lightning_flashrl, please report it"
        )


class JournalError(FatalError):
    """A queue's journal cannot be read or written. What could not be written did not happen."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"the journal {self.path} {self.reason}"


class WorkerFailedError(FatalError):
    """A process that serves the job raised an error, or died too often."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class WeightMismatchError(FatalError):
    """An engine took weights and does not compute with them."""

    def __init__(self, version: int, difference: float, tolerance: float) -> None:
        super().__init__(version, difference, tolerance)
        self.version = version
        self.difference = difference
        self.tolerance = tolerance

    def __str__(self) -> str:
        return (
            f"after loading version {self.version}, the engine's log-probs of the probe differ by "
            f"{self.difference:.3g} from the trainer's (tolerance {self.tolerance:g}): it computes with other weights "
            "than it was given; use another engine or version, or raise the tolerance if its arithmetic is coarser"
        )


class UserCodeError(FatalError):
    """The user's code raised on one rank; the job stops once and shows that rank's traceback."""

    def __init__(self, global_rank: int, traceback: str) -> None:
        super().__init__(global_rank, traceback)
        self.global_rank = global_rank
        self.traceback = traceback

    def __str__(self) -> str:
        return f"rank {self.global_rank} raised:\n{self.traceback}"
