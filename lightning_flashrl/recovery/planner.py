"""Reports of all ranks → who takes which part in a recovery. Pure: same reports, same plan.

The rule, and why it is right. Collectives of a process group are numbered in program order. A survivor never leaves
the collective in which it lost its peer; it keeps its own inputs of recent collectives and can contribute them again.
A replacement enters the program at a *resume point* its predecessor published and executes from there. So a resume
point is usable exactly when every survivor has finished all collectives before it: the replacement will take part in
every collective from there on, finished or not, and survivors contribute again what the replacement missed.

Source: FlashRecovery (arXiv 2509.03047) resumes at tag ``i`` or ``i + 1`` when all survivors agree; numbering
collectives instead of steps also decides the case in which they do not (a death inside the barrier).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_flashrl.errors import NoDonorError
from lightning_flashrl.types import RankReport, RecoveryPlan, ResumePoint


def _is_reached(point: ResumePoint, limit: Mapping[str, int]) -> bool:
    """Whether every collective before ``point`` is finished by those who set ``limit``."""
    return all(seq <= limit.get(group, seq) for group, seq in point.seqs.items())


def _minimum(positions: Iterable[Mapping[str, int]]) -> dict[str, int]:
    lowest: dict[str, int] = {}
    for position in positions:
        for group, seq in position.items():
            lowest[group] = min(seq, lowest.get(group, seq))
    return lowest


def plan_recovery(
    quorum_id: int, reports: Mapping[int, RankReport], newest_checkpoint: str | None = None
) -> RecoveryPlan:
    """Decide where each newcomer enters, who gives it state and which collectives are issued again.

    Args:
        quorum_id: the quorum to form.
        reports: one report of every rank of the job, survivors and newcomers, by global rank.
        newest_checkpoint: named in the error when nobody has the state.

    Raises:
        NoDonorError: training had begun and no survivor is left, or no resume point is reached by all survivors.

    Example:
        Rank 1 died in the all-reduce of batch 8; rank 0 waits in collective 41.

        >>> from lightning_flashrl.types import ResumeKind
        >>> before = ResumePoint(ResumeKind.COMMIT, batch=8, version=8, seqs={"0": 40}, buffer=0)
        >>> plan = plan_recovery(1, {
        ...     0: RankReport(0, 1, False, first_incomplete={"0": 41}, version=8),
        ...     1: RankReport(1, 1, True, resume_points=(before,)),
        ... })
        >>> plan.redo_from, plan.donors
        ({'0': 40}, {1: 0})
    """
    ordered = [reports[rank] for rank in sorted(reports)]
    survivors = [r for r in ordered if not r.is_newcomer]
    newcomers = [r for r in ordered if r.is_newcomer]
    if not newcomers:
        return RecoveryPlan(
            quorum_id,
            _minimum(r.first_incomplete for r in survivors),
            {},
            {},
            "nobody was replaced; pending collectives are redone",
        )
    if all(not r.resume_points for r in newcomers):
        redo = _minimum([*(r.first_incomplete for r in survivors), *(r.journaled for r in newcomers)])
        lost = ", ".join(str(r.global_rank) for r in newcomers)
        began = any(r.version > 0 for r in survivors)
        if began:
            raise NoDonorError(tuple(r.global_rank for r in newcomers), newest_checkpoint)
        return RecoveryPlan(
            quorum_id,
            redo,
            {r.global_rank: None for r in newcomers},
            {},
            f"rank(s) {lost} died before training and start anew",
        )
    if not survivors:
        raise NoDonorError(tuple(sorted(reports)), newest_checkpoint)
    return _enter_at_resume_points(quorum_id, survivors, newcomers, newest_checkpoint)


def _enter_at_resume_points(
    quorum_id: int, survivors: list[RankReport], newcomers: list[RankReport], newest_checkpoint: str | None
) -> RecoveryPlan:
    limit = _minimum(r.first_incomplete for r in survivors)
    without = [r for r in newcomers if not r.resume_points]
    limit = _minimum([limit, *(r.journaled for r in without)])
    entries: dict[int, ResumePoint | None] = {}
    while True:
        for report in newcomers:
            if not report.resume_points:
                entries[report.global_rank] = None
                continue
            usable = [p for p in report.resume_points if _is_reached(p, limit)]
            if not usable:
                raise NoDonorError((report.global_rank,), newest_checkpoint)
            entries[report.global_rank] = usable[0]
        points = [p for p in entries.values() if p is not None]
        lowered = _minimum([limit, *(p.seqs for p in points)])
        if lowered == limit or all(_is_reached(p, lowered) for p in points):
            limit = lowered
            break
        limit = lowered
    donors = {
        rank: survivors[index % len(survivors)].global_rank
        for index, (rank, point) in enumerate(sorted(entries.items()))
        if point is not None
    }
    told = "; ".join(
        f"rank {rank} enters at {point.kind.name.lower()} of batch {point.batch} with state of rank {donors[rank]}"
        for rank, point in sorted(entries.items())
        if point is not None
    )
    return RecoveryPlan(quorum_id, limit, entries, donors, told)
