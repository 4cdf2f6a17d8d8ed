"""hccl groups whose links are rebuilt in place: stop the device, rebuild every link, restart the device.

Stopping a device ends whatever runs on it, the program's own kernels too. So an abort only gives up the host's waits;
the device is stopped later, in :meth:`HcclTransport.settle`, when the program waits and its own kernels have run. From
then on the same native groups are used again; their next communicators meet under the new quorum's keys.

Not verified for want of an Ascend device (checked against the sources of torch_npu 2.13 and with stand-ins): everything
that happens on the device. In particular that a stop ends a collective whose peer is gone, that nothing but the hung
collectives is lost by it when the program's default stream is idle (streams of the program's own are not looked at),
and that sums of a rebuilt communicator have the same bits; pin them with ``HCCL_DETERMINISTIC=true`` and ``HCCL_ALGO``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import Work
from torch.distributed import distributed_c10d

from lightning_flashrl import clock
from lightning_flashrl.communicator.device import (
    MUST_BE_REPLACED,
    DeviceGroup,
    DeviceTransport,
    GroupStore,
    require_off,
)
from lightning_flashrl.errors import ConfigurationError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_DRAIN_TIMEOUT_S = 60.0
_DRAIN_PAUSE_S = 0.001
_TEAR_DOWN = "torch_npu's watchdog would end a survivor when its peer dies"
_SWITCHES = {
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": _TEAR_DOWN,
    "HCCL_ASYNC_ERROR_HANDLING": _TEAR_DOWN,
    "TORCH_HCCL_DESYNC_DEBUG": f"it turns TORCH_HCCL_ASYNC_ERROR_HANDLING on, and {_TEAR_DOWN}",
    "HCCL_DESYNC_DEBUG": f"it turns TORCH_HCCL_ASYNC_ERROR_HANDLING on, and {_TEAR_DOWN}",
    "TORCH_HCCL_ENABLE_MONITORING": "torch_npu's monitor would end a survivor that waits for a replacement",
}


def import_torch_npu() -> Any:
    """Return the ``torch_npu`` module.

    Raises:
        ConfigurationError: it is not installed, or it does not load.
    """
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            raise ConfigurationError(
                "Ascend devices need torch_npu, which is not installed; run `pip install lightning-flashrl[npu]`"
            ) from error
        raise ConfigurationError(
            f"torch_npu is installed but does not load: {error}; source the set_env.sh of the CANN toolkit first"
        ) from error


class _Link:
    """A native group in the shape in which torch_npu's recovery functions look for groups in torch's table."""

    def __init__(self, native: Any, store: GroupStore, device_type: str) -> None:
        self.native = native
        self.store = store
        self._device_types = [torch.device(device_type)]

    def _get_backend(self, device: torch.device) -> Any:
        return self.native


class HcclTransport(DeviceTransport):
    """Native groups of one Ascend device.

    Args:
        device: the NPU; the current one by default.

    Raises:
        ConfigurationError: torch_npu is missing, or an environment variable would let a survivor be ended.
    """

    backend = "hccl"
    device_type = "npu"
    peer_failure_signs = (
        "FORCE STOP",
        "HCCL function error",
        "HCCL OP RETRY FAILED",
        "HCCS LINK ERROR",
        "SUSPECT REMOTE ERROR",
        "call hccl api failed",
        "setting up HCCL communicator",
        "abort",
        "Watchdog caught collective operation timeout",
        "timed out",
        "Timed out",
        "Connection",
    )
    program_error_signs = ("invalid parameter", "invalid type", "invalid value", "feature not supported")

    def __init__(self, device: torch.device | None = None) -> None:
        self._torch_npu = import_torch_npu()
        require_off(os.environ, _SWITCHES, default_on=["TORCH_HCCL_ASYNC_ERROR_HANDLING"])
        if os.environ.get("RANK_TABLE_FILE"):
            raise ConfigurationError(
                "RANK_TABLE_FILE fixes where each rank runs, and a replacement may run elsewhere; unset it"
            )
        super().__init__(device or torch.device("npu", self._torch_npu.npu.current_device()))
        self._index = self.device.index or 0
        self._links: dict[tuple[str, int, int], _Link] = {}
        self._must_rebuild = False
        self._settling = threading.Lock()

    def enter_device(self) -> None:
        """Make the NPU current in the calling thread."""
        self._torch_npu.npu.set_device(self._index)

    def _open(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Any:
        link = self._links.get((name, rank, size))
        if link is None:
            kept = GroupStore(store)
            native = self._make_native(kept, rank, size, timeout_s, name)
            self._links[name, rank, size] = _Link(native, kept, self.device.type)
            return native
        link.store.target = store
        return link.native

    def _make_native(self, store: GroupStore, rank: int, size: int, timeout_s: float, name: str) -> Any:
        native_class = self._torch_npu._C._distributed_c10d.ProcessGroupHCCL
        options = native_class.Options()
        options.is_high_priority_stream = False
        options._timeout = timedelta(seconds=timeout_s)
        options.global_ranks_in_group = []
        options.group_id = name
        return native_class(store, rank, size, options)

    def _meet(self, group: DeviceGroup) -> None:
        """A native group connects at its first collective, so there is one that nobody needs."""
        group.allreduce([torch.zeros(1, device=self.device)]).wait()

    def has_failed(self, work: Work) -> bool:
        """``wait`` of an hccl handle does not raise."""
        return not work.is_success()

    def _give_up(self, natives: list[Any]) -> None:
        self._must_rebuild = True

    def settle(self) -> None:
        """End the hung collectives and make every group ready to connect anew.

        Raises:
            RuntimeError: the device does not recover; this rank must be replaced.
        """
        with self._settling:
            if not self._must_rebuild:
                return
            self._drain()
            links = list(self._links.values())
            with _listed(links):
                try:
                    self._rebuild(links)
                except RuntimeError as error:
                    raise RuntimeError(f"NPU {self._index} does not recover: {error}; {MUST_BE_REPLACED}") from error
            self._must_rebuild = False

    def _rebuild(self, links: list[_Link]) -> None:
        npu = self._torch_npu.npu
        result = npu.stop_device(self._index)
        if result not in (None, 0):
            raise RuntimeError(f"stop_device returned {result}")
        for link in links:
            self._torch_npu.distributed.reinit_process_group(link, rebuild_link=True)
        npu.restart_device(self._index)

    def _drain(self) -> None:
        """Let the program's own kernels run to their end; no collective stands before them in their stream."""
        self.enter_device()
        npu = self._torch_npu.npu
        event = npu.Event()
        event.record(npu.default_stream(self._index))
        deadline_s = clock.now_s() + _DRAIN_TIMEOUT_S
        while not event.query():
            if clock.now_s() > deadline_s:
                raise RuntimeError(
                    f"kernels on NPU {self._index} have not ended within {_DRAIN_TIMEOUT_S:g} s; {MUST_BE_REPLACED}"
                )
            clock.sleep(_DRAIN_PAUSE_S)


@contextlib.contextmanager
def _listed(links: list[_Link]) -> Iterator[None]:
    """Let torch_npu find native groups that torch does not know: ours stand behind holding groups."""
    table: dict[Any, Any] = distributed_c10d._world.pg_map
    for link in links:
        table[link] = ("hccl", link.store)
    try:
        yield
    finally:
        for link in links:
            table.pop(link, None)
