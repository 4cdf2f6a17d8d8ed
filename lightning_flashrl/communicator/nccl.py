"""nccl groups that are aborted from another thread and made anew.

A dead peer is not noticed by nccl: kernels spin until their communicator is aborted. The process and its device context
survive that, if torch's own watchdog is kept from ending the process first.

Not verified for want of several GPUs (read from torch's sources, tried with stand-ins): that an abort returns while its
kernels spin and other communicators are being aborted beside it, how long it takes, and that sums of a rebuilt
communicator have the same bits. A fault of NVLink or of the device may leave an error that stays with the process;
such a rank fails at its next kernel and is replaced. While a member is missing nccl itself cannot be stopped from
connecting, so members meet in the store first; one that dies between the two leaves the others to nccl's own time-out.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch._C._distributed_c10d as c10d

from lightning_flashrl import clock
from lightning_flashrl.communicator.device import MUST_BE_REPLACED, DeviceGroup, DeviceTransport, require_off
from lightning_flashrl.errors import ConfigurationError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_SETTLE_TIMEOUT_S = 60.0
_TEAR_DOWN = "torch's nccl watchdog would end a survivor when its peer dies"
_SWITCHES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": _TEAR_DOWN,
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "errors met by torch's nccl watchdog would end a survivor when its peer dies",
    "TORCH_NCCL_ENABLE_MONITORING": "torch's nccl monitor would end a survivor that waits for a replacement",
    "TORCH_NCCL_DESYNC_DEBUG": f"it turns TORCH_NCCL_ASYNC_ERROR_HANDLING on, and {_TEAR_DOWN}",
}
_DEFAULT_ON = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_ENABLE_MONITORING")


class NcclTransport(DeviceTransport):
    """Native groups of one GPU.

    Args:
        device: the GPU; the current one by default.

    Raises:
        ConfigurationError: torch has no nccl, sees no GPU, or an environment variable would let a survivor be ended.
    """

    backend = "nccl"
    device_type = "cuda"
    peer_failure_signs = (
        "ncclRemoteError",
        "ncclSystemError",
        "ncclInternalError",
        "remote process exited or there was a network error",
        "unhandled system error",
        "setting up NCCL communicator",
        "abort",
        "Watchdog caught collective operation timeout",
        "timed out",
        "Timed out",
        "Connection",
        "Broken pipe",
        "closed by peer",
    )
    program_error_signs = ("ncclInvalidUsage", "ncclInvalidArgument", "invalid usage", "invalid argument")

    def __init__(self, device: torch.device | None = None) -> None:
        if not hasattr(c10d, "ProcessGroupNCCL"):
            raise ConfigurationError(
                f"torch {torch.__version__} was built without nccl; install a CUDA build of torch "
                "(https://pytorch.org/get-started), or train with Trainer(accelerator='cpu')"
            )
        if not torch.cuda.is_available():
            raise ConfigurationError(
                "nccl needs a GPU and torch sees none; look at nvidia-smi and CUDA_VISIBLE_DEVICES, "
                "or train with Trainer(accelerator='cpu')"
            )
        require_off(os.environ, _SWITCHES, default_on=_DEFAULT_ON)
        if os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
            raise ConfigurationError(
                "TORCH_DISTRIBUTED_DEBUG=DETAIL turns TORCH_NCCL_ASYNC_ERROR_HANDLING on, and "
                f"{_TEAR_DOWN}; unset it or set it to INFO"
            )
        super().__init__(device or torch.device("cuda", torch.cuda.current_device()))
        self._aborts: list[_Abort] = []
        self._aborts_lock = threading.Lock()

    def enter_device(self) -> None:
        """Make the GPU current in the calling thread."""
        torch.cuda.set_device(self.device)

    def _open(self, store: Store, rank: int, size: int, timeout_s: float, name: str) -> Any:
        options = c10d.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = timedelta(seconds=timeout_s)
        options.group_name = name  # type: ignore[assignment]
        return c10d.ProcessGroupNCCL(store, rank, size, options)

    def _meet(self, group: DeviceGroup) -> None:
        group.native.eager_connect_single_device(self.device)

    def _give_up(self, natives: list[Any]) -> None:
        """Abort all groups at once: one abort may wait for a kernel that stands behind another group's kernel."""
        with self._aborts_lock:
            self._aborts += [_Abort(native) for native in natives]

    def settle(self) -> None:
        """Wait until nccl has given up the communicators of broken groups.

        Raises:
            RuntimeError: it does not; this rank must be replaced.
        """
        deadline_s = clock.now_s() + _SETTLE_TIMEOUT_S
        with self._aborts_lock:
            for abort in self._aborts:
                abort.join(deadline_s)
            self._aborts = []


class _Abort:
    """A native abort under way; the group is forgotten when it has ended."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, name="flashrl-abort", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._native.abort()
        except RuntimeError as error:
            self._error = error
        self._native = None

    def join(self, deadline_s: float) -> None:
        self._thread.join(max(0.0, deadline_s - clock.now_s()))
        if self._thread.is_alive():
            raise RuntimeError(f"nccl did not abort a communicator in {_SETTLE_TIMEOUT_S:g} s; {MUST_BE_REPLACED}")
        if self._error is not None:
            raise RuntimeError(f"nccl could not abort: {self._error}; {MUST_BE_REPLACED}") from self._error
