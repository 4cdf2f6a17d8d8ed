from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from lightning_flashrl.supervisor.device_health import (
    DeviceFault,
    DeviceHealth,
    DeviceWatch,
    NpuSmiHealth,
    NvmlHealth,
    find_device_health,
    parse_npu_smi,
)
from lightning_flashrl.testing.device import FakeDeviceHealth

NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.0                   Version: 23.0.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.5        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3162 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Warning       | 91.1        41                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3162 / 65536         |
+===========================+===============+====================================================+
| 2     910B3               | Critical      | 91.1        41                0    / 0             |
| 0                         | 0000:02:00.0  | 0           0    / 0          3162 / 65536         |
+===========================+===============+====================================================+
"""


class FakeNvml:
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.errors = [0, 5]
        self.lost: set[int] = set()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> None:  # noqa: N802
        if handle in self.lost:
            raise self.NVMLError("GPU is lost")

    def nvmlDeviceGetTotalEccErrors(self, handle: int, _kind: int, _counter: int) -> int:  # noqa: N802
        if handle == 0:
            raise self.NVMLError("Not Supported")
        return self.errors[handle]


def test_nvidia_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml()
    health: DeviceHealth = NvmlHealth(nvml)
    assert health.poll() == []
    nvml.errors[1] = 7
    assert health.poll() == [DeviceFault(1, "GPU 1 had 2 uncorrectable memory error(s)")]
    assert health.poll() == []
    nvml.lost.add(0)
    assert health.poll() == [DeviceFault(0, "GPU 0 does not answer: GPU is lost")]


def test_devices_are_numbered_as_ranks_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    nvml = FakeNvml()
    health = NvmlHealth(nvml)
    nvml.errors[1] = 6
    assert health.poll() == [DeviceFault(0, "GPU 1 had 1 uncorrectable memory error(s)")]


def test_ascend_devices() -> None:
    assert parse_npu_smi(NPU_SMI) == [DeviceFault(2, "NPU 2 (910B3) reports Critical")]


def test_npu_smi_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{NPU_SMI}END\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert any(isinstance(plugin, NpuSmiHealth) for plugin in find_device_health())
    assert NpuSmiHealth().poll() == [DeviceFault(2, "NPU 2 (910B3) reports Critical")]


def test_a_missing_tool_is_not_a_device_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert NpuSmiHealth().poll() == []


def test_findings_are_handed_over_once() -> None:
    health = FakeDeviceHealth()
    watch = DeviceWatch([health], interval_s=0.01)
    health.break_device(local_rank=1, reason="fell off the bus")
    found: list[DeviceFault] = []
    deadline = time.monotonic() + 5
    while not found and time.monotonic() < deadline:
        found = watch.take()
        time.sleep(0.01)
    assert found == [DeviceFault(1, "fell off the bus")]
    assert watch.take() == []
    watch.close()
