"""What a step frees is there for the next step."""

from __future__ import annotations

import os
import subprocess
import sys

STEPS = """
import ctypes, resource, sys
from lightning_flashrl.strategies.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "keep":
    print(keep_freed_memory())
def step():
    blocks = [libc.malloc(800_000) for _ in range(100)]
    for block in blocks:
        ctypes.memset(block, 1, 800_000)
    for block in blocks:
        libc.free(block)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(what: str, **environ: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS, what]
    return subprocess.run(command, env=kept | environ, capture_output=True, text=True, check=True).stdout.split()


def test_a_step_takes_no_memory_from_the_kernel_that_the_last_one_gave_back() -> None:
    (usual,) = _run("leave")
    is_set, kept = _run("keep")
    assert is_set == "True"
    assert int(usual) > 10_000, "an allocator that keeps memory by itself: is the setting still needed?"
    assert int(kept) < 100


def test_a_users_own_setting_stays() -> None:
    assert _run("keep", MALLOC_TRIM_THRESHOLD_="1048576")[0] == "False"
