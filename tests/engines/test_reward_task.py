"""Rewards as a task of their own: what fails costs its row, leases last, and nothing is lost when somebody ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.reward_task import REWARD_FIELDS, RewardSettings, RewardStage
from lightning_flashrl.engines.rewards import RewardPool
from lightning_flashrl.engines.stage import StageWorker
from lightning_flashrl.engines.worker import WorkerStatistics, total
from lightning_flashrl.streaming import TransferQueue
from lightning_flashrl.tasks import Problem
from tests.engines import rewards

TASKS: dict[str, Any] = {"rollout": ["prompt"], "reward": REWARD_FIELDS, "update": ["prompt", "response", "reward"]}


def _put(queue: TransferQueue, rows: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """A completion each, for which the reward does what its row says; no more come."""
    count = len(rows)
    tokens = [torch.tensor([2 + number % 18]) for number in range(count)]
    put = queue.put(prompt_rows(tokens, [Problem("", "", row) for row in rows], group_size=1, first_group=0))
    queue.commit(
        queue.lease("rollout", count=count),
        {
            "response.tokens": tokens,
            "response.rollout_logprobs": [torch.full((1,), -1.0)] * count,
            "response.versions": [torch.zeros(1, dtype=torch.int64)] * count,
            "response.is_complete": [True] * count,
            "policy_version": [0] * count,
        },
    )
    queue.close()
    return put


def _words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _worker(queue: TransferQueue, pool: RewardPool, count: int = 4) -> StageWorker:
    return StageWorker(queue, "reward", REWARD_FIELDS, RewardStage(pool, _words), count=count)


def _rewards(queue: TransferQueue, count: int) -> dict[int, float]:
    lease = queue.lease("update", count=count, timeout_s=30)
    queue.commit(lease)
    return dict(zip(lease.rows, lease["reward"], strict=True))


def _wait_for(path: Path) -> None:
    while not path.exists() or not path.read_text():
        time.sleep(0.005)


def test_failed_rewards_cost_their_rows_and_leases_last() -> None:
    """The lease time is over long before the time-out of a reward is."""
    actions = ["0.5", "raise", "hang", "0.25", "exit", "nan", "hang in c", "1", "segv", "2"]
    with (
        TransferQueue(EXPERIENCE, TASKS, lease_timeout_s=1.5) as queue,
        RewardPool(rewards.by_row, num_workers=2, timeout_s=4) as pool,
    ):
        rows = _put(queue, [{"do": action} for action in actions])
        workers = [_worker(queue, pool) for _ in range(2)]
        with ThreadPoolExecutor() as threads:
            for over in [threads.submit(worker.run) for worker in workers]:
                over.result()
        done = total([worker.statistics for worker in workers])
        assert (done.num_completions, done.num_failed, done.num_lost) == (4, 6, 0)
        assert _rewards(queue, 4) == {rows[0]: 0.5, rows[3]: 0.25, rows[7]: 1.0, rows[9]: 2.0}
        assert queue.statistics().num_rows == 0


def test_others_are_scored_beside_a_slow_reward(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go")}
    found: list[WorkerStatistics] = []
    with TransferQueue(EXPERIENCE, TASKS) as queue:
        rows = _put(queue, [slow, *[{"do": "1"}] * 40])
        job = RewardSettings(reward=rewards.by_row, decode=_words, num_processes=2, timeout_s=600)
        begin = lambda *told: found.extend(told)  # noqa: E731
        thread = threading.Thread(target=job.run, args=(None, queue, {}, begin, threading.Event()))
        thread.start()
        others = _rewards(queue, 33)  # seven wait behind the slow one
        assert rows[0] not in others
        (tmp_path / "go").touch()
        thread.join()
        assert _rewards(queue, 8)[rows[0]] == 0.5
    assert total(found).num_completions == 41


@pytest.mark.parametrize("ends", ["stop", "pool"])
def test_a_worker_that_ends_gives_unscored_rows_back(tmp_path: Path, ends: str) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go"), "path": str(tmp_path / "begun")}
    stop = threading.Event()
    with TransferQueue(EXPERIENCE, TASKS) as queue, ThreadPoolExecutor() as threads:
        rows = _put(queue, [slow] * 6)
        with RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool:
            worker = _worker(queue, pool)
            over = threads.submit(worker.run, stop)
            _wait_for(tmp_path / "begun")
            if ends == "stop":
                stop.set()
                over.result()
        assert (over.exception(timeout=30) is None) == (ends == "stop")
        assert (worker.statistics.num_completions, worker.statistics.num_failed) == (0, 0)
        (tmp_path / "go").touch()
        with RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool:
            _worker(queue, pool).run()
        assert _rewards(queue, 6) == dict.fromkeys(rows, 0.5)


def test_a_reward_process_that_is_killed_costs_one_row(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go"), "path": str(tmp_path / "begun")}
    with (
        TransferQueue(EXPERIENCE, TASKS) as queue,
        RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool,
        ThreadPoolExecutor() as threads,
    ):
        rows = _put(queue, [slow, *[{"do": "1"}] * 5])
        worker = _worker(queue, pool)
        over = threads.submit(worker.run)
        _wait_for(tmp_path / "begun")
        os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)
        over.result()
        assert worker.statistics.num_failed == 1
        assert _rewards(queue, 5) == dict.fromkeys(rows[1:], 1.0)


def test_a_tokenizer_that_raises_costs_the_row() -> None:
    def decode(tokens: list[int]) -> str:
        if tokens == [3]:
            raise KeyError(tokens[0])
        return ""

    with (
        TransferQueue(EXPERIENCE, TASKS) as queue,
        RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool,
    ):
        rows = _put(queue, [{"do": "1"}] * 3)
        worker = StageWorker(queue, "reward", REWARD_FIELDS, RewardStage(pool, decode), count=4)
        worker.run()
        assert worker.statistics.num_failed == 1
        assert _rewards(queue, 2) == {rows[0]: 1.0, rows[2]: 1.0}
