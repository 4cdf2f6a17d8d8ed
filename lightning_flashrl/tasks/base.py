"""What a task is: problems with prompts, and a reward for what a model answers."""

from __future__ import annotations

import abc
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning_flashrl.errors import ConfigurationError

Split = Literal["train", "validation"]
_VALIDATION_SHARE = 16
"""One prompt of this many belongs to the validation split."""
_MAX_DRAWS = 1000
"""Enough that a task with many prompts always has one in each split."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to be answered.

    Attributes:
        prompt: what the model reads.
        answer: one right answer, for demonstrations and for people; there may be others.
        data: what else the reward needs; numbers and texts only.
    """

    prompt: str
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict)


class RewardFn(Protocol):
    """How good is a completion? A function of one's own has these three arguments."""

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Return the reward.

        Args:
            prompt: what the model read.
            completion: what it wrote, without the end mark.
            row: the problem's ``data`` and ``answer``.
        """


class ProceduralTask(abc.ABC):
    """Problems drawn from a seed: the n-th one is the same everywhere and at any time.

    A prompt belongs to one split for good, whatever the seed: nothing that is validated was ever trained.

    Args:
        seed: of the training problems.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    alphabet: str
    """Every character of prompts and answers."""

    @abc.abstractmethod
    def draw(self, random: random.Random) -> Problem:
        """Draw a problem."""

    @abc.abstractmethod
    def reward(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Return the reward of a completion; see :class:`RewardFn`."""

    def problem(self, index: int, split: Split = "train") -> Problem:
        """Return a problem of a split.

        Raises:
            ConfigurationError: there is no such split, or no problem in it.
        """
        if split not in ("train", "validation"):
            raise ConfigurationError(f"split={split!r}; use 'train' or 'validation'")
        seed = self.seed if split == "train" else "validation"
        source = random.Random(f"{type(self).__name__}/{seed}/{index}")
        for _ in range(_MAX_DRAWS):
            problem = self.draw(source)
            is_held_out = zlib.crc32(problem.prompt.encode()) % _VALIDATION_SHARE == 0
            if is_held_out == (split == "validation"):
                return problem
        raise ConfigurationError(
            f"none of {_MAX_DRAWS} problems is in split={split!r}: the task has too few different prompts; choose "
            "settings that allow for more"
        )

    def demonstration(self, index: int, corrupted: float = 0.0) -> tuple[str, str]:
        """Return the prompt and an answer of a training problem, for supervised training.

        Args:
            index: which problem.
            corrupted: share of answers whose characters are shuffled, so that reinforcement has something left to do.
        """
        problem = self.problem(index)
        source = random.Random(f"demonstration/{self.seed}/{index}")
        answer = problem.answer
        if source.random() < corrupted:
            characters = list(answer)
            source.shuffle(characters)
            answer = "".join(characters)
        return problem.prompt, answer


class Problems(Sequence[Problem]):
    """A number of a task's problems as a map-style dataset.

    Args:
        task: where they come from.
        size: how many.
        split: which.

    Raises:
        ConfigurationError: a negative size.

    >>> from lightning_flashrl.tasks import DigitSort
    >>> len(Problems(DigitSort(), 3)), Problems(DigitSort(), 3)[2].prompt == DigitSort().problem(2).prompt
    (3, True)
    """

    def __init__(self, task: ProceduralTask, size: int, split: Split = "train") -> None:
        if size < 0:
            raise ConfigurationError(f"size={size}; use 0 or more")
        self.task = task
        self.size = size
        self.split: Split = split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        return self.task.problem(index % self.size, self.split)

    def __iter__(self) -> Iterator[Problem]:
        return (self.task.problem(index, self.split) for index in range(self.size))
