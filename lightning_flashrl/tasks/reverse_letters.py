"""Write letters backwards: longer than :class:`DigitSort`, and each place depends on one other."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.tasks.base import Problem, ProceduralTask


class ReverseLetters(ProceduralTask):
    """Prompts like ``qnca>``, to be answered with ``acnq``. The reward is 1 for the right answer, else 0.

    Args:
        min_letters: of the shortest prompts.
        max_letters: of the longest.
        seed: of the training problems.

    Raises:
        ConfigurationError: not 1 ≤ min_letters ≤ max_letters.

    >>> task = ReverseLetters()
    >>> task.reward("abc>", "cba", {}), task.reward("abc>", "cab", {})
    (1.0, 0.0)
    """

    alphabet = string.ascii_lowercase + ">"

    def __init__(self, min_letters: int = 3, max_letters: int = 12, seed: int = 0) -> None:
        super().__init__(seed)
        if not 1 <= min_letters <= max_letters:
            raise ConfigurationError(
                f"min_letters={min_letters}, max_letters={max_letters}; use 1 <= min_letters <= max_letters"
            )
        self.min_letters = min_letters
        self.max_letters = max_letters

    def draw(self, random: random.Random) -> Problem:
        """Draw letters."""
        letters = random.choices(string.ascii_lowercase, k=random.randint(self.min_letters, self.max_letters))
        return Problem(f"{''.join(letters)}>", "".join(reversed(letters)))

    def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """1 for the right answer, else 0."""
        return float(completion == prompt[-2::-1])
