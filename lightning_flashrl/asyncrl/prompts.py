"""Where prompts come from: a task, or any dataset."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from lightning_flashrl.errors import ConfigurationError, QueueClosedError, SchemaMismatchError
from lightning_flashrl.tasks import Problem, ProceduralTask


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def decode(self, token_ids: Any) -> str:
        """Return the text of tokens."""


@runtime_checkable
class _MapStyle(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class PromptSource:
    """Problems one after the other, pass after pass.

    Args:
        prompts: a procedural task, which never ends; a dataset with a length and indices, which is gone through again
            and again; or an iterable, which ends with its first pass. Items are :class:`Problem`, mappings with
            ``prompt`` and perhaps ``answer`` (what else they have is for the reward), or texts.
        shuffle: whether each pass over a dataset goes in another order.
        seed: of that order.

    Attributes:
        pass_size: problems of a pass; ``None`` if nobody knows.
        is_endless: whether there is always another one.

    Raises:
        ConfigurationError: nothing that prompts can be read from, or an empty dataset.

    >>> source = iter(PromptSource(["a", "b", "c"], shuffle=False))
    >>> [next(source).prompt for _ in range(4)]
    ['a', 'b', 'c', 'a']
    """

    def __init__(self, prompts: ProceduralTask | Iterable[Any] | Any, *, shuffle: bool = True, seed: int = 0) -> None:
        self.pass_size: int | None = None
        self.is_endless = True
        self._prompts: Any = prompts
        self._shuffle = shuffle
        self._seed = seed
        if isinstance(prompts, ProceduralTask):
            return
        if isinstance(prompts, _MapStyle) and not isinstance(prompts, (str, Mapping)):
            self.pass_size = len(prompts)
            if not self.pass_size:
                raise ConfigurationError("the dataset of prompts is empty; give it at least one item")
        elif isinstance(prompts, Iterable) and not isinstance(prompts, (str, Mapping)):
            self.is_endless = False
        else:
            raise ConfigurationError(
                f"prompts={prompts!r:.80} are neither a task nor a dataset; give a ProceduralTask, something with "
                "__len__ and __getitem__, or an iterable"
            )

    def __iter__(self) -> Iterator[Problem]:
        return self.starting_at(0)

    def starting_at(self, index: int) -> Iterator[Problem]:
        """Return the problems from the ``index``-th on."""
        if isinstance(self._prompts, ProceduralTask):
            return self._drawn(self._prompts, index)
        if self.pass_size is None:
            return self._once(index)
        return self._again_and_again(index, self.pass_size)

    def _drawn(self, task: ProceduralTask, index: int) -> Iterator[Problem]:
        while True:
            yield task.problem(index)
            index += 1

    def _once(self, index: int) -> Iterator[Problem]:
        for position, item in enumerate(self._prompts):
            if position >= index:
                yield as_problem(item)

    def _again_and_again(self, index: int, size: int) -> Iterator[Problem]:
        while True:
            number, first = divmod(index, size)
            order = list(range(size))
            if self._shuffle:
                draw = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % (1 << 32))
                order = torch.randperm(size, generator=draw).tolist()
            for position in order[first:]:
                yield as_problem(self._prompts[position])
            index = (number + 1) * size


class Backlog:
    """Problems that somebody puts in and somebody else takes out, first come, first served.

    >>> backlog = Backlog()
    >>> backlog.put([Problem("a", ""), Problem("b", "")])
    >>> [problem.prompt for problem in backlog.take(5)]
    ['a', 'b']
    >>> backlog.close()
    >>> backlog.take(5)
    []
    """

    def __init__(self) -> None:
        self._problems: collections.deque[Problem] = collections.deque()
        self._changed = threading.Condition(threading.RLock())
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._problems)

    def put(self, problems: Iterable[Problem]) -> None:
        """Put problems in.

        Raises:
            QueueClosedError: it is closed.
        """
        with self._changed:
            if self._is_closed:
                raise QueueClosedError
            self._problems.extend(problems)
            self._changed.notify_all()

    def take(self, count: int) -> list[Problem]:
        """Return at most so many; wait for one, unless no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._problems or self._is_closed)
            return [self._problems.popleft() for _ in range(min(count, len(self._problems)))]

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def discard(self) -> None:
        """Forget what is left; no more will come."""
        with self._changed:
            self._problems.clear()
            self.close()


def text_of(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """Return what turns a completion's tokens into the text that rewards see: without special tokens."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return functools.partial(tokenizer.decode, skip_special_tokens=True)
    return tokenizer.decode


def as_problem(item: Any) -> Problem:
    """Turn an item of a dataset into a problem.

    Raises:
        SchemaMismatchError: it has no prompt.
    """
    if isinstance(item, Problem):
        return item
    if isinstance(item, str):
        return Problem(item, "")
    if isinstance(item, Mapping) and isinstance(item.get("prompt"), str):
        rest = {name: value for name, value in item.items() if name not in ("prompt", "answer")}
        return Problem(item["prompt"], str(item.get("answer", "")), rest)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return as_problem(dataclasses.asdict(item))
    raise SchemaMismatchError(
        "prompt", f"is {item!r:.80}", "give a Problem, a text, or a mapping with a text under 'prompt'"
    )
