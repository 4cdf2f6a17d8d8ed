"""Puts prompts into the queue, as many as the staleness gate has room for.

=====================  ================================================  =========================================
who                    waits for                                         unblocked by
=====================  ================================================  =========================================
the feeder's thread    room in the gate; problems                        a finished step, a failed group; the user
=====================  ================================================  =========================================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lightning_flashrl.engines.experience import prompt_rows
from lightning_flashrl.errors import ConfigurationError, QueueClosedError, QueueUnavailableError
from lightning_flashrl.streaming import QueueVerbs
from lightning_flashrl.tasks import Problem

TakeProblems = Callable[[int], list[Problem]]
"""Returns at most so many problems; waits for one if more will come, and returns none at the end."""
_LOOK_S = 0.2
"""How often a feeder that waits for room looks whether it should end."""


class PromptSink(Protocol):
    """What a feeder needs of a :class:`~lightning_flashrl.asyncrl.host.StreamHost`."""

    def resume(self) -> int:
        """Say that prompts come from somebody else from now on. Returns the number of the next group."""

    def wait_for_room(self, timeout_s: float) -> int:
        """Return how many prompt groups may begin now; 0 if none may in time."""

    def begin(self, first_group: int, count: int) -> int:
        """Begin prompt groups; return the oldest version that may generate them."""

    def end_prompts(self) -> None:
        """Say that there are no more prompts."""


class Feeder:
    """Puts prompts into the queue as the gate has room for them.

    Args:
        queue: where they go.
        sink: knows how many.
        open_at: gives problems from a number on.
        encode: a prompt's tokens.
        group_size: completions of a prompt.
        seed: of the random numbers of rollouts.

    Attributes:
        error: what ended it early.
    """

    def __init__(
        self,
        queue: QueueVerbs,
        sink: PromptSink,
        open_at: Callable[[int], TakeProblems],
        encode: Callable[[str], Sequence[int]],
        *,
        group_size: int,
        seed: int = 0,
    ) -> None:
        self.error: Exception | None = None
        self._queue = queue
        self._sink = sink
        self._open_at = open_at
        self._encode = encode
        self._group_size = group_size
        self._seed = seed
        self._next_group = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flashrl-feeder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            self._next_group = self._sink.resume()
            take = self._open_at(self._next_group)
            goes_on = True
            while not self._over.wait(0.0 if goes_on else _LOOK_S):  # also at the end: who asks misses a host that dies
                count = self._sink.wait_for_room(_LOOK_S)
                if count and goes_on:
                    goes_on = self._feed(take(count))
        except (QueueClosedError, QueueUnavailableError):
            pass  # whoever waits for rows is told
        except Exception as error:  # noqa: BLE001 - the user's own dataset and tokenizer; raised in the training loop
            self.error = error

    def _feed(self, problems: list[Problem]) -> bool:
        """Put prompts; return whether there were any."""
        if not problems:
            self._sink.end_prompts()
            return False
        tokens = [_encoded(self._encode, problem.prompt) for problem in problems]
        first_group = self._next_group
        version = self._sink.begin(first_group, len(problems))
        self._next_group += len(problems)
        self._queue.put(
            prompt_rows(
                tokens,
                problems,
                group_size=self._group_size,
                first_group=first_group,
                seed=self._seed,
                min_version=version,
            )
        )
        return True


def _encoded(encode: Callable[[str], Sequence[int]], prompt: str) -> Any:
    import torch

    tokens = torch.tensor(list(encode(prompt)), dtype=torch.int64)
    if not len(tokens):
        raise ConfigurationError(f"the prompt {prompt!r} has no tokens; give prompts that are not empty")
    return tokens
