"""A stand-in for torch_npu that writes down what it is asked to do."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Work
from torch.distributed import distributed_c10d


class HcclWork(Work):
    """A collective of one member."""

    def __init__(self, group: ProcessGroupHCCL) -> None:
        super().__init__()
        self._group = group

    def is_completed(self) -> bool:
        return not self._group.is_hung

    def is_success(self) -> bool:
        return not self._group.is_failing

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


class ProcessGroupHCCL:
    """A native group that connects at its first collective, as the real one does."""

    log: list[Any]

    class Options:
        pass

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.options = options
        self.is_hung = False
        self.is_failing = False
        self._store = store
        self._is_connected = False
        self.log.append("make group " + options.group_id)

    def allreduce(self, tensors: list[torch.Tensor], *options: Any) -> Work:
        if not self._is_connected:
            self._store.set("0", b"\xffid")
            self._is_connected = True
            self.log.append("connect " + self.options.group_id)
        return HcclWork(self)

    def abort_hccl_comm(self, reason: str) -> None:
        self._is_connected = False
        self.is_hung = False
        self.log.append(f"abort {self.options.group_id} for {reason}")

    def _delete_tcpstore_key(self) -> None:
        self._store.delete_key("0")

    def set_watchdog_status(self, status: int) -> None:
        self.log.append(f"watchdog {self.options.group_id} {status}")

    def clear_workmeta_list(self) -> None:
        self.log.append(f"clear {self.options.group_id}")


class GradScaler(torch.amp.GradScaler):
    def __init__(self, **settings: Any) -> None:
        super().__init__("cpu", **settings)


def _groups() -> list[Any]:
    """Native groups as torch_npu finds them."""
    device = torch.device("npu")
    return [group._get_backend(device) for group in distributed_c10d._pg_map if device in group._device_types]


class FakeNpu:
    """The module, and what happened to it.

    Attributes:
        log: what was asked for, in order.
        num_devices: how many NPUs there are.
        num_busy_queries: how often an event says that kernels still run.
    """

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.num_devices = 2
        self.num_busy_queries = 0
        self.stop_result: int | None = 0
        self.module = ModuleType("torch_npu")
        ProcessGroupHCCL.log = self.log
        setattr(self.module, "npu", self._make_npu())  # noqa: B010
        setattr(self.module, "distributed", SimpleNamespace(reinit_process_group=self._reinit))  # noqa: B010
        native = SimpleNamespace(_distributed_c10d=SimpleNamespace(ProcessGroupHCCL=ProcessGroupHCCL))
        setattr(self.module, "_C", native)  # noqa: B010

    def _make_npu(self) -> SimpleNamespace:
        fake = self

        class Event:
            def record(self, stream: str) -> None:
                fake.log.append(f"record on {stream}")

            def query(self) -> bool:
                fake.num_busy_queries -= 1
                return fake.num_busy_queries < 0

        return SimpleNamespace(
            Event=Event,
            amp=SimpleNamespace(GradScaler=GradScaler),
            current_device=lambda: 0,
            default_stream=lambda device: f"stream of {device}",
            device_count=lambda: fake.num_devices,
            empty_cache=lambda: fake.log.append("empty cache"),
            is_available=lambda: fake.num_devices > 0,
            memory_stats=lambda device: {"allocated_bytes.all.current": 7},
            restart_device=self._restart,
            set_device=lambda device: fake.log.append(f"set {device}"),
            stop_device=self._stop,
        )

    def _stop(self, device_id: int) -> int | None:
        self.log.append(f"stop {device_id}")
        for group in _groups():
            group.set_watchdog_status(2)
        return self.stop_result

    def _restart(self, device_id: int) -> None:
        self.log.append(f"restart {device_id}")
        for group in _groups():
            group.clear_workmeta_list()
            group.set_watchdog_status(1)

    def _reinit(self, group: Any = None, rebuild_link: bool = True) -> Any:
        assert rebuild_link
        assert "hccl" in distributed_c10d.Backend(distributed_c10d._world.pg_map[group][0])
        native = group._get_backend(torch.device("npu"))
        native._delete_tcpstore_key()
        native.abort_hccl_comm("reinit")
        return group


def _absent() -> SimpleNamespace:
    """The name of a device stays for all later tests: what torch asks of it when it steps or seeds."""
    return SimpleNamespace(
        is_available=lambda: False,
        device_count=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
    )


def install(monkeypatch: pytest.MonkeyPatch) -> FakeNpu:
    """Make ``import torch_npu`` give a stand-in, and ``torch.device("npu")`` a device."""
    torch.utils.rename_privateuse1_backend("npu")
    if not hasattr(torch, "npu"):
        torch._register_device_module("npu", _absent())
    fake = FakeNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake.module)
    return fake
