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


@pytest.mark.parametrize(
    ("setting", "told"),
    [("rank=-1 step=3", "rank is -1; count from 0"), ("rank=1 step=-2", "step is -2; count from 0")],
)
def test_numbers_below_the_first_are_refused(setting: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        Fault.parse(f"kill {setting}")


@pytest.mark.parametrize("count", [0, -1])
def test_passages_are_counted_from_one(count: int) -> None:
    with pytest.raises(
        ConfigurationError, match=f"'kill rank=1 step=3 phase=forward count={count}'.*count is {count}; count from 1"
    ):
        Fault.parse(f"kill rank=1 step=3 count={count}")
    with pytest.raises(ConfigurationError, match="count from 1"):
        Fault(1, StepTag(3, Phase.FORWARD), count=count)


def test_a_fault_strikes_at_its_passage_and_once() -> None:
    fault = Fault.parse("kill rank=1 step=3 phase=validation count=2")
    trigger = FaultTrigger([fault], rank=1)
    here = StepTag(3, Phase.VALIDATION)
    assert trigger.at(StepTag(2, Phase.VALIDATION)) is None
    assert trigger.at(StepTag(3, Phase.BATCH_END)) is None
    assert [trigger.at(here) for _ in range(4)] == [None, fault, None, None]


def test_other_ranks_are_not_struck() -> None:
    trigger = FaultTrigger([Fault.parse("kill rank=1 step=3")], rank=0)
    assert trigger.at(StepTag(3, Phase.FORWARD)) is None


def _live(faults: list[str]) -> list[str]:
    """What strikes each process of rank 1. A replacement does the step again in which its predecessor was struck."""
    planned = [Fault.parse(line) for line in faults]
    struck: list[Fault] = []
    begin = 0
    for _ in range(10):
        trigger = FaultTrigger(planned, 1, struck)
        tags = [StepTag(step, phase) for step in range(begin, 10) for phase in Phase]
        found = next((fault for tag in tags if (fault := trigger.at(tag)) is not None), None)
        if found is None:
            return [str(fault) for fault in struck]
        struck.append(found)
        begin = max(found.at.global_step - 1, 0)
    raise AssertionError(f"struck without end: {struck}")


FORWARD, BACKWARD, SEVENTH = (
    "kill rank=1 step=3 phase=forward",
    "stop rank=1 step=3 phase=backward",
    "kill rank=1 step=7 phase=forward",
)


@pytest.mark.parametrize(
    ("faults", "lives"),
    [
        pytest.param([], [], id="none"),
        pytest.param([FORWARD], [FORWARD], id="the replacement does the step again and is spared"),
        pytest.param([FORWARD, FORWARD], [FORWARD, FORWARD], id="a line that is there twice strikes two processes"),
        pytest.param(
            [SEVENTH, BACKWARD, FORWARD], [FORWARD, BACKWARD, SEVENTH], id="the order of the lines is nothing"
        ),
        pytest.param([f"{FORWARD} count=2", SEVENTH], [SEVENTH], id="a passage that never comes blocks nothing"),
        pytest.param(["kill rank=1 step=40", SEVENTH], [SEVENTH], id="a step that never comes blocks nothing"),
        pytest.param(["kill rank=0 step=3", SEVENTH], [SEVENTH], id="another rank's"),
        pytest.param(
            ["kill rank=1 step=3 phase=forward", "exit rank=1 step=3 phase=forward"],
            ["kill rank=1 step=3 phase=forward", "exit rank=1 step=3 phase=forward"],
            id="two at one place strike one process each",
        ),
        pytest.param(
            ["kill rank=1 step=0 phase=setup", "kill rank=1 step=0 phase=setup", FORWARD],
            ["kill rank=1 step=0 phase=setup", "kill rank=1 step=0 phase=setup", FORWARD],
            id="the set-up of the replacement as well",
        ),
    ],
)
def test_each_fault_strikes_one_process(faults: list[str], lives: list[str]) -> None:
    assert _live(faults) == lives


def test_a_process_that_was_struck_by_something_else_leaves_the_faults_to_its_replacement() -> None:
    fault = Fault.parse(SEVENTH)
    killed_from_outside = FaultTrigger([fault], 1)
    assert killed_from_outside.at(StepTag(3, Phase.FORWARD)) is None
    replacement = FaultTrigger([fault], 1, struck=())
    assert replacement.at(StepTag(7, Phase.FORWARD)) == fault


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
