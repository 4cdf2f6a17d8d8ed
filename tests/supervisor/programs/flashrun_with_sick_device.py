"""``flashrun`` on a node whose device 1 breaks after a moment."""

from __future__ import annotations

import functools
import sys

from lightning_flashrl.cli import flashrun
from lightning_flashrl.supervisor import agent, supervise
from lightning_flashrl.supervisor.device_health import DeviceHealth, DeviceWatch
from lightning_flashrl.testing.device import FakeDeviceHealth


def main() -> int:
    health = FakeDeviceHealth()
    health.break_device(local_rank=1, reason="fell off the bus")
    plugins: list[DeviceHealth] = [health]
    supervise.find_device_health = lambda: plugins
    agent.DeviceWatch = functools.partial(DeviceWatch, interval_s=1.0)  # type: ignore[misc,assignment]
    return flashrun.main()


if __name__ == "__main__":
    sys.exit(main())
