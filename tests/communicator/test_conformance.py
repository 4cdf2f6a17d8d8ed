from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lightning_flashrl.communicator import GlooTransport
from lightning_flashrl.testing.conformance import check_transport

from .conftest import run_members
from .gloo_as_device import GlooAsDevice


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_conforms(size: int) -> None:
    run_members("conformance_gloo", size)


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_conforms_when_it_forgets_an_operation(size: int) -> None:
    run_members("conformance_forgetful", size)


@pytest.mark.parametrize("size", [1, 3])
def test_the_hosts_part_of_device_transports_conforms(size: int) -> None:
    run_members("conformance_device", size)


def test_ddp_over_a_device_transport_gives_the_same_bits() -> None:
    run_members("ddp", 2)


def test_nccl_conforms() -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        pytest.skip("nccl needs a GPU; with one only the parts for a single member run, with two or more everything")
    run_members("conformance_nccl", min(num_gpus, 3))


class _Values(dict[str, bytes]):
    """Rendezvous of a single member."""

    def fetch(self, key: str, timeout_s: float, abandoned: threading.Event) -> bytes:
        return self[key]


def test_a_transport_that_takes_every_error_for_a_lost_peer_is_caught() -> None:
    class Credulous(GlooTransport):
        def is_peer_failure(self, error: BaseException) -> bool:
            return True

    values = _Values()
    with pytest.raises(AssertionError, match="takes wrong arguments for a lost peer"):
        check_transport(Credulous, values.__setitem__, values.fetch, 0, 1)


def test_a_transport_with_wrong_results_is_caught() -> None:
    class Forgetful(GlooAsDevice):
        def connect(self, *args: Any) -> Any:
            group = super().connect(*args)
            group.allgather = lambda outputs, inputs: group.broadcast(inputs)
            return group

    values = _Values()
    with pytest.raises(AssertionError, match="allgather gives"):
        check_transport(Forgetful, values.__setitem__, values.fetch, 0, 1)
