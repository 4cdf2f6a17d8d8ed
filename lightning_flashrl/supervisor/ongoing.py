"""A recovery under way: who is missing, what has arrived, how long it took. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_flashrl import clock
from lightning_flashrl.supervisor.protocol import LostRank, RecoveryRecord
from lightning_flashrl.types import RankReport, RecoveryPlan


@dataclass(slots=True)
class OngoingRecovery:
    """Everything the controller keeps of one recovery.

    Attributes:
        quorum_id: the quorum being formed.
        lost: ranks that are being replaced.
        began_ns: when the quorum was announced.
        timings_ms: the longest time of each stage so far.
        plan: set when all reports are in.
        reports: what ranks reported.
        restored: ranks that are through.
        is_overdue: whether the user was told that it takes long.
    """

    quorum_id: int
    lost: dict[int, LostRank]
    began_ns: int
    timings_ms: dict[str, float] = field(default_factory=dict)
    plan: RecoveryPlan | None = None
    reports: dict[int, RankReport] = field(default_factory=dict)
    restored: set[int] = field(default_factory=set)
    is_overdue: bool = False

    def note(self, timings_ms: dict[str, float]) -> None:
        """Keep the longest time of each stage."""
        for stage, duration_ms in timings_ms.items():
            self.timings_ms[stage] = max(duration_ms, self.timings_ms.get(stage, 0.0))

    def unrestored(self) -> dict[int, LostRank]:
        """Ranks that are still on their way."""
        return {rank: who for rank, who in self.lost.items() if rank not in self.restored}

    def describe_missing(self, world_size: int) -> str:
        """Say whom everybody waits for."""
        done = self.reports.keys() if self.plan is None else self.restored
        what = "report" if self.plan is None else "end of the restore"
        missing = [rank for rank in range(world_size) if rank not in done]
        more = " …" if len(missing) > 16 else ""
        return f"the {what} of rank(s) {', '.join(map(str, missing[:16]))}{more}"

    def record(self, now_ns: int, *, is_complete: bool) -> RecoveryRecord:
        """Close the books."""
        self.note({"total": (now_ns - self.began_ns) / 1e6})
        plan = self.plan
        return RecoveryRecord(
            quorum_id=self.quorum_id,
            lost=tuple(sorted(self.lost)),
            reasons={rank: lost.reason for rank, lost in sorted(self.lost.items())},
            donors={} if plan is None else plan.donors,
            plan_reason="" if plan is None else plan.reason,
            timings_ms={stage: round(duration_ms, 3) for stage, duration_ms in self.timings_ms.items()},
            is_complete=is_complete,
            wall_s=clock.wall_s(),
        )


def describe(record: RecoveryRecord) -> str:
    """Put a recovery into one line."""
    who = ", ".join(map(str, record.lost))
    if not record.is_complete:
        return f"quorum {record.quorum_id} was overtaken by a further fault before rank(s) {who} were back"
    stages = " · ".join(
        f"{stage} {duration_ms:.0f}" for stage, duration_ms in record.timings_ms.items() if stage != "total"
    )
    total_ms = record.timings_ms["total"]
    return (
        f"rank(s) {who} back after {total_ms:.0f} ms (quorum {record.quorum_id}): {record.plan_reason} [ms: {stages}]"
    )
