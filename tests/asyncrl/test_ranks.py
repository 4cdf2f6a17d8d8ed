"""Data-parallel ranks share a step's rows, and end with the weights that one rank alone would have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

JOB = Path(__file__).parents[1] / "jobs" / "ppo.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _run(out: Path, num_ranks: int, strategy: str) -> dict[str, Any]:
    command = [sys.executable, str(JOB), str(out), str(num_ranks), strategy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "flash_ddp"])
def test_two_ranks_train_policy_and_critic_as_one_does(tmp_path: Path, strategy: str) -> None:
    one, two = _run(tmp_path / "one.pt", 1, "auto"), _run(tmp_path / "two.pt", 2, strategy)
    assert one["global_step"] == two["global_step"] == 3
    names = ("rollout", "reward", "reference", "critic", "critic_update", "update")
    assert one["tasks"] == two["tasks"] == dict.fromkeys(names, 3 * 8 * 2)
    first = {name: weight for name, weight in one["weights"].items() if name != "_policy_version"}
    assert any(name.startswith("critic_engine") for name in first)
    for name, weight in first.items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=1e-4)
