"""Problems are the same everywhere, splits do not meet, and rewards cannot be talked into anything."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_flashrl.errors import ConfigurationError, SchemaMismatchError
from lightning_flashrl.tasks import CharacterTokenizer, Countdown, DigitSort, Problems, ProceduralTask, ReverseLetters

TASKS = [DigitSort(), ReverseLetters(), Countdown(), Countdown(num_numbers=4, max_number=99)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
class TestEveryTask:
    def test_its_own_answers_are_right(self, task: ProceduralTask) -> None:
        for problem in Problems(task, 300):
            assert task.reward(problem.prompt, problem.answer, {}) == 1.0
            assert set(problem.prompt + problem.answer) <= set(task.alphabet)

    def test_splits_do_not_meet(self, task: ProceduralTask) -> None:
        train = {problem.prompt for problem in Problems(task, 3000)}
        validation = {problem.prompt for problem in Problems(task, 300, "validation")}
        assert not train & validation
        assert len(validation) > 30

    def test_validation_does_not_depend_on_the_seed(self, task: ProceduralTask) -> None:
        other = type(task)(seed=5)
        first = type(task)()
        assert [p.prompt for p in Problems(first, 20, "validation")] == [
            p.prompt for p in Problems(other, 20, "validation")
        ]
        assert [p.prompt for p in Problems(first, 20)] != [p.prompt for p in Problems(other, 20)]

    def test_corrupted_demonstrations_are_shuffled_answers(self, task: ProceduralTask) -> None:
        shown = [task.demonstration(index, corrupted=0.8) for index in range(400)]
        answers = [task.problem(index).answer for index in range(400)]
        for (_, given_answer), answer in zip(shown, answers, strict=True):
            assert sorted(given_answer) == sorted(answer)
        right = sum(given_answer == answer for (_, given_answer), answer in zip(shown, answers, strict=True))
        assert 50 <= right <= 160  # a fifth is not corrupted, and some shuffles change nothing
        assert [task.demonstration(index)[1] for index in range(20)] == answers[:20]

    @given(completion=st.text(max_size=30))
    def test_any_text_has_a_reward(self, task: ProceduralTask, completion: str) -> None:
        assert task.reward(task.problem(0).prompt, completion, {}) in (0.0, 1.0)


def test_problems_are_the_same_in_another_process() -> None:
    program = (
        "from lightning_flashrl.tasks import *; print(DigitSort().problem(17).prompt, Countdown().problem(17).prompt)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"{DigitSort().problem(17).prompt} {Countdown().problem(17).prompt}"


def test_problems_are_a_map_style_dataset() -> None:
    problems = Problems(DigitSort(), 5)
    assert len(problems[1:4]) == 3
    assert problems[-1] == problems[4] == list(problems)[4]
    with pytest.raises(IndexError):
        problems[5]
    with pytest.raises(ConfigurationError, match="size=-1"):
        Problems(DigitSort(), -1)
    with pytest.raises(ConfigurationError, match="split='test'"):
        DigitSort().problem(0, "test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("25-7*3", 0.0),
        ("(25-7)*3", 1.0),
        ("3*(25-7)", 1.0),
        ("54", 0.0),
        ("27+27", 0.0),
        ("(25-7)*3+0", 0.0),
        ("(25-7)*3*1", 0.0),
        ("((((25-7))))*3", 1.0),
        ("__import__('os')", 0.0),
        ("9**9**9**9", 0.0),
        ("1/0", 0.0),
        ("(25-7)*03", 0.0),
        ("(25-7)*3 ", 0.0),
        ("", 0.0),
        ("(" * 150, 0.0),
    ],
)
def test_countdown_computes_what_it_is_given(completion: str, reward: float) -> None:
    assert Countdown().reward("3 7 25=54>", completion, {}) == reward


@pytest.mark.parametrize(
    "make",
    [
        lambda: DigitSort(0, 3),
        lambda: DigitSort(4, 3),
        lambda: ReverseLetters(4, 3),
        lambda: Countdown(num_numbers=1),
        lambda: Countdown(max_number=1),
        lambda: CharacterTokenizer(""),
        lambda: CharacterTokenizer("aa"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


class TestCharacters:
    @given(text=st.text(alphabet=Countdown.alphabet, max_size=40))
    def test_they_come_back(self, text: str) -> None:
        tokenizer = CharacterTokenizer(Countdown.alphabet)
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_token_id, 5, 0]) == text

    def test_an_unknown_one_is_said(self) -> None:
        with pytest.raises(SchemaMismatchError, match="character 'x'"):
            CharacterTokenizer("01").encode("0x1")
