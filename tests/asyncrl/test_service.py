"""The service's verbs, from the side of a training loop of one's own and of others who compute."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_flashrl.asyncrl import RLClient, RLService, StepSettings
from lightning_flashrl.errors import (
    ConfigurationError,
    QueueClosedError,
    SchemaMismatchError,
    WorkerFailedError,
    WouldBlock,
)
from lightning_flashrl.streaming import Lease, Ragged
from lightning_flashrl.tasks import CharacterTokenizer
from lightning_flashrl.weights import WeightReceiver

pytestmark = pytest.mark.timeout(120)
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plain_torch_grpo.py"
TOKENIZER = CharacterTokenizer("abc")
MODEL = torch.nn.Embedding(3, 3)


def score(tokens: torch.Tensor) -> torch.Tensor:
    return MODEL(tokens[:-1]).log_softmax(-1).gather(1, tokens[1:, None])[:, 0].detach()


def make(**settings: Any) -> RLService:
    settings.setdefault("steps", StepSettings(prompts=2, group_size=2, micro_batch_tokens=4))
    return RLService(TOKENIZER, **settings)


@pytest.fixture
def service() -> Iterator[RLService]:
    """Nobody generates and nobody scores but the test."""
    with make() as service:
        yield service


def begin(service: RLService, **settings: Any) -> Any:
    return service.init_engines(MODEL.state_dict(), score, None, **settings)


def roll_out(verbs: RLService | RLClient, count: int, version: int = 0) -> int:
    """Answer prompts with their first token."""
    lease = verbs.get_experience_data("rollout", count, timeout_s=10)
    assert lease is not None
    answers = [tokens[:1] for tokens in lease["prompt.tokens"].unbind()]
    data = {
        "response.tokens": answers,
        "response.rollout_logprobs": [[-1.0]] * len(lease),
        "response.versions": [[version]] * len(lease),
        "response.is_complete": [True] * len(lease),
        "policy_version": [version] * len(lease),
    }
    verbs.put_experience_data(lease, data)
    return len(lease)


def judge(verbs: RLService | RLClient, count: int) -> None:
    lease = verbs.get_experience_data("reward", count, timeout_s=10)
    assert lease is not None
    verbs.put_experience_data(lease, {"reward": [float(text == "a") for text in lease["prompt.text"]]})


def rest(verbs: RLService | RLClient, task: str = "update") -> list[Lease]:
    found = []
    while (lease := verbs.get_experience_data(task, timeout_s=10)) is not None:
        found.append(lease)
    return found


def test_a_loop_without_lightning_learns() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    rewards = [float(line.split()[3]) for line in done.stdout.splitlines()]
    assert rewards[-1] > rewards[0] + 0.15


def test_a_step_goes_round(service: RLService) -> None:
    begin(service)
    assert service.put_prompts_data(["a", {"prompt": "b", "answer": "b"}]) <= 2
    roll_out(service, 4)
    judge(service, 4)
    leases = rest(service)
    assert [lease["reward"] for lease in leases] == [[1.0, 1.0], [0.0, 0.0]]
    assert service.weight_sync_notify() == service.version == 1
    assert service.session.books()["rows_committed"] == 4


def test_prompts_begin_within_the_bound_and_the_last_step_may_be_smaller(service: RLService) -> None:
    begin(service)
    service.put_prompts_data("abcab")
    while service.session.queue.statistics().tasks["rollout"].num_committed < 8:
        roll_out(service, 8)
    assert service.put_prompts_data([], is_last=True) == 1  # two steps of two prompts have begun
    num_trained = []
    for version in range(3):
        if version == 1:
            roll_out(service, 2, version)
        while service.session.queue.statistics().tasks["reward"].num_ready:
            judge(service, 8)
        num_trained.append(sum(map(len, rest(service))))
        service.weight_sync_notify()
    assert num_trained == [4, 4, 2]
    assert service.get_experience_data() is None
    with pytest.raises(QueueClosedError):
        service.put_prompts_data(["a"])


def test_other_processes_take_part(service: RLService) -> None:
    """A data-parallel rank gets what rank 0 does not, and engines find the weights."""
    address = pickle.loads(pickle.dumps(begin(service, probe=[0, 1, 2])))
    with RLClient(address, replica_rank=1) as client:
        service.put_prompts_data(["a", "b"])
        roll_out(client, 4)
        judge(client, 4)
        first, second = client.get_experience_data(), service.get_experience_data()
        assert first is not None
        assert second is not None
        assert set(first.rows).isdisjoint(second.rows)
        assert client.get_experience_data() is service.get_experience_data() is None
        version = service.weight_sync_notify()
        client.weight_sync_notify(version)
        assert client.version == 1
        assert service.session.books()["rows_committed"] == 4
    service.put_prompts_data(["a", "b"])  # the client's end is not the queue's
    assert roll_out(service, 4, version) == 4
    judge(service, 4)
    assert rest(service)
    engine = _Engine()
    with torch.no_grad():
        MODEL.weight.add_(torch.randn(3, 3))
    service.weight_sync_notify()
    with WeightReceiver(address.weights) as receiver:
        assert receiver.load(engine) == 2
    assert torch.equal(engine.weight, MODEL.weight)


class _Engine:
    version = -1

    def load_weights(self, weights: Any, version: int) -> None:
        self.weight, self.version = weights["weight"], version

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weight[tokens[:-1]].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def test_who_comes_later_begins_with_the_current_step(service: RLService) -> None:
    begin(service)
    service.put_prompts_data(["a", "b"])
    roll_out(service, 4)
    judge(service, 4)
    rest(service)
    service.weight_sync_notify()
    service.put_prompts_data(["a", "b"])
    with RLClient(pickle.loads(pickle.dumps(service.address))) as client:
        assert client.version == 1
        roll_out(client, 4, version=1)
        judge(client, 4)
        assert sum(map(len, rest(client))) == 4


def test_a_step_is_not_done_before_its_rows_were_taken(service: RLService) -> None:
    begin(service)
    service.put_prompts_data(["a", "b"])
    with pytest.raises(ConfigurationError, match="more rows for task 'update'"):
        service.weight_sync_notify()
    roll_out(service, 4)
    judge(service, 4)
    assert service.get_experience_data() is not None
    with pytest.raises(ConfigurationError, match="until it returns None"):
        service.weight_sync_notify()
    rest(service)
    assert service.weight_sync_notify() == 1
    assert service.session.books()["rows_committed"] == 4


def test_who_waits_for_prompts_that_nobody_gives_is_told(service: RLService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_flashrl.asyncrl.service._LONG_S", 0.1)
    begin(service)
    service.put_prompts_data(["a"])
    with pytest.warns(UserWarning, match="2 prompts waits, and there are 1"), pytest.raises(WouldBlock):
        service.get_experience_data(timeout_s=1)


def test_values_of_a_critic_of_ones_own(service: RLService) -> None:
    begin(service, has_critic=True)
    service.put_prompts_data(["a", "b"])
    roll_out(service, 4)
    judge(service, 4)
    for lease in rest(service, "critic"):
        lengths = lease["response.tokens"].lengths
        service.put_experience_data(lease, {"values": Ragged(torch.full((int(lengths.sum()),), 0.5), lengths)})
    for task in ("critic_update", "update"):
        assert [lease["values"].values.tolist() for lease in rest(service, task)] == [[0.5, 0.5]] * 2
    service.weight_sync_notify()
    assert service.session.queue.statistics().num_rows == 0


def test_who_waits_hears_of_workers_that_fail() -> None:
    def broken() -> Any:
        raise RuntimeError("no such accelerator")

    with make(reward=lambda *_: 1.0) as service:
        service.init_engines(MODEL.state_dict(), score, broken)
        service.put_prompts_data(["a", "b"])  # a whole step: what is missing are rows
        with pytest.raises(WorkerFailedError, match="no such accelerator"):
            service.get_experience_data()


def test_closing_wakes_nobody_up_for_nothing() -> None:
    """Prompts that never began are forgotten, and no thread is left."""
    before = threading.active_count()
    with make() as service:
        begin(service)
        service.put_prompts_data("abc" * 100)
    assert threading.active_count() == before


def test_what_cannot_be_is_refused(service: RLService) -> None:
    for verb in (service.get_experience_data, service.weight_sync_notify):
        with pytest.raises(ConfigurationError, match="call init_engines"):
            verb()
    begin(service)
    with pytest.raises(ConfigurationError, match="call init_engines\\(\\) once"):
        begin(service)
    with pytest.raises(ConfigurationError, match="leave count=3 out"):
        service.get_experience_data("update", 3)
    with pytest.raises(ConfigurationError, match="give count="):
        service.get_experience_data("rollout")
    with pytest.raises(ConfigurationError, match="critic"):
        service.get_experience_data("critic", 1)
    with pytest.raises(WouldBlock):
        service.get_experience_data(timeout_s=0.05)
    with pytest.raises(SchemaMismatchError, match="prompt"):
        service.put_prompts_data([3])
    service.put_prompts_data(["a", "b"])
    lease = service.get_experience_data("rollout", 1, timeout_s=10)
    assert lease is not None
    with pytest.raises(SchemaMismatchError):
        service.put_experience_data(lease, {"response.tokens": [["x"]]})
    for settings in ({"workflow": "fast"}, {"max_staleness": -1}):
        with pytest.raises(ConfigurationError):
            make(**settings)
