"""What a step frees is there for the next step, and what a process on standby touched is there for its program."""

from __future__ import annotations

import os
import subprocess
import sys

PRELUDE = """
import ctypes, resource, sys
from lightning_flashrl.supervisor.allocator import WarmHeap, keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(800_000) for _ in range(100)]
    for block in blocks:
        ctypes.memset(block, 1, 800_000)
    for block in blocks:
        libc.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""
STEPS = """
if sys.argv[1] == "keep":
    print(keep_freed_memory())
for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""
STANDBY = """
from lightning_flashrl.supervisor.allocator import anonymous_bytes
heap = WarmHeap()
aim = anonymous_bytes("self") + int(sys.argv[1])
heap.grow_to(aim)
while heap.is_cold:
    heap.touch()
print(anonymous_bytes("self") - aim)
heap.grow_to(aim)
assert not heap.is_cold
heap.release()
keep_freed_memory()
before = faults()
step()
print(faults() - before)
"""


COPIES = """
import os
data = bytearray(64 << 20)
heap = WarmHeap()
read, write = os.pipe()
if os.fork() == 0:
    from lightning_flashrl.supervisor.allocator import anonymous_bytes
    heap.grow_to(anonymous_bytes("self") + int(sys.argv[1]))
    while heap.is_cold:
        heap.touch()
    before = faults()
    for place in range(0, len(data), 4096):
        data[place] = 1
    os.write(write, str(faults() - before).encode())
    os._exit(0)
os.wait()
assert data[0] == 0
print(os.read(read, 100).decode())
"""


def _run(program: str, argument: str, **environ: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PRELUDE + program, argument]
    return subprocess.run(command, env=kept | environ, capture_output=True, text=True, check=True).stdout.split()


def test_a_step_takes_no_memory_from_the_kernel_that_the_last_one_gave_back() -> None:
    (usual,) = _run(STEPS, "leave")
    is_set, kept = _run(STEPS, "keep")
    assert is_set == "True"
    assert int(usual) > 10_000, "an allocator that keeps memory by itself: is the setting still needed?"
    assert int(kept) < 100


def test_a_users_own_setting_stays() -> None:
    assert _run(STEPS, "keep", MALLOC_TRIM_THRESHOLD_="1048576")[0] == "False"


def test_a_first_step_finds_the_memory_that_was_touched_ahead_of_need() -> None:
    difference, faults = map(int, _run(STANDBY, str(100 << 20)))
    assert abs(difference) < 8 << 20
    assert faults < 100
    _, unprepared = map(int, _run(STANDBY, "0"))
    assert unprepared > 10_000


def test_a_forked_process_has_copies_of_its_own_before_it_writes() -> None:
    (shared,), (own,) = _run(COPIES, "0"), _run(COPIES, str(16 << 20))
    assert int(shared) > 10_000
    assert int(own) < 100
