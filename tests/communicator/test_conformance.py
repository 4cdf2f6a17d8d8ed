from __future__ import annotations

import pytest
import torch

from .conftest import run_members


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gloo_conforms(size: int) -> None:
    run_members("conformance_gloo", size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_hosts_part_of_device_transports_conforms(size: int) -> None:
    run_members("conformance_device", size)


def test_ddp_over_a_device_transport_gives_the_same_bits() -> None:
    run_members("ddp", 2)


def test_nccl_conforms() -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        pytest.skip("nccl needs a GPU; with one only the parts for a single member run, with two or more everything")
    run_members("conformance_nccl", min(num_gpus, 3))
