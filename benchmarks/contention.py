"""Whether the machine belonged to a measurement alone. A figure taken beside other load says nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

LIMIT = 1.5
"""A fixed job that takes this many times its own CPU time had to share a core."""
_FIXED_JOB = """
import time
wall, cpu, x = time.perf_counter(), time.process_time(), 0
for i in range(3_000_000):
    x += i & 7
print((time.perf_counter() - wall) / (time.process_time() - cpu))
"""


def calibrate() -> float:
    """Run a fixed job on every core at once and return the worst wall time over CPU time; 1 on an idle machine."""
    command = [sys.executable, "-c", _FIXED_JOB]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(os.cpu_count() or 1)]
    return max(float(job.communicate()[0]) for job in jobs)


@dataclass(slots=True)
class Watch:
    """CPU time of the machine and of the processes this one started, between two moments."""

    machine_s: float
    ours_s: float
    wall_s: float

    @classmethod
    def now(cls) -> Watch:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
        machine_s = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        ours_s = sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        return cls(machine_s, ours_s, time.perf_counter())

    def foreign_cores(self) -> float:
        """Cores that others used since then, on average. Children count once they were waited for."""
        now = Watch.now()
        foreign_s = (now.machine_s - self.machine_s) - (now.ours_s - self.ours_s)
        return round(max(0.0, foreign_s) / (now.wall_s - self.wall_s), 2)
