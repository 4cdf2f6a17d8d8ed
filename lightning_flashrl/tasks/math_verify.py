"""A reward for mathematical answers through the package ``math-verify``: is it the same number, set or expression?

Answers are parsed by grammars for LaTeX and for arithmetic; nothing that a model wrote is executed.

``math-verify`` limits its own time with the signal SIGALRM, which works in main threads only and takes the signal away
from everybody else. It is not used here. Some comparisons take very long: a
:class:`~lightning_flashrl.engines.rewards.RewardPool` around this reward ends them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from lightning_flashrl.errors import ConfigurationError, SchemaMismatchError

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2}")
_LOUD = ("math_verify.parser", "math_verify.grader")
"""Their loggers warn of the missing time limit, and of every answer that cannot be parsed."""


class MathVerify:
    r"""1 if a completion's final answer equals the right one, else 0.

    The answer may stand in ``\boxed{}`` (the last one counts), between dollar signs, as numbers and arithmetic in
    plain text, or alone. The right answer is ``row["answer"]``, in LaTeX or plain.

    Args:
        digits: to which numbers are rounded before they are compared.
        max_characters: of a completion that is looked at, from its end.

    Raises:
        ConfigurationError: ``math-verify`` is not installed, or a setting below 1.

    >>> reward = MathVerify()
    >>> reward("What is 1/2 + 1/4?", r"We add them and get $\boxed{\frac{3}{4}}$.", {"answer": "0.75"})
    1.0
    >>> reward("What is 1/2 + 1/4?", "The answer is 2/6", {"answer": "0.75"})
    0.0
    """

    def __init__(self, *, digits: int = 6, max_characters: int = 4000) -> None:
        if digits < 1 or max_characters < 1:
            raise ConfigurationError(f"digits={digits}, max_characters={max_characters}; use 1 or more of each")
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"MathVerify needs the package math-verify ({error}); install lightning-flashrl[tasks]"
            ) from error
        self.digits = digits
        self.max_characters = max_characters
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Return 1 for the right answer, else 0.

        Raises:
            SchemaMismatchError: the right answer is no mathematics.
        """
        from math_verify import verify

        right, given = str(row["answer"]).strip(), completion[-self.max_characters :].strip()
        if given == right:
            return 1.0
        gold = _parse_alone(right)
        if not gold:
            raise SchemaMismatchError("prompt.answer", f"{right!r} is no mathematics", "give a number or LaTeX")
        found = _parse_alone(given[max(0, given.rfind("\\boxed")) :])
        return float(verify(gold, found, float_rounding=self.digits, timeout_seconds=None))


def _parse_alone(text: str) -> list[Any]:
    """Parse a text; one without words and marks is mathematics as a whole."""
    is_marked = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    if is_marked or "\n" in text or _WORD.search(_COMMAND.sub("", text)):
        return _parse(text)
    return _parse(f"${text}$") or _parse(text)


def _parse(text: str) -> list[Any]:
    """Return the mathematics of a text, in math-verify's form; empty if there is none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found: list[Any] = parse(text, kinds, parsing_timeout=None)
    return found
