"""Completions wait for their rewards beside decoding, and keep their leases."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_flashrl.engines import Sampling
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.rewards import RewardPool
from lightning_flashrl.engines.rollout import RolloutSpeed, SimulatedEngine
from lightning_flashrl.engines.worker import RolloutWorker
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.streaming import QueueVerbs, TransferQueue
from lightning_flashrl.tasks import Problem
from tests.engines import rewards

TASKS: dict[str, Any] = {"rollout": ["prompt"], "update": ["prompt", "response", "policy_version", "reward"]}


def _engine(sleep: Callable[[float], None] = lambda seconds: None) -> SimulatedEngine:
    sampling = Sampling(max_new_tokens=4)
    return SimulatedEngine(sampling, vocabulary=20, speed=RolloutSpeed(tokens_per_s=1), num_slots=4, sleep=sleep)


def _put(queue: QueueVerbs, rows: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """A prompt each, for which the reward does what its row says."""
    count = len(rows)
    tokens = [torch.tensor([2 + number % 18]) for number in range(count)]
    return queue.put(prompt_rows(tokens, [Problem("", "", row) for row in rows], group_size=1, first_group=0))


def _words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _worker(queue: QueueVerbs, reward: Any, engine: SimulatedEngine | None = None) -> RolloutWorker:
    return RolloutWorker(queue, engine or _engine(), reward, _words, num_places=4)


def _rewards(queue: TransferQueue, count: int) -> dict[int, float]:
    lease = queue.lease("update", count=count, timeout_s=30)
    queue.commit(lease)
    return dict(zip(lease.rows, lease["reward"], strict=True))


def test_rows_are_scored_as_without_a_pool() -> None:
    found = []
    with RewardPool(rewards.by_row, num_workers=2, timeout_s=60) as pool:
        for reward in (pool, rewards.by_row):
            with TransferQueue(EXPERIENCE, TASKS) as queue:
                rows = _put(queue, [{"do": str(number / 4)} for number in range(40)])
                queue.close()
                worker = _worker(queue, reward)
                worker.run()
                assert worker.statistics.num_completions == 40
                assert worker.statistics.num_tokens == 160
                found.append(_rewards(queue, 40))
            assert found[-1] == {row: number / 4 for number, row in enumerate(rows)}


def test_failed_rewards_cost_their_rows_and_leases_last() -> None:
    """The lease time is over long before the time-out of a reward is."""
    actions = ["0.5", "raise", "hang", "0.25", "exit", "nan", "hang in c", "1", "segv", "2"]
    with (
        TransferQueue(EXPERIENCE, TASKS, lease_timeout_s=1.5) as queue,
        RewardPool(rewards.by_row, num_workers=2, timeout_s=4) as pool,
    ):
        rows = _put(queue, [{"do": action} for action in actions])
        queue.close()
        worker = _worker(queue, pool)
        worker.run()
        assert worker.statistics.num_failed == 6
        assert worker.statistics.num_completions == 4
        assert worker.statistics.num_lost == 0
        assert _rewards(queue, 4) == {rows[0]: 0.5, rows[3]: 0.25, rows[7]: 1.0, rows[9]: 2.0}
        assert queue.statistics().num_rows == 0


def test_decoding_goes_on_beside_a_slow_reward(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go")}
    with (
        TransferQueue(EXPERIENCE, TASKS) as queue,
        RewardPool(rewards.by_row, num_workers=2, timeout_s=600) as pool,
    ):
        rows = _put(queue, [slow, *[{"do": "1"}] * 20])
        queue.close()
        worker = _worker(queue, pool)
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert _rewards(queue, 20) == dict.fromkeys(rows[1:], 1.0)
        (tmp_path / "go").touch()
        thread.join()
        assert _rewards(queue, 1) == {rows[0]: 0.5}


def test_no_more_rows_wait_for_rewards_than_there_are_places(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go"), "path": str(tmp_path / "begun")}
    with (
        TransferQueue(EXPERIENCE, TASKS) as queue,
        RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool,
    ):
        _put(queue, [slow] * 30)
        queue.close()
        engine = _engine()
        worker = _worker(queue, pool, engine)
        most, idle_steps = 0, 0
        submit, step = pool.submit, engine.step
        waiting: list[Any] = []

        def count_waiting(*arguments: Any) -> Any:
            nonlocal most
            waiting.append(submit(*arguments))
            most = max(most, len(waiting)) if not (tmp_path / "go").exists() else most
            return waiting[-1]

        def count_idle_steps() -> Any:
            nonlocal idle_steps
            idle_steps += engine.num_open == 0
            if idle_steps == 3:  # the worker begins nothing new
                (tmp_path / "go").touch()
            return step()

        pool.submit = count_waiting  # type: ignore[method-assign]
        engine.step = count_idle_steps  # type: ignore[method-assign]
        worker.run()
        assert worker.statistics.num_completions == 30
        assert most == 4


def test_a_worker_that_is_stopped_gives_unscored_rows_back(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go"), "path": str(tmp_path / "begun")}
    stop = threading.Event()
    with TransferQueue(EXPERIENCE, TASKS) as queue:
        rows = _put(queue, [slow] * 6)
        with RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool:
            worker = _worker(queue, pool)
            thread = threading.Thread(target=worker.run, args=(stop,))
            thread.start()
            while not (tmp_path / "begun").exists():
                time.sleep(0.005)
            stop.set()
            thread.join()
        assert worker.statistics.num_completions == 0
        queue.close()
        (tmp_path / "go").touch()
        _worker(queue, rewards.by_row).run()
        assert _rewards(queue, 6) == dict.fromkeys(rows, 0.5)


def test_a_closed_pool_costs_no_rows(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go"), "path": str(tmp_path / "begun")}
    caught: list[BaseException] = []
    with TransferQueue(EXPERIENCE, TASKS, lease_timeout_s=0.5) as queue:
        rows = _put(queue, [slow] * 6)
        queue.close()
        pool = RewardPool(rewards.by_row, num_workers=1, timeout_s=600)

        def work() -> None:
            try:
                _worker(queue, pool).run()
            except ConfigurationError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not (tmp_path / "begun").exists():
            time.sleep(0.005)
        pool.close()
        thread.join()
        assert "pool is closed" in str(caught[0])
        (tmp_path / "go").touch()
        _worker(queue, rewards.by_row).run()
        assert _rewards(queue, 6) == dict.fromkeys(rows, 0.5)


def test_a_reward_process_that_is_killed_costs_one_row(tmp_path: Path) -> None:
    slow = {"do": "wait for a file", "until": str(tmp_path / "go"), "path": str(tmp_path / "begun")}
    with (
        TransferQueue(EXPERIENCE, TASKS) as queue,
        RewardPool(rewards.by_row, num_workers=1, timeout_s=600) as pool,
    ):
        rows = _put(queue, [slow, *[{"do": "1"}] * 5])
        queue.close()
        worker = _worker(queue, pool)
        thread = threading.Thread(target=worker.run)
        thread.start()
        while not (tmp_path / "begun").exists():
            time.sleep(0.005)
        os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)
        thread.join()
        assert worker.statistics.num_failed == 1
        assert _rewards(queue, 5) == dict.fromkeys(rows[1:], 1.0)


def test_rows_that_a_worker_leases_a_second_time_are_answered_once(tmp_path: Path) -> None:
    """The engine stalls: leases run out of rows that it decodes, and of two that wait for their rewards."""
    steps = 0

    def sleep(_: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            time.sleep(0.7)
        if steps == 12:
            (tmp_path / "go").touch()

    slow = {"do": "wait for a file", "until": str(tmp_path / "go")}
    with (
        TransferQueue(EXPERIENCE, TASKS, lease_timeout_s=0.3) as queue,
        RewardPool(rewards.by_row, num_workers=4, timeout_s=600) as pool,
    ):
        rows = _put(queue, [*[slow] * 2, *[{"do": "1"}] * 20])
        queue.close()
        worker = _worker(queue, pool, _engine(sleep))
        worker.run()
        assert worker.statistics.num_completions == 22
        assert worker.statistics.num_failed == 0
        assert _rewards(queue, 22) == {**dict.fromkeys(rows, 1.0), rows[0]: 0.5, rows[1]: 0.5}
        assert queue.statistics().num_rows == 0
