"""Reach a number with given numbers and the four operations. Answers are many; the reward computes them."""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.tasks.base import Problem, ProceduralTask

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_MAX_CHARACTERS = 200
"""Longer completions are not parsed."""


class Countdown(ProceduralTask):
    """Prompts like ``3 7 25=43>``, to be answered with ``25+3*6`` if 6 were there. Each number is used exactly once.

    The reward is 1 for an expression that uses the numbers and has the value, else 0. It is parsed, never executed.

    Args:
        num_numbers: how many numbers are given.
        max_number: the largest of them.
        seed: of the training problems.

    Raises:
        ConfigurationError: fewer than two numbers, or none above 1.

    >>> task = Countdown()
    >>> problem = task.problem(5)
    >>> task.reward(problem.prompt, problem.answer, {})
    1.0
    >>> task.reward("2 3=6>", "2*3", {}), task.reward("2 3=6>", "3+3", {}), task.reward("2 3=6>", "2*", {})
    (1.0, 0.0, 0.0)
    """

    alphabet = "0123456789 =>+-*/()"

    def __init__(self, num_numbers: int = 3, max_number: int = 20, seed: int = 0) -> None:
        super().__init__(seed)
        if num_numbers < 2 or max_number < 2:
            raise ConfigurationError(f"num_numbers={num_numbers}, max_number={max_number}; use 2 or more of each")
        self.num_numbers = num_numbers
        self.max_number = max_number

    def draw(self, random: random.Random) -> Problem:
        """Draw numbers, and an expression of them whose value is asked for."""
        numbers = [random.randint(1, self.max_number) for _ in range(self.num_numbers)]
        expression, value = str(numbers[0]), numbers[0]
        for number in numbers[1:]:
            symbol = random.choice("+-*")
            if symbol == "*" and ("+" in expression or "-" in expression):
                expression = f"({expression})"
            expression = f"{expression}{symbol}{number}"
            value = {"+": value + number, "-": value - number, "*": value * number}[symbol]
        given = numbers.copy()
        random.shuffle(given)
        return Problem(f"{' '.join(map(str, given))}={value}>", expression)

    def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """1 for an expression of exactly the given numbers with the wanted value, else 0."""
        given, _, wanted = prompt.rstrip(">").partition("=")
        if len(completion) > _MAX_CHARACTERS or not set(completion) <= set("0123456789+-*/()"):
            return 0.0
        try:
            tree = ast.parse(completion, mode="eval")
            value = _value(tree.body)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return 0.0
        used = Counter(str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant))
        return float(value == int(wanted) and used == Counter(given.split()))


def _value(node: ast.expr) -> Fraction:
    """Compute an expression of whole numbers and the four operations, exactly."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no such expression")
