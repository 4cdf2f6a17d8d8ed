from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies.npu import NPUAccelerator, NPUMixedPrecision, register_npu

from ..fake_torch_npu import FakeNpu, GradScaler, install  # noqa: TID252 - tests are not an installed package


@pytest.fixture
def _registered() -> Iterator[None]:
    before = dict(AcceleratorRegistry)
    register_npu()
    yield
    AcceleratorRegistry.clear()
    AcceleratorRegistry.update(before)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch, _registered: None) -> FakeNpu:
    return install(monkeypatch)


def _trainer(**arguments: Any) -> Trainer:
    settings: dict[str, Any] = {"accelerator": "npu", "logger": False, "enable_checkpointing": False, **arguments}
    if "strategy" not in settings:
        settings |= {"devices": 1, "strategy": SingleDeviceStrategy(torch.device("npu", 0))}
    return Trainer(**settings)


@pytest.mark.usefixtures("_registered")
def test_without_torch_npu_the_trainer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert not NPUAccelerator.is_available()
    with pytest.raises(ConfigurationError, match=r"pip install lightning-flashrl\[npu\]"):
        Trainer(accelerator="npu")


def test_without_a_device_the_trainer_says_where_to_look(npu: FakeNpu) -> None:
    npu.num_devices = 0
    with pytest.raises(ConfigurationError, match="ASCEND_RT_VISIBLE_DEVICES"):
        Trainer(accelerator="npu")


def test_the_trainer_takes_the_name_and_gives_each_rank_a_device(npu: FakeNpu) -> None:
    trainer = _trainer(devices=2, strategy="flash_ddp")
    assert isinstance(trainer.accelerator, NPUAccelerator)
    assert trainer.strategy.parallel_devices == [torch.device("npu", 0), torch.device("npu", 1)]


def test_all_devices_are_the_default(npu: FakeNpu) -> None:
    assert _trainer(strategy="flash_ddp").num_devices == 2


def test_set_up_stats_and_tear_down_use_torch_npu(npu: FakeNpu) -> None:
    accelerator = NPUAccelerator()
    device = torch.device("npu", 1)
    accelerator.setup_device(device)
    assert accelerator.get_device_stats(device) == {"allocated_bytes.all.current": 7}
    accelerator.teardown()
    assert npu.log == ["set npu:1", "empty cache"]


def test_a_strategy_for_another_kind_of_device_is_refused(npu: FakeNpu) -> None:
    with pytest.raises(ConfigurationError, match=r"got the device cpu.*strategy='flash_ddp'"):
        NPUAccelerator().setup_device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("devices", "numbers"),
    [
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
        ("2", [0, 1]),
        ("-1", [0, 1, 2, 3]),
        ("2,", [2]),
        ("3, 1", [3, 1]),
        ([2, 0], [2, 0]),
    ],
)
def test_devices_are_read(npu: FakeNpu, devices: Any, numbers: list[int]) -> None:
    npu.num_devices = 4
    assert NPUAccelerator.parse_devices(devices) == numbers


@pytest.mark.parametrize("devices", [5, 0, -2, "5", "0,4", "1,1", [0, 4], [1, 1], [], "", "a", "0,a", "--1"])
def test_devices_that_do_not_exist_are_refused(npu: FakeNpu, devices: Any) -> None:
    npu.num_devices = 4
    with pytest.raises(ConfigurationError, match=r"4 NPU\(s\) of this node"):
        NPUAccelerator.parse_devices(devices)


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_for_the_npu_and_not_for_cuda(npu: FakeNpu, precision: Any) -> None:
    trainer = _trainer(precision=precision)
    assert trainer.precision_plugin.device == "cuda", "Lightning has learnt of NPUs: this replacement can go"
    trainer.accelerator.setup(trainer)
    plugin = trainer.precision_plugin
    assert isinstance(plugin, NPUMixedPrecision)
    assert (plugin.device, plugin.precision, trainer.precision) == ("npu", precision, precision)
    assert isinstance(trainer.scaler, GradScaler) == (precision == "16-mixed")
    trainer.accelerator.setup(trainer)
    assert trainer.precision_plugin is plugin, "the scaler's state outlives a second fit"


def test_a_plugin_for_the_npu_is_kept(npu: FakeNpu) -> None:
    plugin = NPUMixedPrecision("16-mixed", scaler=GradScaler(init_scale=4.0))
    trainer = _trainer(plugins=[plugin])
    trainer.accelerator.setup(trainer)
    assert trainer.precision_plugin is plugin
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 4.0


def test_a_plugin_that_the_user_made_for_another_device_is_refused(npu: FakeNpu) -> None:
    trainer = _trainer(plugins=[MixedPrecision("bf16-mixed", "cuda")])
    with pytest.raises(ConfigurationError, match=r"pass Trainer\(precision='bf16-mixed'\)"):
        trainer.accelerator.setup(trainer)


def test_other_precisions_are_left_alone(npu: FakeNpu) -> None:
    trainer = _trainer(precision="64-true")
    trainer.accelerator.setup(trainer)
    assert isinstance(trainer.precision_plugin, DoublePrecision)
