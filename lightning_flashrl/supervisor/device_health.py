"""Is the device behind a rank still sound? Plug-ins whose findings go to the detector like a missing heartbeat.

Nothing here opens a device for computing: NVML and ``npu-smi`` read what the driver knows.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_NPU_SMI_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class DeviceFault:
    """A device that must not be trusted.

    Attributes:
        local_rank: the rank that uses it (device number = local rank).
        reason: what is wrong, readable.
    """

    local_rank: int
    reason: str


class DeviceHealth(Protocol):
    """Looks at the devices of a node."""

    def poll(self) -> list[DeviceFault]:
        """Return what is broken now; each finding makes the detector give its rank up."""
        ...


class NvmlHealth:
    """NVIDIA devices: a lost device and new uncorrectable memory errors.

    Args:
        nvml: the ``pynvml`` module, initialised.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        numbers = [part for part in visible.split(",") if part.strip().isdecimal()]
        indices = [int(part) for part in numbers] if numbers else range(nvml.nvmlDeviceGetCount())
        self._handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in indices}
        self._known = {index: self._uncorrected(handle) for index, handle in self._handles.items()}

    def poll(self) -> list[DeviceFault]:
        """Compare with what was counted before."""
        faults: list[DeviceFault] = []
        for local_rank, (index, handle) in enumerate(self._handles.items()):
            try:
                self._nvml.nvmlDeviceGetPciInfo(handle)
            except self._nvml.NVMLError as error:
                faults.append(DeviceFault(local_rank, f"GPU {index} does not answer: {error}"))
                continue
            count = self._uncorrected(handle)
            if count > self._known[index]:
                num_new = count - self._known[index]
                faults.append(DeviceFault(local_rank, f"GPU {index} had {num_new} uncorrectable memory error(s)"))
            self._known[index] = count
        return faults

    def _uncorrected(self, handle: Any) -> int:
        nvml = self._nvml
        try:
            return int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )
        except nvml.NVMLError:  # a device without ECC
            return 0


class NpuSmiHealth:
    """Ascend devices, through ``npu-smi info``."""

    def poll(self) -> list[DeviceFault]:
        """Run the tool and read its table; a tool that does not answer is not the device's fault."""
        try:
            result = subprocess.run(
                ["npu-smi", "info"], capture_output=True, text=True, timeout=_NPU_SMI_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
        return parse_npu_smi(result.stdout)


_NPU_ROW = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(\w+)\s*\|", re.MULTILINE)
_NPU_BROKEN = frozenset({"Alarm", "Critical", "UNKNOWN"})


def parse_npu_smi(text: str) -> list[DeviceFault]:
    """Read the health column of ``npu-smi info``; ``Warning`` is not a fault.

    >>> parse_npu_smi("| 0     910B3               | OK            | 93.5   40   0 / 0 |")
    []
    >>> parse_npu_smi("| 1     910B3               | Critical      | 93.5   40   0 / 0 |")
    [DeviceFault(local_rank=1, reason='NPU 1 (910B3) reports Critical')]
    """
    return [
        DeviceFault(int(number), f"NPU {number} ({name}) reports {health}")
        for number, name, health in _NPU_ROW.findall(text)
        if health in _NPU_BROKEN
    ]


def find_device_health() -> list[DeviceHealth]:
    """Return a plug-in for each kind of device of this host."""
    found: list[DeviceHealth] = []
    with contextlib.suppress(ImportError):
        nvml = importlib.import_module("pynvml")
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            if nvml.nvmlDeviceGetCount() > 0:
                found.append(NvmlHealth(nvml))
    if shutil.which("npu-smi") is not None:
        found.append(NpuSmiHealth())
    return found


class DeviceWatch:
    """Polls plug-ins in a thread, because some take seconds to answer.

    Args:
        plugins: what to poll; none means no thread.
        interval_s: pause between two rounds.
    """

    def __init__(self, plugins: Sequence[DeviceHealth], interval_s: float = 5.0) -> None:
        self._plugins = plugins
        self._interval_s = interval_s
        self._found: deque[DeviceFault] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flashrl-devices", daemon=True)
        if plugins:
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for plugin in self._plugins:
                self._found.extend(plugin.poll())

    def take(self) -> list[DeviceFault]:
        """Return what was found since the last call."""
        found: list[DeviceFault] = []
        while self._found:
            found.append(self._found.popleft())
        return found

    def close(self) -> None:
        """Stop polling."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
