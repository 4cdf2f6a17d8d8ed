"""How much a region of a slot holds."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from lightning_flashrl.recovery.slot import RankSlot, Region
from lightning_flashrl.supervisor.environment import slot_region_bytes

MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_region_holds_a_quarter_of_the_machines_memory_in_whole_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHRL_SLOT_MB", raising=False)
    assert 0 <= MACHINE_BYTES // 4 - slot_region_bytes() < 1 << 20
    assert slot_region_bytes() % (1 << 20) == 0


def test_the_user_sets_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_SLOT_MB", "3")
    assert slot_region_bytes() == 3 << 20


def test_a_limit_on_files_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHRL_SLOT_MB", raising=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, limits[1]))
    try:
        assert slot_region_bytes() == 256 // (len(Region) + 1) << 20
        os.close(RankSlot.create(0, slot_region_bytes()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_slot_of_that_size_takes_no_memory_and_no_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHRL_SLOT_MB", raising=False)
    pid = os.fork()
    if pid == 0:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = taken + (4 << 30)  # less than a slot may hold
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        slots = [RankSlot(RankSlot.create(rank, 1 << 40), 1 << 40) for rank in range(16)]
        slots[3].write(Region.COMMIT_A, [b"content"], [(1 << 35, b"bulk")], 1 << 36)
        is_right = slots[3].read(Region.COMMIT_A) == b"content" and os.fstat(slots[4].fd).st_blocks == 0
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
