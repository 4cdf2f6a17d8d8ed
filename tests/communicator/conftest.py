"""Several real processes that run one check of `member.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

_MEMBER = Path(__file__).parent / "member.py"
_TIMEOUT_S = 100


def run_members(check: str, size: int) -> None:
    """Run ``check`` in ``size`` processes and show the output of those that fail."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONFAULTHANDLER": "1"}
    members = [
        subprocess.Popen(
            [sys.executable, str(_MEMBER), check, str(rank), str(size), str(store.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    failures: list[str] = []
    try:
        for rank, member in enumerate(members):
            output, _ = member.communicate(timeout=_TIMEOUT_S)
            if member.returncode:
                failures.append(f"member {rank} ended with {member.returncode}:\n{output}")
                break
    except subprocess.TimeoutExpired:
        failures.append(f"member {rank} did not end within {_TIMEOUT_S} s")
    finally:
        for rank, member in enumerate(members):
            if member.poll() is None:
                member.kill()
                failures.append(f"member {rank}, killed:\n{member.communicate()[0]}")
            assert member.stdout is not None
            member.stdout.close()
    if failures:
        pytest.fail("\n".join(failures))
