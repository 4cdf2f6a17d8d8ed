"""``Trainer(accelerator="npu")``: Ascend devices through torch_npu.

Not verified for want of an Ascend device: that a fit runs. Names and signatures are checked against the sources of
torch_npu 2.13, behaviour with a stand-in.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_flashrl.communicator.hccl import import_torch_npu
from lightning_flashrl.errors import ConfigurationError

MixedPrecisionName = Literal["16-mixed", "bf16-mixed"]


class NPUMixedPrecision(MixedPrecision):
    """Automatic mixed precision on Ascend devices.

    Args:
        precision: ``"bf16-mixed"``, or ``"16-mixed"`` with torch_npu's gradient scaler.
        scaler: replaces that scaler.
    """

    def __init__(self, precision: MixedPrecisionName, scaler: torch.amp.GradScaler | None = None) -> None:
        if precision == "16-mixed" and scaler is None:
            scaler = import_torch_npu().npu.amp.GradScaler()
        super().__init__(precision, "npu", scaler)


class NPUAccelerator(Accelerator):
    """Ascend devices.

    Raises:
        ConfigurationError: torch_npu is missing or finds no device.
    """

    def __init__(self) -> None:
        if import_torch_npu().npu.device_count() == 0:
            raise ConfigurationError(
                "torch_npu finds no Ascend device; look at npu-smi info and ASCEND_RT_VISIBLE_DEVICES, "
                "or train with Trainer(accelerator='cpu')"
            )

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one of this process.

        Raises:
            ConfigurationError: the strategy is for another kind of device.
        """
        if device.type != "npu":
            raise ConfigurationError(
                f"accelerator='npu' got the device {device} from its strategy; use strategy='flash_ddp', or for one "
                "device strategy=SingleDeviceStrategy(device=torch.device('npu', 0))"
            )
        import_torch_npu().npu.set_device(device)

    def setup(self, trainer: Trainer) -> None:
        """Replace the precision plug-in that Lightning made for CUDA: it knows no other device with a scaler.

        Raises:
            ConfigurationError: it was not Lightning that chose it.
        """
        plugin = trainer.strategy.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.device == "npu":
            return
        if trainer._accelerator_connector._precision_plugin_flag is plugin:
            raise ConfigurationError(
                f"the plug-in {type(plugin).__name__}(device={plugin.device!r}) does not fit accelerator='npu'; "
                f"pass Trainer(precision={plugin.precision!r}) or plugins=[NPUMixedPrecision({plugin.precision!r})]"
            )
        rank_zero_info("Mixed precision: autocast and gradient scaler of torch_npu")
        trainer.strategy.precision_plugin = NPUMixedPrecision(cast(MixedPrecisionName, plugin.precision))

    def get_device_stats(self, device: str | torch.device | int) -> dict[str, Any]:
        """Return the allocator's figures of ``device``."""
        return cast(dict[str, Any], import_torch_npu().npu.memory_stats(device))

    def teardown(self) -> None:
        """Give cached memory back to the device."""
        import_torch_npu().npu.empty_cache()

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Read ``Trainer(devices=...)``: a count, ``-1`` for all, numbers, or either of them as text.

        Raises:
            ConfigurationError: there are not that many, or the text is none of these.
        """
        num_devices = NPUAccelerator.auto_device_count()
        numbers = _parse(devices, num_devices)
        missing = [number for number in numbers if not 0 <= number < num_devices]
        if missing or not numbers or len(set(numbers)) < len(numbers):
            raise ConfigurationError(
                f"Trainer(devices={devices!r}) does not fit the {num_devices} NPU(s) of this node, which are numbered "
                "from 0; give a count, -1 for all, or a list of different numbers"
            )
        return numbers

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """Return a torch device for each number."""
        return [torch.device("npu", number) for number in devices]

    @staticmethod
    def auto_device_count() -> int:
        """Return how many NPUs this process sees."""
        return int(import_torch_npu().npu.device_count())

    @staticmethod
    def is_available() -> bool:
        """Whether torch_npu loads and finds a device."""
        try:
            return bool(import_torch_npu().npu.is_available())
        except ConfigurationError:
            return False

    @staticmethod
    def name() -> str:
        """Return the name for ``Trainer(accelerator=...)``."""
        return "npu"


def _parse(devices: int | str | list[int], num_devices: int) -> list[int]:
    if isinstance(devices, str):
        numbers = [part.strip() for part in devices.split(",") if part.strip()]
        if not numbers or not all(number.removeprefix("-").isdecimal() for number in numbers):
            return []
        if "," in devices:
            return [int(number) for number in numbers]
        devices = int(devices)
    if isinstance(devices, int):
        return list(range(num_devices if devices == -1 else devices))
    return list(devices)


def register_npu() -> None:
    """Make ``Trainer(accelerator="npu")`` known; without torch_npu it says what to install."""
    AcceleratorRegistry.register(
        NPUAccelerator.name(), NPUAccelerator, description="Ascend devices through torch_npu", override=True
    )
