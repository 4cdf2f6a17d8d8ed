"""The procedural data sets of the package ``reasoning-gym`` as tasks, scored by their own rules.

Some of these rules evaluate an answer as Python. They get only answers with which nothing can be called: literals, and
arithmetic with known functions. Any other answer counts as none.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import random
import re
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.tasks.base import Problem, Problems, ProceduralTask

LITERAL_ANSWERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Data sets that take an answer for a Python literal, and evaluate it."""
EXPRESSION_ANSWERS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Data sets that take an answer for a formula, and have sympy evaluate it."""
_FUNCTIONS = re.compile("a?(sin|cos|tan|cot|sec|csc)h?|exp|log|ln|sqrt|Abs|Rational")
_NO_FUNCTIONS = re.compile("(?!)")
_WITHOUT_CALLS = re.compile(r"[\w\s,'\"\[\]-]*")
_MAX_EXPRESSION = 300
_MAX_EXPONENT = 100
_NUM_SEEN = 64
"""Problems whose characters make the alphabet."""


class ReasoningGym(ProceduralTask):
    """A data set of ``reasoning-gym`` by its name.

    The reward is the data set's own score, mostly from 0 to 1 and in part for answers that are partly right.

    Args:
        name: of the data set.
        config: its settings, as ``reasoning_gym.create_dataset`` takes them, without seed and size.
        prompt: what the model reads, with ``{question}`` where the question goes.
        answer_tag: the answer stands in the last ``<tag>…</tag>`` of a completion; the whole completion if not given.
        seed: of the training problems.

    Raises:
        ConfigurationError: ``reasoning-gym`` is not installed, has no such data set or setting, or the prompt has no
            place for the question.

    >>> task = ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 1}, prompt="{question} ")
    >>> problem = task.problem(0)
    >>> problem.prompt, problem.answer
    ('State the final answer to the following arithmetic problem: 7 + 4 = ', '11')
    >>> task.reward(problem.prompt, problem.answer, problem.data), task.reward(problem.prompt, "12", problem.data)
    (1.0, 0.0)
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        prompt: str = "{question}\n",
        answer_tag: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.name = name
        self.config = dict(config or {})
        self.prompt = prompt
        self.answer_tag = answer_tag
        if "{question}" not in prompt:
            raise ConfigurationError(f"prompt={prompt!r} has no place for the question; write {{question}} into it")
        if own := sorted({"seed", "size"} & self.config.keys()):
            raise ConfigurationError(f"config has {', '.join(own)}; the task draws seeds itself, leave them out")
        if name == "composite":
            raise ConfigurationError("name='composite' mixes data sets; make a task of each, and mix their problems")
        self._functions = _FUNCTIONS if name.endswith("integration") else _NO_FUNCTIONS
        self._scorer = self._data_set(0)

    @functools.cached_property
    def alphabet(self) -> str:  # type: ignore[override]
        """Printable ASCII, and whatever else the first problems of both splits have: made when it is asked for."""
        characters = set(string.printable[:95] + "\n")
        for problem in (*Problems(self, _NUM_SEEN), *Problems(self, _NUM_SEEN // 4, "validation")):
            characters.update(problem.prompt, problem.answer)
        return "".join(sorted(characters))

    def draw(self, random: random.Random) -> Problem:
        """Draw a problem. Its ``data`` is the data set's own entry, from which it is scored."""
        entry = _plain(self._data_set(random.getrandbits(31))[0])
        answer = entry["answer"] if isinstance(entry["answer"], str) else ""  # some have no example
        if self.answer_tag is not None:
            answer = f"<{self.answer_tag}>{answer}</{self.answer_tag}>"
        return Problem(self.prompt.replace("{question}", entry["question"]), answer, {"entry": repr(entry)})

    def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Return the data set's score of a completion's answer; 0 if it has none or cannot be scored.

        Args:
            prompt: what the model read.
            completion: what it wrote.
            row: the problem's ``data``.
        """
        entry = ast.literal_eval(row["entry"])
        answer = self._answer(completion)
        if answer is None:
            return 0.0
        try:
            return float(self._scorer.score_answer(answer, entry))
        except Exception:  # noqa: BLE001 - the data set's own rule stumbles over an answer that it did not expect
            return 0.0

    def _answer(self, completion: str) -> str | None:
        """Return the part of a completion that is scored; ``None`` without one that may be."""
        answer = completion.strip()
        if self.answer_tag is not None:
            found = re.findall(f"<{re.escape(self.answer_tag)}>(.*?)</{re.escape(self.answer_tag)}>", answer, re.DOTALL)
            if not found:
                return None
            answer = found[-1].strip()
        if self.name in LITERAL_ANSWERS and not (_WITHOUT_CALLS.fullmatch(answer) or _is_literal(answer)):
            return None
        if self.name in EXPRESSION_ANSWERS and not _is_arithmetic(answer, self._functions):
            return None
        return answer

    def _data_set(self, seed: int) -> Any:
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise ConfigurationError(
                f"ReasoningGym needs the package reasoning-gym ({error}); install lightning-flashrl[tasks]"
            ) from error
        try:
            return create_dataset(self.name, seed=seed, size=1, **self.config)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigurationError(f"name={self.name!r}, config={self.config}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the data set out: it is made again where the task goes."""
        return {name: value for name, value in vars(self).items() if name not in ("_scorer", "alphabet")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._scorer = self._data_set(0)


def _plain(value: Any) -> Any:
    """Return an entry whose ``repr`` is a literal: numpy's numbers and texts become Python's."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _is_literal(text: str) -> bool:
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        ast.literal_eval(text)
        return True
    return False


def _is_arithmetic(text: str, functions: re.Pattern[str]) -> bool:
    """Whether a text is a formula of numbers, names and these functions that can be computed in little time."""
    if len(text) > _MAX_EXPRESSION:
        return False
    try:
        tree = ast.parse(text, mode="eval")
        return _may_be_computed(tree.body, functions)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _may_be_computed(node: ast.expr, functions: re.Pattern[str]) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return "_" not in name
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _may_be_computed(operand, functions)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _may_be_computed(left, functions) and _may_be_computed(right, functions)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            is_tower = any(isinstance(part, ast.Pow) for side in (left, right) for part in ast.walk(side))
            return not is_tower and _may_be_computed(left, functions) and _is_small(right)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return functions.fullmatch(name) is not None and all(
                _may_be_computed(part, functions) for part in arguments
            )
    return False


def _is_small(exponent: ast.expr) -> bool:
    """Whether an exponent is a small number, or a formula that stays one."""
    match exponent:
        case ast.Constant(value=value):
            return isinstance(value, (int, float)) and abs(value) <= _MAX_EXPONENT
        case ast.Name(id=name):
            return "_" not in name
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _is_small(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Div(), right=right):
            return _is_small(left) and _is_small(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return isinstance(right, ast.Name) and _is_small(left) and _is_small(right)
    return False
