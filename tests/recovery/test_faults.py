"""Faults on purpose: their lines, when they strike, and what they do to a process."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.recovery.faults import Fault, FaultTrigger, How
from lightning_flashrl.types import Phase, StepTag


@given(
    rank=st.integers(0, 10_000),
    step=st.integers(0, 10**9),
    phase=st.sampled_from(Phase),
    how=st.sampled_from(How),
    count=st.integers(1, 100),
)
def test_a_fault_is_one_line_and_the_line_is_the_fault(
    rank: int, step: int, phase: Phase, how: How, count: int
) -> None:
    fault = Fault(rank, StepTag(step, phase), how, count)
    assert Fault.parse(str(fault)) == fault


def test_what_is_left_out_is_a_kill_in_the_first_forward_pass() -> None:
    assert Fault.parse("kill rank=1 step=3") == Fault(1, StepTag(3, Phase.FORWARD), How.KILL, 1)
    assert Fault.parse("  KILL   step=3 rank=1 phase=Backward ") == Fault(1, StepTag(3, Phase.BACKWARD))


@pytest.mark.parametrize(
    "text",
    [
        *("", "kill", "kill rank=1", "kill step=3", "murder rank=1 step=3", "kill rank=one step=3"),
        *("kill rank=1 step=3 phase=x", "kill rank=1 step=3 backward", "kill rank=1 step=3 count="),
        "kill rank=1 step=3 when=now",
    ],
)
def test_a_line_that_cannot_be_read_is_shown_with_what_may_stand_in_it(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Fault.parse(text)
    assert repr(text) in str(caught.value)
    assert "gil" in str(caught.value)
    assert "epoch_end" in str(caught.value)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match="unknown setting 'node'"):
        Fault.parse("kill node=1 rank=1 step=3")


def test_a_fault_strikes_at_its_passage_and_once() -> None:
    fault = Fault.parse("kill rank=1 step=3 phase=validation count=2")
    trigger = FaultTrigger([fault], rank=1, incarnation=0)
    here = StepTag(3, Phase.VALIDATION)
    assert trigger.at(StepTag(2, Phase.VALIDATION)) is None
    assert trigger.at(StepTag(3, Phase.BATCH_END)) is None
    assert [trigger.at(here) for _ in range(4)] == [None, fault, None, None]


def test_other_ranks_are_not_struck() -> None:
    trigger = FaultTrigger([Fault.parse("kill rank=1 step=3")], rank=0, incarnation=0)
    assert trigger.at(StepTag(3, Phase.FORWARD)) is None


def test_each_process_of_a_rank_gets_its_own_fault_in_the_order_of_the_steps() -> None:
    late, early = Fault.parse("kill rank=1 step=7"), Fault.parse("stop rank=1 step=3 phase=backward")
    faults = [late, Fault.parse("kill rank=0 step=5"), early]

    def struck(incarnation: int) -> list[Fault]:
        trigger = FaultTrigger(faults, 1, incarnation)
        tags = [StepTag(step, phase) for step in range(10) for phase in Phase]
        return [fault for tag in tags if (fault := trigger.at(tag)) is not None]

    assert [struck(incarnation) for incarnation in range(3)] == [[early], [late], []]


def _struck(how: How, before: str = "") -> subprocess.Popen[bytes]:
    script = f"from lightning_flashrl.recovery.faults import How\n{before}\nHow({how.value!r}).strike()"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("how", "status"), [(How.KILL, -signal.SIGKILL), (How.SEGFAULT, -signal.SIGSEGV), (How.EXIT, 1)], ids=str
)
def test_a_process_that_is_struck_ends(how: How, status: int) -> None:
    with _struck(how) as process:
        assert process.wait() == status


def test_a_process_that_is_stopped_exists_and_does_nothing() -> None:
    with _struck(How.STOP) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        process.kill()
    assert os.WIFSTOPPED(status)


_SPEAKING = """
import os, threading, time
def speak():
    while True:
        time.sleep(0.1)
        os.write(1, b"x")
os.write(1, b"x")
threading.Thread(target=speak, daemon=True).start()
"""


@pytest.mark.parametrize(("how", "is_running"), [(How.HANG, True), (How.GIL, False)])
def test_a_hang_leaves_or_takes_the_interpreter(how: How, is_running: bool) -> None:
    with _struck(how, _SPEAKING) as process:
        assert process.stdout is not None
        words = [_next_word(process.stdout.fileno(), 60)]
        words += [_next_word(process.stdout.fileno(), 60 if is_running else 1) for _ in range(4)]
        has_ended = process.poll() is not None
        process.kill()
    assert not has_ended
    assert words[0] == b"x"
    assert words[-1] == (b"x" if is_running else b"")


def _next_word(fd: int, timeout_s: float) -> bytes:
    is_said, _, _ = select.select([fd], [], [], timeout_s)
    return os.read(fd, 1) if is_said else b""
