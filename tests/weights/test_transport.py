"""Versions arrive whole, in order and provably, whoever writes, reads or dies meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from lightning_flashrl.errors import ConfigurationError, WeightMismatchError
from lightning_flashrl.weights import Swap, WeightPublisher, WeightReceiver, WeightsAddress, keep
from lightning_flashrl.weights.publisher import SEQUENCE

PROBE = torch.arange(6)


class Bigrams(nn.Module):
    """The smallest language model: a table, and an output head that may be tied to it."""

    def __init__(self, size: int = 8, *, is_tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(size, 16)
        self.head = nn.Linear(16, size, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def score(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logprobs = self.head(self.table(tokens[:-1])).log_softmax(-1)
        return logprobs.gather(1, tokens[1:, None])[:, 0]


class Engine:
    """Loads what it is given."""

    def __init__(self, *, is_tied: bool = False) -> None:
        self.version = -1
        self.model = Bigrams(is_tied=is_tied)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.model.load_state_dict(dict(weights))
        self.version = version

    def score(self, tokens: Tensor) -> Tensor:
        return self.model.score(tokens)


class ForgetfulEngine(Engine):
    """Keeps its first output head, as an engine with tied embeddings was seen to do."""

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        head = self.model.head.weight.detach().clone()
        self.model.head.weight = nn.Parameter(self.model.head.weight.detach().clone())  # no longer tied
        super().load_weights({**weights, "head.weight": head}, version)


def _model(seed: int, *, is_tied: bool = False) -> Bigrams:
    torch.manual_seed(seed)
    return Bigrams(is_tied=is_tied)


def _publish(publisher: WeightPublisher, model: Bigrams, version: int) -> None:
    publisher.publish(model.state_dict(), version, PROBE, model.score(PROBE))


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_engine_gets_the_newest_version(is_tied: bool) -> None:
    model = _model(0, is_tied=is_tied)
    engine = Engine(is_tied=is_tied)
    with WeightPublisher(model.state_dict()) as publisher, WeightReceiver(publisher.address) as receiver:
        assert receiver.newest_version == -1
        assert not receiver.maybe_swap(engine, is_between_iterations=True)
        for version in range(5):
            model = _model(version, is_tied=is_tied)
            _publish(publisher, model, version)
            publisher.wait()
            assert receiver.newest_version == version
            assert receiver.maybe_swap(engine, is_between_iterations=True)
            assert engine.version == version
            assert not receiver.maybe_swap(engine, is_between_iterations=True)
            assert all(torch.equal(mine, model.state_dict()[name]) for name, mine in engine.model.state_dict().items())


def test_many_kinds_of_weights_arrive_bit_for_bit() -> None:
    weights = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(3),
        "d": torch.zeros(0, 4),
        "e": torch.randn(4, 6).t(),
        "f": torch.tensor([True, False]),
    }
    with WeightPublisher(weights) as publisher, WeightReceiver(publisher.address) as receiver:
        publisher.publish(weights, 0, PROBE, torch.zeros(5))
        publisher.wait()
        found, version, tokens, logprobs = receiver._read()
        assert version == 0
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert all(found[name].dtype == weights[name].dtype for name in weights)
        assert torch.equal(tokens, PROBE)
        assert torch.equal(logprobs, torch.zeros(5))


def test_an_engine_that_keeps_an_old_copy_is_found_out() -> None:
    model = _model(1, is_tied=True)
    engine = ForgetfulEngine(is_tied=True)
    with WeightPublisher(model.state_dict()) as publisher, WeightReceiver(publisher.address) as receiver:
        _publish(publisher, model, 3)
        publisher.wait()
        with pytest.raises(WeightMismatchError, match="after loading version 3"):
            receiver.load(engine)


def test_delayed_updates_wait_for_the_end_of_an_iteration() -> None:
    model, engine = _model(0), Engine()
    with WeightPublisher(model.state_dict()) as publisher:
        _publish(publisher, model, 0)
        publisher.wait()
        with WeightReceiver(publisher.address, Swap.ITERATION) as receiver:
            assert not receiver.maybe_swap(engine, is_between_iterations=False)
        with WeightReceiver(publisher.address, Swap.IN_FLIGHT) as receiver:
            assert receiver.maybe_swap(engine, is_between_iterations=False)


class SlowEngine(Engine):
    def __init__(self, inside: list[int], log: list[int]) -> None:
        super().__init__()
        self.inside, self.log = inside, log

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.inside.append(1)
        self.log.append(len(self.inside))
        time.sleep(0.05)
        super().load_weights(weights, version)
        self.inside.pop()


def test_staggered_workers_take_turns() -> None:
    model = _model(0)
    inside: list[int] = []
    log: list[int] = []
    with WeightPublisher(model.state_dict()) as publisher:
        _publish(publisher, model, 0)
        publisher.wait()

        def work() -> None:
            engine = SlowEngine(inside, log)
            with WeightReceiver(publisher.address, Swap.STAGGERED) as receiver:
                while not receiver.maybe_swap(engine, is_between_iterations=True):
                    time.sleep(0.001)  # goes on with its old weights

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert log == [1, 1, 1, 1]


def _receive(address: WeightsAddress, until: int, gate: Any, out: Any) -> None:
    """Load as fast as possible; every version must be whole: all its values are its number."""
    torch.set_num_threads(1)
    seen = []
    with WeightReceiver(address) as receiver:
        gate.wait()
        while not seen or seen[-1] < until:
            if receiver.newest_version < 0:
                continue
            weights, version, tokens, logprobs = receiver._read()
            assert all(bool((weight == version).all()) for weight in weights.values())
            assert tokens.tolist() == [version, version]
            assert logprobs.tolist() == [float(version)]
            if not seen or version != seen[-1]:
                seen.append(version)
    out.put(seen)


def test_readers_in_other_processes_never_see_half_a_version() -> None:
    context = multiprocessing.get_context("spawn")
    last = 300
    weights = {f"w{number}": torch.zeros(40_000) for number in range(4)}
    with WeightPublisher(weights) as publisher:
        gate, out = context.Barrier(3), context.Queue()
        readers = [context.Process(target=_receive, args=(publisher.address, last, gate, out)) for _ in range(2)]
        for reader in readers:
            reader.start()
        gate.wait()
        version = 0
        while version <= last:
            publisher.wait()
            for weight in weights.values():
                weight.fill_(version)
            publisher.publish(weights, version, torch.tensor([version, version]), torch.tensor([float(version)]))
            version += 1
            time.sleep(0.002 if version < last - 50 else 0.02)
        publisher.wait()
        for _ in readers:
            seen = out.get(timeout=60)
            assert seen == sorted(set(seen))
            assert seen[-1] == last
            assert len(seen) > 10
        for reader in readers:
            reader.join()


def _publish_and_die(out: Any, go: Any, is_torn: bool) -> None:
    """Publish two versions; with ``is_torn``, die in the middle of a third."""
    weights = {"w": torch.zeros(1000)}
    publisher = WeightPublisher(weights)
    for version in (0, 1):
        publisher.publish({"w": torch.full((1000,), float(version))}, version, PROBE, torch.zeros(5))
        publisher.wait()
    out.put(publisher.address)
    go.wait()
    if is_torn:
        buffer = 1 - publisher._newest()
        publisher._records.numbers[buffer][SEQUENCE] += 1
        start = publisher.address.buffer_offset(buffer)
        publisher._memory.array[start : start + 2000] = 255
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_successor_goes_on_in_memory_that_somebody_has_kept(*, is_torn: bool) -> None:
    context = multiprocessing.get_context("spawn")
    out, go = context.Queue(), context.Event()
    process = context.Process(target=_publish_and_die, args=(out, go, is_torn))
    process.start()
    address = keep(out.get(timeout=60))
    with WeightReceiver(address) as receiver:
        go.set()
        process.join()
        with pytest.raises(ConfigurationError, match="cannot be kept"):
            keep(msgspec.structs.replace(address, pid=process.pid))
        assert receiver.newest_version == 1
        with WeightPublisher.attach(address) as successor:
            assert successor.version == 1
            for version in (2, 3):
                successor.publish({"w": torch.full((1000,), float(version))}, version, PROBE, torch.zeros(5))
                successor.wait()
                weights, found, _, _ = receiver._read()
                assert found == version
                assert bool((weights["w"] == version).all())
    os.close(address.fd)


def test_weights_may_change_once_the_copy_is_done() -> None:
    weights = {"w": torch.zeros(2_000_000)}
    with WeightPublisher(weights) as publisher, WeightReceiver(publisher.address) as receiver:
        for version in range(5):
            weights["w"].fill_(version)
            publisher.publish(weights, version, PROBE, torch.zeros(5))
            publisher.wait()
            weights["w"].fill_(-1)
            assert bool((receiver._read()[0]["w"] == version).all())
        assert publisher.exposed_s > 0


class TestBadInput:
    def test_other_weights_than_at_the_start_are_refused(self) -> None:
        weights = {"a": torch.zeros(3), "b": torch.zeros(2)}
        with WeightPublisher(weights) as publisher:
            for other, words in [
                ({"a": torch.zeros(3)}, "weight 'b' is missing"),
                ({**weights, "a": torch.zeros(4)}, r"weight 'a' is \[4\] of torch.float32, was \[3\]"),
                ({**weights, "a": torch.zeros(3).double()}, r"of torch.float64, was \[3\] of torch.float32"),
            ]:
                with pytest.raises(ConfigurationError, match=words):
                    publisher.publish(other, 0, PROBE, torch.zeros(5))
            assert publisher.version == -1

    def test_versions_count_up(self) -> None:
        weights = {"a": torch.zeros(3)}
        with WeightPublisher(weights) as publisher:
            publisher.publish(weights, 4, PROBE, torch.zeros(5))
            with pytest.raises(ConfigurationError, match="version 4 after 4"):
                publisher.publish(weights, 4, PROBE, torch.zeros(5))

    def test_nothing_is_published_or_waited_for_after_the_end(self) -> None:
        model = _model(0)
        with WeightPublisher(model.state_dict()) as publisher:
            _publish(publisher, model, 0)
        publisher.wait()
        with pytest.raises(ConfigurationError, match="version 1 after close"):
            _publish(publisher, model, 1)

    def test_a_probe_that_is_none_is_refused(self) -> None:
        weights = {"a": torch.zeros(3)}
        with WeightPublisher(weights) as publisher:
            for tokens, logprobs in [(torch.arange(1), torch.zeros(0)), (PROBE, torch.zeros(6))]:
                with pytest.raises(ConfigurationError, match="probe of"):
                    publisher.publish(weights, 0, tokens, logprobs)

    def test_nothing_published_is_said(self) -> None:
        with WeightPublisher({"a": torch.zeros(3)}) as publisher, WeightReceiver(publisher.address) as receiver:
            with pytest.raises(ConfigurationError, match="publish version 0"):
                receiver.load(Engine())

    def test_no_weights_and_no_memory_are_said(self) -> None:
        with pytest.raises(ConfigurationError, match="no weights"):
            WeightPublisher({})
        with WeightPublisher({"a": torch.zeros(3)}) as publisher:
            address = publisher.address
        with pytest.raises(ConfigurationError, match="cannot be mapped"):
            WeightReceiver(address)
