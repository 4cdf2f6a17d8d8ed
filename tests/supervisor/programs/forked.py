"""A job whose ranks are forked from this interpreter; they say what they have inherited."""

from __future__ import annotations

import os

from lightning_flashrl.supervisor.forked import ForkedJob


def program() -> None:
    folder = "/proc/self/fd"
    files = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder) if os.path.lexists(f"{folder}/{fd}")]
    print(f"rank {os.environ['RANK']} has {sorted(file for file in files if 'memfd' in file)}", flush=True)


if __name__ == "__main__":
    ForkedJob(program, 2).run()
