"""Signs of life → is this rank hung? Pure: same looks, same verdict.

A process that ends is seen by its agent at once and needs no detector. This file is for those that do not end:

===================== ============================================== =========================================
what is seen          what it means                                  limit
===================== ============================================== =========================================
stopped               a signal (SIGSTOP) froze the process           ``stopped_timeout_s``
thread beat stale     the interpreter does not run: something holds   ``gil_timeout_s`` while training, more before
                      the GIL, or the process sleeps in the kernel
no progress           the program trains, waits for nobody and does   ``max(hang_timeout_s, 20 × slowest step)``
                      not advance
device fault          the device says that it is broken              at once
===================== ============================================== =========================================

Progress is what the agent sees change between two looks, so the clocks of agent and rank are not compared for it. Time
during which a rank is excused (it waits for others, is paused, or is not training) does not count, and neither does
time for which the agent itself did not run: on an overloaded host everybody is late.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_flashrl.recovery.slot import Heartbeat, RankState

DEFAULT_GIL_TIMEOUT_S = 10.0
DEFAULT_HANG_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSettings:
    """Limits, in seconds.

    Attributes:
        stopped_timeout_s: a stopped process is lost after this.
        gil_timeout_s: a rank in training whose interpreter does not run is lost after this.
        setup_factor: outside training, ``gil_timeout_s`` is stretched by this (loading data may hold the GIL for long).
        hang_timeout_s: the least time without progress that counts as a hang.
        num_steps: a hang is also at least this many times as long as the slowest step seen.
        is_exact: take both time-outs as they are: no stretching, no adapting.
    """

    stopped_timeout_s: float = 0.5
    gil_timeout_s: float = DEFAULT_GIL_TIMEOUT_S
    setup_factor: float = 12.0
    hang_timeout_s: float = DEFAULT_HANG_TIMEOUT_S
    num_steps: float = 20.0
    is_exact: bool = False

    @classmethod
    def exactly(cls, hang_timeout_s: float) -> DetectorSettings:
        """Use one limit that the user chose for everything but stopped processes."""
        return cls(gil_timeout_s=hang_timeout_s, hang_timeout_s=hang_timeout_s, is_exact=True)


class Health(enum.Enum):
    """The answer of :func:`detect`."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Silent, but not for long enough."""
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the detector says of a rank.

    Attributes:
        health: the answer.
        reason: why, readable.
        silent_s: how long the sign of life in question has been missing.
    """

    health: Health
    reason: str
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """What the detector remembers of a rank between two looks.

    Attributes:
        incarnation: of which process.
        looked_ns: when the last look was.
        thread_beat_ns: the beat seen then.
        counters: the progress seen then.
        interpreter_ns: when the interpreter ran last, or was excused last.
        progress_ns: when the rank advanced last, or was excused last.
        stopped_since_ns: since when the process has been stopped; 0 when it runs.
    """

    incarnation: int
    looked_ns: int
    thread_beat_ns: int
    counters: tuple[int, ...]
    interpreter_ns: int
    progress_ns: int
    stopped_since_ns: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """Everything seen of one rank at one moment.

    Attributes:
        heartbeat: its slot's header.
        is_stopped: whether the kernel says that the process is stopped.
        device_faults: what its device's health check found.
        num_peers_waiting: ranks of the node that wait for others; named in the reason.
        num_peers: other ranks of the node.
    """

    heartbeat: Heartbeat
    is_stopped: bool = False
    device_faults: Sequence[str] = field(default_factory=tuple)
    num_peers_waiting: int = 0
    num_peers: int = 0


def detect(
    now_ns: int, look: Look, memory: Memory | None, settings: DetectorSettings, *, interval_s: float = 0.1
) -> tuple[Verdict, Memory]:
    """Judge one rank.

    Args:
        now_ns: the host's monotonic clock.
        look: what is seen.
        memory: what the last call returned; ``None`` for a rank never seen.
        settings: the limits.
        interval_s: how often this is called; a much longer pause means that the agent did not run.

    Example:
        A process that stopped 0.6 s ago:

        >>> beat = Heartbeat(1, 0, RankState.TRAINING, 1, 1, 1, 0, 0, 0, 0, 0, 0, False, True)
        >>> _, memory = detect(10**9, Look(beat, is_stopped=True), None, DetectorSettings())
        >>> verdict, _ = detect(1_600_000_000, Look(beat, is_stopped=True), memory, DetectorSettings())
        >>> verdict.health, verdict.reason
        (<Health.HUNG: 'hung'>, 'hung: the process has been stopped for 0.6 s')
    """
    memory = _remember(now_ns, look, memory, interval_s)
    heartbeat = look.heartbeat
    if look.device_faults:
        return Verdict(Health.HUNG, "device fault: " + "; ".join(look.device_faults)), memory
    if heartbeat.is_paused:
        return Verdict(Health.HEALTHY, "hang detection is paused"), memory
    checks = [_check_stopped(now_ns, memory, settings)]
    if heartbeat.is_aware:
        checks.append(_check_interpreter(now_ns, heartbeat, memory, settings))
        checks.append(_check_progress(now_ns, look, memory, settings))
    for health in (Health.HUNG, Health.SUSPECT):
        for verdict in checks:
            if verdict.health is health:
                return verdict, memory
    return Verdict(
        Health.HEALTHY, "alive" if heartbeat.is_aware else "not watched before a flash strategy runs"
    ), memory


def _remember(now_ns: int, look: Look, memory: Memory | None, interval_s: float) -> Memory:
    beat = look.heartbeat
    counters = (beat.loop_beats, beat.seq_issued, beat.global_step, beat.phase, beat.loop_beat_ns, beat.state)
    if memory is None or memory.incarnation != beat.incarnation:
        stopped_ns = now_ns if look.is_stopped else 0
        first_beat_ns = beat.thread_beat_ns or now_ns
        return Memory(beat.incarnation, now_ns, beat.thread_beat_ns, counters, first_beat_ns, now_ns, stopped_ns)
    late_ns = max(0, now_ns - memory.looked_ns - int(3 * interval_s * 1e9))
    has_advanced = counters != memory.counters
    if beat.is_paused or has_advanced:
        interpreter_ns = now_ns
    elif beat.thread_beat_ns != memory.thread_beat_ns:
        interpreter_ns = beat.thread_beat_ns
    else:
        interpreter_ns = memory.interpreter_ns + late_ns
    is_excused = beat.state is not RankState.TRAINING or beat.waiting_since_ns > 0 or beat.is_paused
    is_progressing = has_advanced or is_excused or beat.loop_beats == 0
    progress_ns = now_ns if is_progressing else memory.progress_ns + late_ns
    return Memory(
        incarnation=beat.incarnation,
        looked_ns=now_ns,
        thread_beat_ns=beat.thread_beat_ns,
        counters=counters,
        interpreter_ns=interpreter_ns,
        progress_ns=progress_ns,
        stopped_since_ns=(memory.stopped_since_ns or now_ns) if look.is_stopped else 0,
    )


def _judge(silent_s: float, limit_s: float, reason: str) -> Verdict:
    if silent_s > limit_s:
        return Verdict(Health.HUNG, reason, silent_s)
    if silent_s > limit_s / 2:
        return Verdict(Health.SUSPECT, reason, silent_s)
    return Verdict(Health.HEALTHY, "alive", silent_s)


def _check_stopped(now_ns: int, memory: Memory, settings: DetectorSettings) -> Verdict:
    if not memory.stopped_since_ns:
        return Verdict(Health.HEALTHY, "alive")
    silent_s = (now_ns - memory.stopped_since_ns) / 1e9
    return _judge(silent_s, settings.stopped_timeout_s, f"hung: the process has been stopped for {silent_s:.1f} s")


def _check_interpreter(now_ns: int, heartbeat: Heartbeat, memory: Memory, settings: DetectorSettings) -> Verdict:
    silent_s = max(0, now_ns - memory.interpreter_ns) / 1e9
    limit_s = settings.gil_timeout_s
    if not settings.is_exact:
        if heartbeat.state is RankState.TRAINING:
            limit_s = max(limit_s, 2 * heartbeat.largest_gap_ns / 1e9)
        else:
            limit_s *= settings.setup_factor
    reason = f"hung: its interpreter has not run for {silent_s:.1f} s (limit {limit_s:.1f} s); something holds the GIL"
    return _judge(silent_s, limit_s, reason)


def _check_progress(now_ns: int, look: Look, memory: Memory, settings: DetectorSettings) -> Verdict:
    heartbeat = look.heartbeat
    silent_s = max(0, now_ns - memory.progress_ns) / 1e9
    limit_s = settings.hang_timeout_s
    if not settings.is_exact:
        slowest_ns = max(heartbeat.largest_gap_ns, heartbeat.step_time_ns)
        limit_s = max(limit_s, settings.num_steps * slowest_ns / 1e9)
    reason = f"hung: no progress for {silent_s:.1f} s in step {heartbeat.global_step} (limit {limit_s:.1f} s)"
    if look.num_peers_waiting:
        reason += f" while {look.num_peers_waiting} of {look.num_peers} other ranks of the node wait"
    return _judge(silent_s, limit_s, reason)
