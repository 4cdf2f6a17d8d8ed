"""Ranks that are forked from an interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_rank_inherits_nothing_of_the_supervisor() -> None:
    program = Path(__file__).parent / "programs" / "forked.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == ["0", "1"]
    assert "flashrl-rank1" in done.stdout
    assert "flashrl-chronicle" not in done.stdout
