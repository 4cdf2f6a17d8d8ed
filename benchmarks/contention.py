"""Whether the machine belonged to a measurement alone. A figure taken beside other load says nothing.

Two looks: at a fixed job on all cores before and after the run, whose wall time must not exceed its CPU time by much,
and at the CPU time that others used during the run.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

MAX_WALL_OVER_CPU = 1.5
"""A fixed job that takes this many times its own CPU time had to share a core."""
MAX_FOREIGN_CORES = 0.15
"""An idle system uses some hundredths of a core."""
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


@dataclass(frozen=True, slots=True)
class Contention:
    """What else ran.

    Attributes:
        wall_over_cpu: of the fixed job, the worst of before and after.
        foreign_cores: used by others during the run, on average.
    """

    wall_over_cpu: float
    foreign_cores: float

    @property
    def is_too_much(self) -> bool:
        return self.wall_over_cpu > MAX_WALL_OVER_CPU or self.foreign_cores > MAX_FOREIGN_CORES

    def __str__(self) -> str:
        return f"wall/cpu {self.wall_over_cpu:.2f}, others {self.foreign_cores:.2f} cores"


@dataclass(frozen=True, slots=True)
class Watch:
    """Begins before a run: :meth:`begin`, the run, :meth:`end`."""

    wall_over_cpu: float
    machine_s: float
    ours_s: float
    wall_s: float

    @classmethod
    def begin(cls) -> Watch:
        return cls(calibrate(), *_times())

    def end(self) -> Contention:
        """To be called when all processes of the run have ended and were waited for."""
        machine_s, ours_s, wall_s = _times()
        foreign_s = max(0.0, (machine_s - self.machine_s) - (ours_s - self.ours_s))
        foreign_cores = round(foreign_s / (wall_s - self.wall_s), 3)
        return Contention(round(max(self.wall_over_cpu, calibrate()), 2), foreign_cores)


def _times() -> tuple[float, float, float]:
    """CPU time of the machine, CPU time of this process and those it has waited for, wall time."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    machine_s = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return machine_s, sum(usage.ru_utime + usage.ru_stime for usage in usages), time.perf_counter()
