"""Process groups that can be aborted and rebuilt inside a live process."""

from __future__ import annotations

import torch

from lightning_flashrl import errors
from lightning_flashrl.communicator.base import Transport
from lightning_flashrl.communicator.gloo import GlooTransport
from lightning_flashrl.communicator.hccl import HcclTransport
from lightning_flashrl.communicator.nccl import NcclTransport

__all__ = ["GlooTransport", "HcclTransport", "NcclTransport", "Transport", "make_transport"]


def make_transport(backend: str, device: torch.device | None = None) -> Transport:
    """Return the transport of a ``torch.distributed`` backend name.

    Args:
        backend: ``"gloo"``, ``"nccl"`` or ``"hccl"``.
        device: of this rank, for nccl and hccl; the current one by default.

    Raises:
        ConfigurationError: there is none for it, or it cannot work here.
    """
    if backend == "gloo":
        return GlooTransport()
    if backend == "nccl":
        return NcclTransport(device)
    if backend == "hccl":
        return HcclTransport(device)
    raise errors.ConfigurationError(
        f"flash_ddp knows the backends gloo, nccl and hccl, not {backend!r}; "
        "set process_group_backend of FlashDDPStrategy to one of them"
    )
