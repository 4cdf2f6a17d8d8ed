"""What a worker has begun is gone on with by the next one, token for token."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_flashrl.engines import Completion, Prompt, Sampling
from lightning_flashrl.engines import drafts as drafts_module
from lightning_flashrl.engines.drafts import Drafts, DraftsAddress
from lightning_flashrl.engines.experience import EXPERIENCE, prompt_rows
from lightning_flashrl.engines.fleet import Team, WorkerFleet
from lightning_flashrl.engines.process import POLICY, Surroundings, WorkerSettings
from lightning_flashrl.engines.rollout import RolloutSpeed, SimulatedEngine, SlotDecoder
from lightning_flashrl.streaming import TransferQueue, TransferQueueServer
from lightning_flashrl.tasks import CharacterTokenizer, DigitSort
from lightning_flashrl.weights import Swap, WeightPublisher

TASK = DigitSort(max_digits=4)
TOKENIZER = CharacterTokenizer(TASK.alphabet)
SAMPLING = Sampling(max_new_tokens=40)
PROMPTS = [Prompt(number, torch.tensor([1, 2 + number]), seed=number) for number in range(3)]


def _decoder() -> SlotDecoder:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    return SlotDecoder(model, SAMPLING, num_slots=2, max_length=64)  # one prompt waits


def _simulated() -> SimulatedEngine:
    return SimulatedEngine(SAMPLING, vocabulary=11, num_slots=2)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "_KEEP_S", 0.0)


def _address(drafts: Drafts) -> DraftsAddress:
    here = drafts.address
    return DraftsAddress(os.getpid(), here.fd, here.num_places, here.max_tokens, here.mark)


def _left_by(engine: Any, num_steps: int, **options: Any) -> Drafts:
    """Go some steps, and return what the next worker knows."""
    drafts = Drafts(SAMPLING, 3, may_mix=options.pop("may_mix", False))
    engine.submit(PROMPTS)
    for _ in range(num_steps):
        engine.step()
        drafts.keep(engine)
    following = Drafts(SAMPLING, 3, may_mix=drafts._may_mix)
    following.learn([_address(drafts), _address(following)])
    drafts.close()
    return following


def _run(engine: Any, prompts: list[Prompt]) -> dict[int, Completion]:
    engine.submit(prompts)
    found: dict[int, Completion] = {}
    while engine.num_open:
        found.update({completion.request_id: completion for completion in engine.step()})
    return found


@pytest.mark.parametrize("make_engine", [_decoder, _simulated])
@pytest.mark.parametrize("num_steps", [5, 60])
def test_a_completion_that_is_gone_on_with_is_the_one_that_was_never_interrupted(
    make_engine: Callable[[], Any], num_steps: int
) -> None:
    following = _left_by(make_engine(), num_steps)
    prompts = [following.begun(prompt, 0, 0) for prompt in PROMPTS]
    assert [prompt.begun is not None for prompt in prompts] == (
        [True, True, False] if num_steps == 5 else [False, False, True]
    )
    resumed, whole = _run(make_engine(), prompts), _run(make_engine(), PROMPTS)
    for number in range(3):
        assert torch.equal(resumed[number].tokens, whole[number].tokens)
        assert torch.equal(resumed[number].versions, whole[number].versions)
        torch.testing.assert_close(resumed[number].logprobs, whole[number].logprobs)
    following.close()


def test_drafts_of_which_nobody_speaks_any_more_are_kept_for_a_while() -> None:
    """The fleet was killed together with a worker: the next one has never heard of that."""
    following = _left_by(_simulated(), 5)
    books = [Drafts(SAMPLING, 3, may_mix=False) for _ in range(drafts_module.MAX_BOOKS + 1)]
    for number in range(len(books)):
        assert following.begun(PROMPTS[0], 0, 0).begun is not None
        following.learn([_address(books[number])])
    following.learn([])
    assert following.begun(PROMPTS[0], 0, 0).begun is None
    for drafts in (*books, following):
        drafts.close()


def test_the_longest_of_several_drafts_is_gone_on_with() -> None:
    """One worker has gone on with what another had begun; both are gone."""
    books = []
    following = Drafts(SAMPLING, 3, may_mix=False)
    for num_steps in (5, 9, 7):
        engine = _simulated()
        books.append(Drafts(SAMPLING, 3, may_mix=False))
        engine.submit(PROMPTS[:1])
        for _ in range(num_steps):
            engine.step()
        books[-1].keep(engine)
    following.learn([_address(drafts) for drafts in books])
    begun = following.begun(PROMPTS[0], 0, 0).begun
    assert begun is not None
    assert len(begun.tokens) == 9
    for drafts in (*books, following):
        drafts.close()


@pytest.mark.parametrize(
    ("may_mix", "min_version", "version", "is_resumed"),
    [(False, 0, 0, True), (False, 0, 1, False), (True, 0, 1, True), (True, 1, 1, False)],
)
def test_what_an_older_policy_has_begun(may_mix: bool, min_version: int, version: int, is_resumed: bool) -> None:
    following = _left_by(_simulated(), 5, may_mix=may_mix)
    assert (following.begun(PROMPTS[0], min_version, version).begun is not None) == is_resumed
    following.close()


def test_drafts_that_are_gone_are_not_looked_for() -> None:
    drafts = Drafts(SAMPLING, 3, may_mix=False)
    address = _address(drafts)
    drafts.close()
    following = Drafts(SAMPLING, 3, may_mix=False)
    following.learn([address])
    assert following.begun(PROMPTS[0], 0, 0) is PROMPTS[0]
    following.close()


@pytest.mark.parametrize("case", ["killed", "killed beside an idle one", pytest.param("left", marks=pytest.mark.slow)])
def test_another_worker_goes_on(case: str) -> None:
    """A worker is killed, or leaves, in the middle of long completions. An idle one gets its prompts at once."""
    rows = 8
    probe = torch.tensor([1, 2, 3])
    make_engine = functools.partial(
        SimulatedEngine,
        Sampling(max_new_tokens=200),
        vocabulary=len(TOKENIZER),
        speed=RolloutSpeed(tokens_per_s=100),
        num_slots=rows,
    )
    reference = make_engine(speed=RolloutSpeed())
    weights = {name: weight.clone() for name, weight in reference._policy.state_dict().items()}
    job = WorkerSettings(
        swap=Swap.ITERATION, make_engine=make_engine, reward=None, decode=TOKENIZER.decode, num_places=rows
    )
    fields = ("response", "policy_version")
    problems = [TASK.problem(number) for number in range(rows)]
    tokens = [torch.tensor(TOKENIZER.encode(problem.prompt)) for problem in problems]
    columns = prompt_rows(tokens, problems, group_size=1, first_group=0)
    with (
        TransferQueue(EXPERIENCE, {"rollout": ["prompt"], "update": fields}) as queue,
        TransferQueueServer(queue) as server,
        WeightPublisher(weights) as publisher,
    ):
        publisher.publish(weights, 0, probe, reference.score(probe))
        publisher.wait()
        surroundings = Surroundings(server.endpoint, server.secret, {POLICY: publisher.address})
        num_idle = int("idle" in case)
        with WorkerFleet(Team.of(job, 1 + num_idle, num_standby=1 - num_idle), surroundings) as fleet:
            _await(lambda: [record.state for record in fleet.records()].count("serving") == 1 + num_idle)
            queue.put(columns)
            _await(lambda: queue.statistics().tasks["rollout"].num_leased == rows)
            _await(lambda: num_idle > 0 or any(record.state == "standby" for record in fleet.records()))
            time.sleep(0.5)
            victim = max(fleet.records(), key=lambda record: record.statistics.busy_s)
            assert victim.state == "serving"
            if case != "left":
                os.kill(victim.pid, signal.SIGKILL)
            else:
                fleet.scale(0)
                _await(lambda: victim.state == "ended")
                fleet.scale(1)
            lease = queue.lease("update", count=rows, timeout_s=60)
            _await(lambda: sum(record.statistics.num_completions for record in fleet.records()) == rows)
            assert sum(record.statistics.num_resumed for record in fleet.records()) == rows
    whole = _run(reference, [Prompt(row, tokens[row], columns["prompt.seed"][row]) for row in range(rows)])
    for row, found in zip(lease.rows, lease["response.tokens"].unbind(), strict=True):
        assert torch.equal(found, whole[row].tokens)


def _await(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.02)
