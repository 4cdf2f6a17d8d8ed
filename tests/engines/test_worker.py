"""A worker's rows: each prompt answered once, scored rightly, under the weights that it says."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_flashrl.engines import Sampling
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.rollout import SlotDecoder
from lightning_flashrl.engines.worker import RolloutWorker
from lightning_flashrl.errors import EndOfStream
from lightning_flashrl.streaming import (
    Lease,
    PromptGroups,
    QueueVerbs,
    Task,
    TransferQueue,
    TransferQueueClient,
    TransferQueueServer,
)
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort, Problem
from lightning_flashrl.weights import Swap, WeightPublisher, WeightReceiver

TASK = DigitSort(max_digits=4)
TOKENIZER = CharacterTokenizer(TASK.alphabet)
SAMPLING = Sampling(max_new_tokens=6, eos_token_id=TOKENIZER.eos_token_id)
FIELDS = ("prompt", "response", "policy_version", "reward")
TASKS: dict[str, Any] = {"rollout": ["prompt"], "update": FIELDS}


def _model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def _engine(seed: int = 0, num_slots: int = 4) -> SlotDecoder:
    return SlotDecoder(_model(seed), SAMPLING, num_slots=num_slots, max_length=16)


def _put(queue: QueueVerbs, count: int, group_size: int = 2, first: int = 0) -> tuple[int, ...]:
    problems = [TASK.problem(first + number) for number in range(count)]
    return queue.put(
        prompt_rows(
            [torch.tensor(TOKENIZER.encode(problem.prompt)) for problem in problems],
            problems,
            group_size=group_size,
            first_group=first,
        )
    )


def _worker(queue: QueueVerbs, engine: SlotDecoder, **options: Any) -> RolloutWorker:
    options.setdefault("reward", TASK.reward)
    return RolloutWorker(queue, engine, decode=TOKENIZER.decode, num_places=4, **options)


def _rows(queue: QueueVerbs) -> Iterator[tuple[Lease, int]]:
    while True:
        try:
            lease = queue.lease("update", count=1)
        except EndOfStream:
            return
        queue.commit(lease)
        yield lease, lease.rows[0]


def test_each_prompt_is_answered_once_and_scored() -> None:
    with TransferQueue(EXPERIENCE, TASKS) as queue:
        rows = _put(queue, 10)
        queue.close()
        worker = _worker(queue, _engine())
        worker.run()
        assert worker.statistics.num_completions == 20
        model = _model(0).eval()
        seen = []
        for lease, row in _rows(queue):
            seen.append(row)
            prompt, tokens = lease["prompt.tokens"].values, lease["response.tokens"].values
            text = TOKENIZER.decode(tokens.tolist())
            assert lease["reward"] == [float(text == "".join(sorted(lease["prompt.text"][0][:-1])))]
            assert lease["response.is_complete"] == [tokens[-1].item() == TOKENIZER.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, tokens])[None, :-1]).logits[0]
            expected = logits.log_softmax(-1)[len(prompt) - 1 :].gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(lease["response.rollout_logprobs"].values, expected, atol=1e-5, rtol=1e-4)
            assert not lease["response.versions"].values.any()
        assert tuple(seen) == rows


def test_rows_of_one_prompt_differ_and_a_run_can_be_repeated() -> None:
    found = []
    for num_slots in (4, 2):
        with TransferQueue(EXPERIENCE, TASKS) as queue:
            _put(queue, 6, group_size=4)
            queue.close()
            _worker(queue, _engine(num_slots=num_slots)).run()
            found.append([lease["response.tokens"].values.tolist() for lease, _ in _rows(queue)])
    assert found[0] == found[1]
    assert any(found[0][4 * group : 4 * group + 1] * 4 != found[0][4 * group : 4 * group + 4] for group in range(6))


def test_a_reward_that_raises_costs_its_row_and_nothing_else() -> None:
    calls = 0

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError
        return float("nan") if calls == 6 else 0.5

    tasks = {**TASKS, "update": Task(FIELDS, PromptGroups(4, "prompt.group_id"))}
    with TransferQueue(EXPERIENCE, tasks) as queue:
        _put(queue, 5, group_size=4)
        queue.close()
        worker = _worker(queue, _engine(), reward=reward)
        worker.run()
        assert worker.statistics.num_failed == 2
        assert worker.statistics.num_completions == 18
        lease = queue.lease("update", count=20, timeout_s=10)
        assert len(lease) == 18
        queue.commit(lease)
        assert queue.statistics().num_rows == 0


def test_a_reward_gets_all_that_its_problem_knows() -> None:
    known: list[dict[str, Any]] = []

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        known.append(dict(row))
        return 1.0

    with TransferQueue(EXPERIENCE, TASKS) as queue:
        queue.put(
            prompt_rows(
                [torch.tensor([3]), torch.tensor([4])],
                [Problem("a", "1", {"level": 3, "name": "ä"}), Problem("b", "2")],
                group_size=2,
                first_group=0,
            )
        )
        queue.close()
        _worker(queue, _engine(), reward=reward).run()
    assert sorted(known, key=lambda row: str(row["answer"])) == [
        {"level": 3, "name": "ä", "answer": "1"},
        {"level": 3, "name": "ä", "answer": "1"},
        {"answer": "2"},
        {"answer": "2"},
    ]


def test_rows_that_are_cleared_while_they_are_generated_are_let_go() -> None:
    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        number = len(cleared)
        if number < 4:
            cleared.append(rows[number])
            queue.clear([rows[number]])
        if number == 2:
            raise ZeroDivisionError
        return 1.0

    cleared: list[int] = []
    with TransferQueue(EXPERIENCE, TASKS) as queue:
        rows = _put(queue, 6)
        queue.close()
        worker = _worker(queue, _engine(), reward=reward)
        worker.run()
        done = worker.statistics
        assert done.num_completions + done.num_lost + done.num_failed == 12
        assert {row for _, row in _rows(queue)} == set(rows) - set(cleared)
        assert queue.statistics().num_rows == 0


def test_a_worker_that_is_stopped_gives_its_prompts_back() -> None:
    with TransferQueue(EXPERIENCE, TASKS) as queue:
        _put(queue, 3)
        stop = threading.Event()
        worker = _worker(queue, _engine())
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        while worker.statistics.num_completions < 2:
            time.sleep(0.001)
        stop.set()
        thread.join()
        queue.close()
        _worker(queue, _engine()).run()
        assert len(list(_rows(queue))) == 6


@pytest.mark.parametrize("swap", list(Swap))
def test_versions_are_those_of_the_weights(swap: Swap) -> None:
    """Every token's log-prob is that of the version that it names."""
    models = [_model(seed).eval() for seed in range(4)]
    probe = torch.arange(2, 8)
    engine = _engine(0)
    engine.recompute_cache = True
    with (
        TransferQueue(EXPERIENCE, TASKS) as queue,
        WeightPublisher(models[0].state_dict()) as publisher,
        WeightReceiver(publisher.address, swap) as receiver,
    ):
        worker = _worker(queue, engine, receiver=receiver)
        thread = threading.Thread(target=worker.run)
        thread.start()
        for version in range(1, 4):
            _put(queue, 12, first=100 * version)
            while queue.statistics().tasks["update"].num_ready < 24 * version - 12:
                time.sleep(0.0005)
            publisher.publish(models[version].state_dict(), version, probe, _score(models[version], probe))
            publisher.wait()
        queue.close()
        thread.join()
        assert worker.statistics.num_swaps == 3
        mixed = 0
        for lease, _ in _rows(queue):
            prompt, tokens = lease["prompt.tokens"].values, lease["response.tokens"].values
            versions = lease["response.versions"].values
            assert versions.tolist() == sorted(versions.tolist())
            assert lease["policy_version"] == [versions.min().item()]
            mixed += len(set(versions.tolist())) > 1
            scores = [_score(model, torch.cat([prompt, tokens]))[len(prompt) - 1 :] for model in models]
            expected = torch.stack([scores[version][at] for at, version in enumerate(versions.tolist())])
            torch.testing.assert_close(lease["response.rollout_logprobs"].values, expected, atol=1e-5, rtol=1e-4)
        assert (mixed > 0) == (swap is Swap.IN_FLIGHT)


