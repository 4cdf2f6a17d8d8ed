"""Value types that cross folders: small, frozen, made in one place and consumed in one place."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Phase(enum.IntEnum):
    """Where in a step a rank is, in the order of a step.

    The update stands between ``OPTIMIZER_STEP`` and ``BATCH_END``: a tag of a later phase counts it.
    """

    SETUP = 0
    SANITY_CHECK = 1
    BATCH_START = 2
    FORWARD = 3
    BACKWARD = 4
    ALL_REDUCE = 5
    COMMIT = 6
    OPTIMIZER_STEP = 7
    BATCH_END = 8
    CHECKPOINT = 9
    VALIDATION = 10
    EPOCH_END = 11
    FIT_END = 12


@dataclass(frozen=True, slots=True, order=True)
class StepTag:
    """How far a rank got: optimizer steps committed before, and the phase of the step in flight.

    >>> StepTag(3, Phase.FORWARD) < StepTag(3, Phase.BACKWARD) < StepTag(4, Phase.FORWARD)
    True
    """

    global_step: int
    phase: Phase


class ResumeKind(enum.IntEnum):
    """Where a replacement may enter the training loop."""

    BATCH_START = 0
    """Before the batch is fetched; parameters are those of the step about to run."""
    COMMIT = 1
    """The batch's gradients are reduced everywhere; its update is part of the donor's state."""
    BATCH_END = 2
    """Before validation and epoch-end hooks."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A point of the program at which a rank published its rank-local state.

    Attributes:
        kind: where in the loop.
        batch: training batches this rank had begun over all epochs when it published.
        version: optimizer updates that the replicated state must contain to go on from here.
        seqs: collectives issued so far, by process-group id; the replacement's next collective has this number.
        buffer: which buffer of the slot holds the state.
    """

    kind: ResumeKind
    batch: int
    version: int
    seqs: dict[str, int]
    buffer: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank knows when its communicator broke (or when it has just been born).

    Attributes:
        global_rank: who reports.
        quorum_id: the quorum being formed.
        is_newcomer: whether it still needs a donor's state.
        first_incomplete: lowest collective not finished here, by process-group id (survivors), else the number of the
            next collective.
        journaled: for a newcomer without resume points, collectives whose results its predecessor kept.
        resume_points: where a newcomer could enter, newest first; empty when its predecessor never began to train.
        version: optimizer updates contained in this rank's replicated state.
    """

    global_rank: int
    quorum_id: int
    is_newcomer: bool
    first_incomplete: dict[str, int] = field(default_factory=dict)
    journaled: dict[str, int] = field(default_factory=dict)
    resume_points: tuple[ResumePoint, ...] = ()
    version: int = 0


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """Who takes which part in a recovery.

    Attributes:
        quorum_id: the quorum that this plan forms.
        redo_from: collectives from this number on are issued again by everyone, by process-group id.
        entries: the resume point of each newcomer; ``None`` means from the start of the program.
        donors: donor of each newcomer that enters at a resume point.
        reason: one readable sentence, for the log and for tests.
    """

    quorum_id: int
    redo_from: dict[str, int]
    entries: dict[int, ResumePoint | None]
    donors: dict[int, int]
    reason: str
