"""A resume point is written whole or not at all, and what is read back is what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lightning_flashrl.errors import SnapshotTooLargeError
from lightning_flashrl.recovery.bulk import BulkWriter, Snapshot, Written
from lightning_flashrl.recovery.slot import RankSlot
from lightning_flashrl.strategies.runtime import RecoveryRuntime
from lightning_flashrl.types import ResumeKind

REGION_BYTES = 1 << 16
TOO_MUCH = b"x" * REGION_BYTES


class Rank:
    """A runtime without a supervisor: it only publishes."""

    def __init__(self, slot: RankSlot) -> None:
        client = SimpleNamespace(
            slot=slot, global_rank=0, world_size=1, incarnation=0, is_newcomer=False, local_slots={0: slot},
            store_set=None, store_get=None,
        )  # fmt: skip
        self.slot = slot
        self.runtime = RecoveryRuntime(cast(Any, client), cast(Any, SimpleNamespace()), torch.device("cpu"), 1.0)
        self.writer = BulkWriter()
        self.tensor = torch.zeros(100)

    def publish(self, kind: ResumeKind, number: int, content: bytes = b"content", buffer: bytes = b"") -> None:
        self.tensor.fill_(number)
        written = {"tensor": Written(self.tensor, number)}
        buffers = [memoryview(buffer)]
        contents, end = self.writer.lay_out(written, buffers)

        def pieces(region: Any) -> Any:
            return self.writer.pieces(region, contents, written, buffers)

        self.runtime.publish(kind, number, number, Snapshot(b"schema", content, contents, end, pieces), {})

    def read(self) -> list[tuple[int, str, int, float]]:
        """(ordinal, kind, batch, value of the tensor) of all resume points, newest first."""
        found = []
        for published in RecoveryRuntime.read_published(self.slot):
            back = torch.empty(100)
            published.bulk.fill("tensor", back)
            assert (published.schema, published.content) == (b"schema", b"content")
            assert torch.equal(back, back[:1].expand(100))
            found.append((published.ordinal, published.point.kind.name, published.point.batch, back[0].item()))
        return found


@pytest.fixture
def rank() -> Iterator[Rank]:
    fd = RankSlot.create(0, REGION_BYTES)
    slot = RankSlot(fd, REGION_BYTES)
    yield Rank(slot)
    slot.close()
    os.close(fd)


def test_commits_and_other_points_alternate_between_two_buffers_each(rank: Rank) -> None:
    kinds = [ResumeKind.BATCH_START, ResumeKind.COMMIT, ResumeKind.COMMIT, ResumeKind.BATCH_END, ResumeKind.COMMIT]
    for number, kind in enumerate(kinds, 1):
        rank.publish(kind, number)
    assert rank.read() == [
        (5, "COMMIT", 5, 5.0),
        (4, "BATCH_END", 4, 4.0),
        (2, "COMMIT", 2, 2.0),
        (1, "BATCH_START", 1, 1.0),
    ]


@pytest.mark.parametrize("kind", [ResumeKind.COMMIT, ResumeKind.BATCH_START, ResumeKind.BATCH_END])
@pytest.mark.parametrize("too_large", [{"content": TOO_MUCH}, {"buffer": TOO_MUCH}], ids=["content", "bulk"])
@pytest.mark.parametrize("num_attempts", [1, 2, 3])
def test_attempts_that_do_not_fit_change_nothing(
    rank: Rank, kind: ResumeKind, too_large: dict[str, bytes], num_attempts: int
) -> None:
    points = [ResumeKind.BATCH_END, ResumeKind.BATCH_START, ResumeKind.COMMIT, ResumeKind.COMMIT]
    for number, point in enumerate(points, 1):
        rank.publish(point, number)
    before = rank.read()
    assert [ordinal for ordinal, *_ in before] == [4, 3, 2, 1]
    for _ in range(num_attempts):
        with pytest.raises(SnapshotTooLargeError):
            rank.publish(kind, 5, **too_large)
        assert rank.read() == before
    rank.publish(kind, 5)
    replaced = 3 if kind is ResumeKind.COMMIT else 1
    assert rank.read() == [(5, kind.name, 5, 5.0), *(point for point in before if point[0] != replaced)]
