"""Processes are watched by descriptor and die with their parent."""

from __future__ import annotations

import os
import select
import signal
import sys
import time

import pytest

from lightning_flashrl.procfs import process_state
from lightning_flashrl.supervisor.process import (
    ExitStatus,
    Process,
    become_subreaper,
    bury,
    children,
    die_with_parent,
    open_thread,
    reap_strangers,
    spawn,
)


def wait(process: Process) -> ExitStatus:
    select.select([process.pidfd], [], [], 10)
    status = process.poll()
    assert status is not None
    return status


@pytest.mark.parametrize(
    ("code", "text", "shell_code"),
    [
        ("raise SystemExit(3)", "exited with status 3 without a report", 3),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL", 137),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40", 168),
    ],
)
def test_the_end_of_a_process_is_told(code: str, text: str, shell_code: int) -> None:
    process = Process(spawn([sys.executable, "-c", code], dict(os.environ)))
    status = wait(process)
    assert (str(status), status.shell_code) == (text, shell_code)
    assert process.poll() == status
    process.send_signal(signal.SIGKILL)


_ENDS_WITH_MEMORY = """
import os, sys, threading, time
os.dup2(int(sys.argv[1]), 1)
thread = threading.Thread(target=time.sleep, args=(100,), daemon=True)
thread.start()
hoard = bytearray(b"x" * (1 << 28))
os.write(1, str(thread.native_id).encode())
time.sleep(0.2)
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("os.kill(os.getpid(), 9)", ExitStatus(9, is_signal=True)),
        ("os.abort()", ExitStatus(6, is_signal=True)),
        ("os._exit(3)", ExitStatus(3, is_signal=False)),
    ],
)
def test_the_end_of_a_process_is_told_before_its_memory_is_gone(code: str, status: ExitStatus) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", _ENDS_WITH_MEMORY, str(write), code]
    process = Process(spawn(command, dict(os.environ), (write,)))
    os.close(write)
    thread = open_thread(int(os.read(read, 20)))
    os.close(read)
    if thread is None:
        process.end()
        pytest.skip("this kernel has no descriptors for threads (Linux 6.9)")
    assert process.ending() is None
    select.select([thread], [], [], 10)
    os.close(thread)
    deadline = time.monotonic() + 5
    while (early := process.ending()) is None and process_state(process.pid) and time.monotonic() < deadline:
        time.sleep(0.0005)
    assert early == wait(process) == status


def test_a_stopped_process_is_seen() -> None:
    process = Process(spawn(["sleep", "100"], dict(os.environ)))
    assert process.poll() is None
    assert not process.is_stopped()
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while not process.is_stopped() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.is_stopped()
    process.send_signal(signal.SIGKILL)
    assert wait(process) == ExitStatus(9, is_signal=True)
    assert process_state(process.pid) is None


def test_what_a_process_leaves_behind_ends_with_it() -> None:
    become_subreaper()
    others = set(children())  # helpers of multiprocessing live as long as we do
    process = Process(spawn(["sh", "-c", "sleep 100 & sleep 100 & exit 0"], dict(os.environ)))
    select.select([process.pidfd], [], [], 10)
    assert bury(process.pid) == ExitStatus(0, is_signal=False)
    assert bury(process.pid) is None
    os.close(process.pidfd)
    deadline = time.monotonic() + 5
    while any(process_state(pid) != "Z" for pid in set(children()) - others) and time.monotonic() < deadline:
        time.sleep(0.001)
    reap_strangers(set())
    assert set(children()) <= others


def test_reaping_leaves_known_children_alone() -> None:
    process = Process(spawn(["true"], dict(os.environ)))
    select.select([process.pidfd], [], [], 10)
    reap_strangers({process.pid})
    assert wait(process) == ExitStatus(0, is_signal=False)


def test_a_child_dies_with_its_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        middle = os.getpid()
        if os.fork() == 0:
            die_with_parent(middle)
            os.write(write, str(os.getpid()).encode())
            time.sleep(100)
        time.sleep(100)
    child = int(os.read(read, 16))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while process_state(child) not in (None, "Z") and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process_state(child) in (None, "Z")
    reap_strangers(set())
    os.close(read)
    os.close(write)


def test_a_descriptor_is_inherited_only_by_the_one_process() -> None:
    read, write = os.pipe()
    process = Process(spawn([sys.executable, "-c", f"import os; os.write({write}, b'hi')"], dict(os.environ), (write,)))
    assert os.read(read, 8) == b"hi"
    assert not os.get_inheritable(write)
    assert wait(process) == ExitStatus(0, is_signal=False)
    os.close(read)
    os.close(write)


def test_no_such_process() -> None:
    with pytest.raises(ProcessLookupError):
        Process(2**22 - 1)
