"""Equal mathematics is rewarded, in whatever form it is written and in whatever thread it is compared."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_flashrl.errors import ConfigurationError, SchemaMismatchError
from lightning_flashrl.tasks import MathVerify


@pytest.fixture(scope="module")
def reward() -> MathVerify:
    return MathVerify()


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"So it is $\boxed{\frac{3}{4}}$.", "0.75", 1.0),
        (r"So it is $\boxed{\frac{3}{4}}$.", r"\frac{6}{8}", 1.0),
        ("The answer is 2/6", "0.75", 0.0),
        ("3/4", "$0.75$", 1.0),
        (r"first \boxed{5}, no: \boxed{6}", "6", 1.0),
        (r"first \boxed{6}, no: \boxed{5}", "6", 0.0),
        (r"\boxed{6} and much later 5", "6", 1.0),
        ("we had 5 and so 6", "6", 1.0),
        ("1+x", "x+1", 1.0),
        (" 1 + x ", "x+1", 1.0),
        ("1+x", "1", 0.0),
        ("(1, 2)", "(1,2)", 1.0),
        ("$(x+1)^2$", "x^2+2x+1", 1.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        ("(1,2)", "(1,2)", 1.0),
        ("[0,1)", "(0,1)", 0.0),
        ("1,234", "1234", 1.0),
        ("50%", "0.5", 1.0),
        ("0.3333333", r"\frac{1}{3}", 1.0),
        ("0.33", r"\frac{1}{3}", 0.0),
        ("B", "B", 1.0),
        ("C", "B", 0.0),
        (r"$\sqrt{8}$", r"2\sqrt{2}", 1.0),
        ("", "3", 0.0),
        ("no idea", "3", 0.0),
        (r"\boxed{", "3", 0.0),
        ("$" * 50, "3", 0.0),
    ],
)
def test_equal_answers_are_right(reward: MathVerify, completion: str, answer: str, expected: float) -> None:
    assert reward("", completion, {"answer": answer}) == expected


@given(completion=st.text(alphabet="0123456789+-/(){}$\\boxedfrac ,.=x", max_size=25))
@settings(max_examples=60)
def test_any_text_has_a_reward(completion: str) -> None:
    assert MathVerify()("", completion, {"answer": "17"}) in (0.0, 1.0)


@pytest.mark.parametrize(
    "completion",
    [
        "__import__('pathlib').Path('{path}').touch()",
        r"\boxed{{__import__('pathlib').Path('{path}').touch()}}",
        "$__import__('pathlib').Path('{path}').touch()$",
        "The answer is 1+open('{path}','w')",
    ],
)
def test_nothing_is_executed(reward: MathVerify, completion: str, tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert reward("", completion.format(path=path), {"answer": "3"}) == 0.0
    assert not path.exists()


def test_it_works_in_a_thread_and_leaves_signals_alone(reward: MathVerify) -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(reward("", r"\boxed{3}", {"answer": "3"})))
    thread.start()
    thread.join()
    assert found == [1.0]
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]
    assert reward("", r"\boxed{4}", {"answer": "3"}) == 0.0
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0  # the time-out of the test runner still runs


def test_only_the_end_of_a_long_completion_is_looked_at() -> None:
    reward = MathVerify(max_characters=100)
    assert reward("", r"\boxed{3}" + " " * 100 + "4", {"answer": "4"}) == 1.0


def test_what_cannot_be_is_refused(reward: MathVerify, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SchemaMismatchError, match="'' is no mathematics"):
        reward("", "3", {"answer": ""})
    for options in ({"digits": 0}, {"max_characters": 0}):
        with pytest.raises(ConfigurationError, match="use 1 or more"):
            MathVerify(**options)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigurationError, match=r"install lightning-flashrl\[tasks\]"):
        MathVerify()
