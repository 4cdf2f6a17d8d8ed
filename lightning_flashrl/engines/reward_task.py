"""Reward as a task of its own: completions are scored in other processes than those that generate them.

::

    rows ─ queue ─▶ reward worker ─ a thread for each ─▶ RewardPool's processes

A reward that hangs, crashes or raises costs its row, which is counted and cleared.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_flashrl.engines.process import Begin, Job
from lightning_flashrl.engines.rewards import RewardPool
from lightning_flashrl.engines.stage import Result, StageWorker
from lightning_flashrl.engines.worker import told_of
from lightning_flashrl.errors import RewardError
from lightning_flashrl.streaming import Lease, QueueVerbs
from lightning_flashrl.tasks import RewardFn
from lightning_flashrl.weights import WeightsAddress

REWARD = "reward"
"""The queue's task."""
REWARD_FIELDS = ("prompt.text", "prompt.answer", "prompt.data", "response.tokens")
_LOOK_S = 0.2
"""How often a worker that waits for a reward looks whether it should end."""
_LEASED_ROWS = 8
"""Those behind one that hangs wait until its time is over."""


class RewardStage:
    """Writes ``reward``. A row whose reward raises, takes too long or is no number has failed.

    Args:
        pool: computes; it is closed by whoever made it.
        decode: a completion's text.
    """

    def __init__(self, pool: RewardPool, decode: Callable[[list[int]], str]) -> None:
        self._pool = pool
        self._decode = decode

    def __call__(self, lease: Lease) -> Iterator[Result | None]:
        """Score a lease's rows, one after the other."""
        for index, (row, tokens) in enumerate(zip(lease.rows, lease["response.tokens"].unbind(), strict=True)):
            try:
                told = told_of(lease, index, self._decode, tokens)
            except Exception as error:  # noqa: BLE001 - the user's own tokenizer; the row is counted as failed
                yield Result(row, None, why=f"the tokenizer raised {type(error).__name__}: {error}")
                continue
            future = self._pool.submit(*told)
            try:
                while not concurrent.futures.wait([future], _LOOK_S).done:
                    yield None
                yield Result(row, {"reward": future.result()}, len(tokens))
            except RewardError as error:
                yield Result(row, None, why=str(error))
            finally:
                future.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings(Job):
    """What a reward worker's process must know.

    Attributes:
        reward: a function of prompt, completion and row.
        decode: a completion's text.
        num_processes: in which rewards are computed.
        timeout_s: how long a reward may take.
    """

    role: ClassVar[str] = "reward"
    reward: RewardFn
    decode: Callable[[list[int]], str]
    num_processes: int
    timeout_s: float

    def run(
        self,
        prepared: None,
        queue: QueueVerbs,
        weights: Mapping[str, WeightsAddress],
        begin: Begin,
        stop: threading.Event,
    ) -> None:
        """Score until the stream ends."""
        with RewardPool(self.reward, num_workers=self.num_processes, timeout_s=self.timeout_s) as pool:
            stage = RewardStage(pool, self.decode)
            workers = [
                StageWorker(queue, REWARD, REWARD_FIELDS, stage, count=_LEASED_ROWS) for _ in range(self.num_processes)
            ]
            begin(*(worker.statistics for worker in workers))
            with concurrent.futures.ThreadPoolExecutor(len(workers)) as threads:
                for over in [threads.submit(worker.run, stop) for worker in workers]:
                    over.result()
