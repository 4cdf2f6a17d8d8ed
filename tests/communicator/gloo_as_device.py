"""The host's part of device transports over gloo, where it can be run without a device."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._distributed_c10d import Store

from lightning_flashrl.communicator.device import DeviceGroup, DeviceTransport
from lightning_flashrl.communicator.gloo import GlooTransport


class GlooAsDevice(DeviceTransport):
    """Groups of gloo whose collectives are looked at instead of waited for."""

    backend = "gloo"
    device_type = "cpu"

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._gloo = GlooTransport()
        self.num_given_up = 0
        self.num_settled = 0

    def enter_device(self) -> None:
        pass

    def _open(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Any:
        return self._gloo.connect(store, rank, size, timeout_s, name)

    def _meet(self, group: DeviceGroup) -> None:
        group.allreduce([torch.zeros(1)]).wait()

    def _give_up(self, natives: list[Any]) -> None:
        self.num_given_up += len(natives)

    def settle(self) -> None:
        if self.num_given_up != self.num_settled:
            self._gloo.abort()
            self.num_settled = self.num_given_up
