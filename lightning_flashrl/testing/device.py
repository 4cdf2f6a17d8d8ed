"""Device-health plug-in for tests."""

from __future__ import annotations

from lightning_flashrl.supervisor.device_health import DeviceFault


class FakeDeviceHealth:
    """Reports what a test tells it to.

    >>> health = FakeDeviceHealth()
    >>> health.break_device(local_rank=1, reason="fell off the bus")
    >>> health.poll()
    [DeviceFault(local_rank=1, reason='fell off the bus')]
    >>> health.poll()
    []
    """

    def __init__(self) -> None:
        self._faults: list[DeviceFault] = []

    def break_device(self, *, local_rank: int, reason: str) -> None:
        """Let the next :meth:`poll` find a fault."""
        self._faults.append(DeviceFault(local_rank, reason))

    def poll(self) -> list[DeviceFault]:
        """Return each fault once, as if the replacement got another device."""
        faults, self._faults = self._faults, []
        return faults