def _score(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logprobs = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
    return logprobs.gather(1, tokens[1:, None])[:, 0]


def _run_worker(client: TransferQueueClient) -> None:
    torch.set_num_threads(1)
    with client:
        _worker(client, _engine()).run()


def test_prompts_of_a_killed_worker_are_answered_by_another() -> None:
    context = multiprocessing.get_context("spawn")
    with (
        TransferQueue(EXPERIENCE, TASKS, num_storage_units=1) as queue,
        TransferQueueServer(queue) as server,
        TransferQueueClient(server.endpoint, server.secret) as client,
    ):
        rows = _put(client, 400)
        client.close()
        workers = [context.Process(target=_run_worker, args=(client,)) for _ in range(2)]
        for worker in workers:
            worker.start()
        while queue.statistics().tasks["update"].num_ready < 60:
            time.sleep(0.001)
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].join()
        seen = [row for _, row in _rows(client)]
        workers[1].join()
        assert workers[1].exitcode == 0
        assert sorted(seen) == list(rows)


def test_any_seed_of_a_run_gives_rows_their_own() -> None:
    seeds = [
        prompt_rows([torch.tensor([1])] * 2, [Problem("a", "")] * 2, group_size=2, first_group=3, seed=seed)[
            "prompt.seed"
        ]
        for seed in (0, 1, -1, 2**31, 2**70 + 5)
    ]
    drawn = {torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for row in seeds for seed in row}
    assert len(drawn) == 5 * 4
