"""Process groups that can be aborted and rebuilt inside a live process."""

from lightning_flashrl.communicator.base import Transport
from lightning_flashrl.communicator.gloo import GlooTransport
from lightning_flashrl.errors import ConfigurationError

__all__ = ["GlooTransport", "Transport", "make_transport"]


def make_transport(backend: str) -> Transport:
    """Return the transport of a ``torch.distributed`` backend name.

    Raises:
        ConfigurationError: there is none for it.
    """
    if backend == "gloo":
        return GlooTransport()
    raise ConfigurationError(f"flash_ddp knows the backends gloo, nccl and hccl, not {backend!r}")
