"""Shared memory that outlives its writer, also when the writer dies in the middle of a write."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from lightning_flashrl.errors import SnapshotTooLargeError
from lightning_flashrl.recovery.slot import RankSlot, RankState, Region, Word

REGION_BYTES = 1 << 16


@pytest.fixture
def slot() -> Iterator[RankSlot]:
    fd = RankSlot.create(3, REGION_BYTES)
    slot = RankSlot(fd, REGION_BYTES)
    yield slot
    slot.close()
    os.close(fd)


def test_a_slot_has_no_name_in_the_file_system(slot: RankSlot) -> None:
    assert os.readlink(f"/proc/self/fd/{slot.fd}") == "/memfd:flashrl-rank3 (deleted)"
    assert os.get_inheritable(slot.fd)


def test_what_is_written_is_read(slot: RankSlot) -> None:
    assert slot.read(Region.COMMIT_A) is None
    slot.write(Region.COMMIT_A, [b"abc", bytearray(b"de"), memoryview(b"f")])
    slot.write(Region.COMMIT_B, [b"other"])
    assert slot.read(Region.COMMIT_A) == b"abcdef"
    slot.clear(Region.COMMIT_A)
    assert slot.read(Region.COMMIT_A) is None
    assert slot.read(Region.COMMIT_B) == b"other"


def test_what_is_too_large_is_refused_and_nothing_half_stays(slot: RankSlot) -> None:
    slot.write(Region.STATIC, [b"old"])
    slot.write(Region.FILES, [b"x" * (REGION_BYTES - 16)])
    with pytest.raises(SnapshotTooLargeError, match="FLASHRL_SLOT_MB"):
        slot.write(Region.STATIC, [b"x" * (REGION_BYTES - 15)])
    assert slot.read(Region.STATIC) is None


def test_a_torn_write_is_not_read(slot: RankSlot) -> None:
    slot.write(Region.MID_A, [b"x" * 1000])
    start = os.sysconf("SC_PAGESIZE") + Region.MID_A * REGION_BYTES
    os.pwrite(slot.fd, b"y", start + 500)
    assert slot.read(Region.MID_A) is None
    os.pwrite(slot.fd, struct.pack("<Q", 1 << 40), start)
    assert slot.read(Region.MID_A) is None


def test_records_are_appended(slot: RankSlot) -> None:
    assert slot.records(Region.JOURNAL) == []
    for record in (b"one", b"", b"three"):
        slot.append(Region.JOURNAL, record)
    assert slot.records(Region.JOURNAL) == [b"one", b"", b"three"]
    with pytest.raises(SnapshotTooLargeError):
        slot.append(Region.JOURNAL, b"x" * REGION_BYTES)
    assert slot.records(Region.JOURNAL) == [b"one", b"", b"three"]


def test_a_damaged_record_ends_the_list(slot: RankSlot) -> None:
    for record in (b"one", b"two", b"three"):
        slot.append(Region.JOURNAL, record)
    start = os.sysconf("SC_PAGESIZE") + Region.JOURNAL * REGION_BYTES
    os.pwrite(slot.fd, b"X", start + 16 + 16 + 3 + 16)
    assert slot.records(Region.JOURNAL) == [b"one"]


def test_a_new_process_gets_the_published_state_but_not_the_heartbeat(slot: RankSlot) -> None:
    slot[Word.COMMITTED] = 5
    slot[Word.AWARE] = 1
    slot[Word.WAITING_SINCE_NS] = 9
    slot.beat_loop()
    slot.write(Region.INDEX_A, [b"state"])
    slot.begin_incarnation(77, 2)
    beat = slot.heartbeat()
    assert (beat.pid, beat.incarnation, beat.state) == (77, 2, RankState.STARTING)
    assert (beat.loop_beats, beat.waiting_since_ns, beat.is_aware) == (0, 0, False)
    assert beat.thread_beat_ns > 0
    assert slot[Word.COMMITTED] == 5
    assert slot.read(Region.INDEX_A) == b"state"


def test_a_reset_slot_is_empty_but_for_faults_that_struck(slot: RankSlot) -> None:
    slot[Word.COMMITTED] = 5
    slot.write(Region.INDEX_A, [b"state"])
    slot.append(Region.JOURNAL, b"record")
    slot.append(Region.STRUCK, b"kill rank=3 step=1 phase=forward")
    slot.reset()
    assert slot.records(Region.STRUCK) == [b"kill rank=3 step=1 phase=forward"]
    assert slot[Word.COMMITTED] == 0
    assert slot.read(Region.INDEX_A) is None
    assert slot.records(Region.JOURNAL) == []


def test_gaps_between_loop_beats_are_measured_unless_the_rank_waited(slot: RankSlot, monkeypatch) -> None:
    now = iter([10, 15, 115, 118])
    monkeypatch.setattr("lightning_flashrl.recovery.slot.clock.now_ns", lambda: next(now))
    slot.beat_loop()
    slot.beat_loop()
    assert slot[Word.LARGEST_GAP_NS] == 5
    slot[Word.WAITING_SINCE_NS] = 1
    slot.beat_loop()
    slot[Word.WAITING_SINCE_NS] = 0
    slot.beat_loop()
    assert slot[Word.LARGEST_GAP_NS] == 5
    assert slot.heartbeat().loop_beats == 4


def test_two_processes_see_the_same_memory(slot: RankSlot) -> None:
    pid = os.fork()
    if pid == 0:
        other = RankSlot(slot.fd, REGION_BYTES)
        other[Word.GLOBAL_STEP] = 42
        other.write(Region.COMMIT_A, [b"from the child"])
        os._exit(0)
    os.waitpid(pid, 0)
    assert slot.heartbeat().global_step == 42
    assert slot.read(Region.COMMIT_A) == b"from the child"
