"""The planner's rule as a table, and what holds of every plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flashrl.errors import NoDonorError
from lightning_flashrl.recovery.planner import plan_recovery
from lightning_flashrl.types import RankReport, RecoveryPlan, ResumeKind, ResumePoint

WORLD = "0"
MODEL = "1"
"""Two process groups: all ranks, and one a module made for itself."""


def point(seq: int, kind: ResumeKind = ResumeKind.COMMIT, **other_groups: int) -> ResumePoint:
    """A resume point before collective ``seq``; its batch is a tenth of that."""
    return ResumePoint(kind, batch=seq // 10, version=seq // 10, seqs={WORLD: seq, **other_groups}, buffer=seq % 2)


def survivor(global_rank: int, first_incomplete: int, version: int = 0, **other_groups: int) -> RankReport:
    return RankReport(
        global_rank, 1, False, first_incomplete={WORLD: first_incomplete, **other_groups}, version=version
    )


def newcomer(global_rank: int, *points: ResumePoint, journaled: int | None = None) -> RankReport:
    known = {} if journaled is None else {WORLD: journaled}
    return RankReport(global_rank, 1, True, journaled=known, resume_points=points)


def plan(*reports: RankReport, newest_checkpoint: str | None = None) -> RecoveryPlan:
    return plan_recovery(1, {report.global_rank: report for report in reports}, newest_checkpoint)


BEFORE, COMMIT, AFTER = (
    point(80, ResumeKind.BATCH_START),
    point(84, ResumeKind.COMMIT),
    point(89, ResumeKind.BATCH_END),
)


@pytest.mark.parametrize(
    ("reports", "redo_from", "entries", "donors", "reason"),
    [
        pytest.param(
            [survivor(0, 12), survivor(1, 9)],
            {WORLD: 9},
            {},
            {},
            "nobody was replaced",
            id="a link broke but nobody died: the slowest says what is redone",
        ),
        pytest.param(
            [survivor(0, 5), newcomer(1, journaled=3)],
            {WORLD: 3},
            {1: None},
            {},
            "rank(s) 1 died before training",
            id="death in set-up: the journal answers what was finished",
        ),
        pytest.param(
            [survivor(0, 0), newcomer(1)],
            {WORLD: 0},
            {1: None},
            {},
            "rank(s) 1 died before training",
            id="death before the first collective",
        ),
        pytest.param(
            [newcomer(0, journaled=4), newcomer(1, journaled=2)],
            {WORLD: 2},
            {0: None, 1: None},
            {},
            "rank(s) 0, 1 died before training",
            id="all died in set-up: the program starts anew",
        ),
        pytest.param(
            [survivor(0, 84, version=8), newcomer(1, COMMIT, BEFORE)],
            {WORLD: 84},
            {1: COMMIT},
            {1: 0},
            "rank 1 enters at commit of batch 8 with state of rank 0",
            id="death at the commit point, which the survivor reached",
        ),
        pytest.param(
            [survivor(0, 83, version=8), newcomer(1, COMMIT, BEFORE)],
            {WORLD: 80},
            {1: BEFORE},
            {1: 0},
            "rank 1 enters at batch_start of batch 8",
            id="death at the commit point, which the survivor had not reached",
        ),
        pytest.param(
            [survivor(0, 84), survivor(1, 89), newcomer(2, AFTER, COMMIT)],
            {WORLD: 84},
            {2: COMMIT},
            {2: 0},
            "rank 2 enters at commit of batch 8",
            id="death inside a barrier: one survivor left it, the other did not",
        ),
        pytest.param(
            [newcomer(0, AFTER, COMMIT), survivor(1, 95), survivor(2, 95)],
            {WORLD: 89},
            {0: AFTER},
            {0: 1},
            "rank 0 enters at batch_end of batch 8 with state of rank 1",
            id="rank 0 may die too",
        ),
        pytest.param(
            [newcomer(0, AFTER, COMMIT), survivor(1, 95), newcomer(2, COMMIT, BEFORE)],
            {WORLD: 84},
            {0: COMMIT, 2: COMMIT},
            {0: 1, 2: 1},
            "rank 0 enters at commit of batch 8 with state of rank 1; rank 2 enters at commit",
            id="two died apart: both enter at the newest point that both have",
        ),
        pytest.param(
            [newcomer(0, COMMIT), newcomer(1, COMMIT), survivor(2, 84), survivor(3, 84)],
            {WORLD: 84},
            {0: COMMIT, 1: COMMIT},
            {0: 2, 1: 3},
            "rank 1 enters at commit of batch 8 with state of rank 3",
            id="two died, two live: the sending is shared",
        ),
        pytest.param(
            [survivor(0, 85, **{MODEL: 4}), newcomer(1, point(84, **{MODEL: 5}), point(80, **{MODEL: 4}))],
            {WORLD: 80, MODEL: 4},
            {1: point(80, **{MODEL: 4})},
            {1: 0},
            "rank 1 enters at commit of batch 8",
            id="reached in one process group, not in the other",
        ),
    ],
)
def test_plans(
    reports: list[RankReport],
    redo_from: dict[str, int],
    entries: dict[int, ResumePoint | None],
    donors: dict[int, int],
    reason: str,
) -> None:
    decided = plan(*reports)
    assert (decided.redo_from, decided.entries, decided.donors) == (redo_from, entries, donors)
    assert reason in decided.reason


@pytest.mark.parametrize(
    ("reports", "lost"),
    [
        pytest.param([newcomer(0, COMMIT), newcomer(1, COMMIT)], (0, 1), id="everybody died while training"),
        pytest.param([survivor(0, 79, version=7), newcomer(1, COMMIT, BEFORE)], (1,), id="no point is reached by all"),
        pytest.param([newcomer(0, COMMIT), newcomer(1, AFTER), survivor(2, 90)], (0, 1), id="no point is common"),
        pytest.param([survivor(0, 84, version=8), newcomer(1)], (1,), id="trained, but the dead rank kept nothing"),
    ],
)
def test_nobody_has_the_state(reports: list[RankReport], lost: tuple[int, ...]) -> None:
    with pytest.raises(NoDonorError, match=r"runs/step=70\.ckpt") as caught:
        plan(*reports, newest_checkpoint="runs/step=70.ckpt")
    assert set(caught.value.lost) <= set(lost)


def _points(seqs: Sequence[int]) -> tuple[ResumePoint, ...]:
    return tuple(point(seq) for seq in sorted(seqs, reverse=True))


def _reports(max_ranks: int = 5) -> st.SearchStrategy[dict[int, RankReport]]:
    """Any mixture of survivors and newcomers; collectives are counted in one process group."""
    seq = st.integers(0, 12)
    report = st.one_of(
        st.builds(lambda first: survivor(0, first, version=first // 10), seq),
        st.builds(lambda seqs: newcomer(0, *_points(seqs)), st.sets(seq, min_size=1, max_size=4)),
        st.builds(lambda done: newcomer(0, journaled=done), seq),
    )
    return st.lists(report, min_size=1, max_size=max_ranks).map(
        lambda drawn: {rank: replace(one, global_rank=rank) for rank, one in enumerate(drawn)}
    )


def _limit(reports: Mapping[int, RankReport]) -> int:
    """The collective that all who cannot go back have reached."""
    positions = [r.first_incomplete[WORLD] for r in reports.values() if not r.is_newcomer]
    positions += [r.journaled[WORLD] for r in reports.values() if r.is_newcomer and not r.resume_points]
    return min(positions)


def _common_points(reports: Mapping[int, RankReport]) -> set[int]:
    """Collectives before which every newcomer that trained can enter and that everybody else has reached."""
    offered = [{p.seqs[WORLD] for p in r.resume_points} for r in reports.values() if r.resume_points]
    return {seq for seq in set.intersection(*offered) if seq <= _limit(reports)}


def _decide(reports: dict[int, RankReport]) -> RecoveryPlan | NoDonorError:
    try:
        return plan_recovery(1, reports)
    except NoDonorError as error:
        return error


everything = settings(max_examples=400, deadline=None)


@everything
@given(_reports())
def test_every_plan_can_be_carried_out(reports: dict[int, RankReport]) -> None:
    survivors = {rank for rank, r in reports.items() if not r.is_newcomer}
    decided = _decide(reports)
    if isinstance(decided, NoDonorError):
        assert set(decided.lost) <= reports.keys() - survivors
        return
    assert decided.entries.keys() == reports.keys() - survivors
    assert decided.redo_from.get(WORLD, 0) <= _limit(reports)
    assert decided.donors.keys() == {rank for rank, entry in decided.entries.items() if entry is not None}
    assert set(decided.donors.values()) <= survivors
    for rank, entry in decided.entries.items():
        if entry is None:
            assert not reports[rank].resume_points
            continue
        assert entry in reports[rank].resume_points
        assert all(entry.seqs[WORLD] <= reports[s].first_incomplete[WORLD] for s in survivors)
        assert decided.redo_from[WORLD] == entry.seqs[WORLD]
    assert len({entry.seqs[WORLD] for entry in decided.entries.values() if entry is not None}) <= 1
    for rank in decided.donors:
        assert f"rank {rank} enters" in decided.reason


@everything
@given(_reports())
def test_the_newest_possible_point_is_taken(reports: dict[int, RankReport]) -> None:
    survivors = [r for r in reports.values() if not r.is_newcomer]
    trained = [r for r in reports.values() if r.resume_points]
    if not trained:
        return
    if not survivors or not _common_points(reports):
        with pytest.raises(NoDonorError):
            plan_recovery(1, reports)
    else:
        assert plan_recovery(1, reports).redo_from == {WORLD: max(_common_points(reports))}


@everything
@given(_reports(), st.randoms(use_true_random=False))
def test_same_reports_same_plan_in_any_order_of_arrival(reports: dict[int, RankReport], random: Random) -> None:
    shuffled = list(reports.items())
    random.shuffle(shuffled)
    again, reordered = _decide(reports), _decide(dict(shuffled))
    if isinstance(again, NoDonorError):
        assert str(reordered) == str(again)
    else:
        assert reordered == again == _decide(reports)
