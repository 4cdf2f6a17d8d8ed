"""Sort the digits of a number: a task that a model of half a million parameters learns in a minute."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.tasks.base import Problem, ProceduralTask


class DigitSort(ProceduralTask):
    """Prompts like ``4192>``, to be answered with ``1249``. The reward is 1 for the right answer, else 0.

    Args:
        min_digits: of the shortest prompts.
        max_digits: of the longest.
        seed: of the training problems.

    Raises:
        ConfigurationError: not 1 ≤ min_digits ≤ max_digits.

    >>> task = DigitSort()
    >>> problem = task.problem(0)
    >>> "".join(sorted(problem.prompt[:-1])) == problem.answer
    True
    >>> task.reward("312>", "123", {"answer": "123"}), task.reward("312>", "132", {"answer": "123"})
    (1.0, 0.0)
    """

    alphabet = "0123456789>"

    def __init__(self, min_digits: int = 3, max_digits: int = 6, seed: int = 0) -> None:
        super().__init__(seed)
        if not 1 <= min_digits <= max_digits:
            raise ConfigurationError(
                f"min_digits={min_digits}, max_digits={max_digits}; use 1 <= min_digits <= max_digits"
            )
        self.min_digits = min_digits
        self.max_digits = max_digits

    def draw(self, random: random.Random) -> Problem:
        """Draw digits."""
        digits = random.choices("0123456789", k=random.randint(self.min_digits, self.max_digits))
        return Problem(f"{''.join(digits)}>", "".join(sorted(digits)))

    def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """1 for the right answer, else 0."""
        return float(completion == "".join(sorted(prompt[:-1])))
