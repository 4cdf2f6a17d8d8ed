"""Shared memory that outlives its writer, also when the writer dies in the middle of a write."""

from __future__ import annotations

import os
import signal
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


@pytest.mark.parametrize(
    ("size", "bulk_bytes", "named"),
    [(REGION_BYTES - 15, 0, REGION_BYTES - 15), (3, REGION_BYTES + 1, REGION_BYTES + 1)],
    ids=["content", "bulk"],
)
def test_what_is_too_large_is_refused_and_the_old_content_stays(
    slot: RankSlot, size: int, bulk_bytes: int, named: int
) -> None:
    slot.write(Region.MID_A, [b"old"], [(64, b"bulk")], 128)
    with pytest.raises(SnapshotTooLargeError, match=f"{named} bytes.*FLASHRL_SLOT_MB"):
        slot.write(Region.MID_A, [b"x" * size], [(64, b"lost")], bulk_bytes)
    assert slot.read(Region.MID_A) == b"old"
    assert _bulk(slot, Region.MID_A, 64, 4) == b"bulk"


def test_what_just_fits_is_taken(slot: RankSlot) -> None:
    slot.write(Region.MID_A, [b"x" * (REGION_BYTES - 16)], [(REGION_BYTES - 4, b"last")], REGION_BYTES)
    slot.write(Region.MID_B, [b"next"], [(0, b"first")], 5)
    assert slot.read(Region.MID_A) == b"x" * (REGION_BYTES - 16)
    assert _bulk(slot, Region.MID_A, REGION_BYTES - 4, 4) == b"last"


def test_pieces_of_the_bulk_that_are_not_written_stay(slot: RankSlot) -> None:
    slot.write(Region.COMMIT_A, [b"1"], [(0, b"aaaa"), (64, b"bbbb")], 68)
    slot.write(Region.COMMIT_B, [b"2"], [(0, b"cccc")], 68)
    slot.write(Region.COMMIT_A, [b"3"], [(64, b"dddd")], 68)
    assert [_bulk(slot, Region.COMMIT_A, offset, 4) for offset in (0, 64)] == [b"aaaa", b"dddd"]
    assert _bulk(slot, Region.COMMIT_B, 0, 4) == b"cccc"


def test_a_writer_that_dies_in_the_bulk_leaves_no_content(slot: RankSlot) -> None:
    def pieces() -> Iterator[tuple[int, bytes]]:
        yield 0, b"new"
        os.kill(os.getpid(), signal.SIGKILL)

    slot.write(Region.COMMIT_A, [b"old"], [(0, b"old")], 64)
    slot.write(Region.COMMIT_B, [b"other"], [(0, b"other")], 64)
    pid = os.fork()
    if pid == 0:
        slot.write(Region.COMMIT_A, [b"new"], pieces(), 64)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert _bulk(slot, Region.COMMIT_A, 0, 3) == b"new"
    assert slot.read(Region.COMMIT_A) is None
    assert (slot.read(Region.COMMIT_B), _bulk(slot, Region.COMMIT_B, 0, 5)) == (b"other", b"other")


def _bulk(slot: RankSlot, region: Region, offset: int, size: int) -> bytes:
    target = bytearray(size)
    slot.read_bulk(region, offset, memoryview(target))
    return bytes(target)


@pytest.fixture
def large_slot() -> Iterator[RankSlot]:
    """More than this machine has, of which nothing is used."""
    fd = RankSlot.create(0, 1 << 40)
    slot = RankSlot(fd, 1 << 40)
    yield slot
    slot.close()
    os.close(fd)


def _used_bytes(slot: RankSlot) -> int:
    return os.fstat(slot.fd).st_blocks * 512


def test_memory_is_used_for_what_is_written_only(large_slot: RankSlot) -> None:
    before = _used_bytes(large_slot)
    large_slot.write(Region.MID_B, [b"x" * 1_000_000], [(1 << 30, b"x" * 1_000_000)], 1 << 31)
    assert 2_000_000 <= _used_bytes(large_slot) - before < 2_100_000
    assert _bulk(large_slot, Region.MID_B, 1 << 30, 1_000_000) == b"x" * 1_000_000


def test_memory_that_is_not_needed_any_more_is_given_back(large_slot: RankSlot) -> None:
    large, small = b"x" * (8 << 20), b"y" * 5000
    for number in range(2 * RankSlot.NUM_RECENT_WRITES):
        content = large if number == 0 else small
        large_slot.write(Region.COMMIT_A, [content], [(0, content)], len(content))
    assert large_slot.read(Region.COMMIT_A) == small
    assert _bulk(large_slot, Region.COMMIT_A, 0, 5000) == small
    assert _used_bytes(large_slot) < 1 << 16


def test_memory_that_is_needed_now_and_then_is_kept(large_slot: RankSlot) -> None:
    large, small = b"x" * (8 << 20), b"y" * 5000
    for number in range(3 * RankSlot.NUM_RECENT_WRITES):
        large_slot.write(Region.COMMIT_A, [large if number % 8 == 0 else small])
    assert _used_bytes(large_slot) > 8 << 20


def test_a_reset_gives_all_memory_back(large_slot: RankSlot) -> None:
    large_slot.write(Region.COMMIT_A, [b"x" * (1 << 20)], [(0, b"x" * (1 << 20))], 1 << 20)
    large_slot.reset()
    assert _used_bytes(large_slot) <= os.sysconf("SC_PAGESIZE")
    assert large_slot.read(Region.COMMIT_A) is None
    large_slot.write(Region.COMMIT_A, [b"again"])
    assert large_slot.read(Region.COMMIT_A) == b"again"


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
