"""Several real processes that run one check of `member.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

_MEMBER = Path(__file__).parent / "member.py"
_TIMEOUT_S = 40


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
    outputs = [_output_of(member) for member in members]
    failures = [
        f"member {rank} ended with {member.returncode}:\n{output}"
        for rank, (member, output) in enumerate(zip(members, outputs, strict=True))
        if member.returncode
    ]
    if failures:
        pytest.fail("\n".join(failures))


def _output_of(member: subprocess.Popen[str]) -> str:
    try:
        return member.communicate(timeout=_TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        member.kill()
        return f"{member.communicate()[0]}\nstill running after {_TIMEOUT_S} s"
