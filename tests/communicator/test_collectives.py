from __future__ import annotations

from .conftest import run_members


def test_every_kind_of_collective_gives_the_same_bits_when_it_is_done_again() -> None:
    run_members("collectives", 2)
