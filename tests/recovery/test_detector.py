"""Looks at a rank, one every 100 ms, and the verdict at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lightning_flashrl.recovery.detector import DetectorSettings, Health, Look, Memory, Verdict, detect
from lightning_flashrl.recovery.slot import Heartbeat, RankState

S = 10**9
TICK = S // 10
HEALTHY = Heartbeat(
    pid=1,
    incarnation=0,
    state=RankState.TRAINING,
    thread_beat_ns=0,
    loop_beat_ns=0,
    loop_beats=1,
    waiting_since_ns=0,
    seq_issued=0,
    global_step=0,
    phase=0,
    step_time_ns=S // 10,
    largest_gap_ns=S // 10,
    is_paused=False,
    is_aware=True,
)
Script = Callable[[int], Look]
"""Time since the first look → what is seen."""


def alive(now_ns: int, **changes: object) -> Heartbeat:
    return replace(HEALTHY, thread_beat_ns=S + now_ns, loop_beats=1 + now_ns // TICK, **changes)


def stuck(now_ns: int, **changes: object) -> Heartbeat:
    """The interpreter runs, the program does not advance."""
    return replace(HEALTHY, thread_beat_ns=S + now_ns, **changes)


def frozen(now_ns: int, **changes: object) -> Heartbeat:
    """The interpreter does not run."""
    return replace(HEALTHY, thread_beat_ns=S, **changes)


def watch(script: Script, duration_s: float, settings: DetectorSettings | None = None) -> tuple[Verdict, float]:
    """Look again and again; return the first verdict that says hung, or the last one, and its time."""
    memory: Memory | None = None
    now_ns = 0
    while True:
        verdict, memory = detect(S + now_ns, script(now_ns), memory, settings or DetectorSettings())
        if verdict.health is Health.HUNG or now_ns >= duration_s * S:
            return verdict, now_ns / S
        now_ns += TICK


@pytest.mark.parametrize(
    ("script", "at_s", "reason"),
    [
        (lambda t: Look(frozen(t), is_stopped=True), 0.6, "hung: the process has been stopped for 0.6 s"),
        (lambda t: Look(frozen(t)), 10.1, "hung: its interpreter has not run for 10.1 s (limit 10.0 s)"),
        (lambda t: Look(stuck(t)), 30.1, "hung: no progress for 30.1 s in step 0 (limit 30.0 s)"),
        (lambda t: Look(stuck(t, global_step=7, largest_gap_ns=2 * S)), 40.1, "in step 7 (limit 40.0 s)"),
        (lambda t: Look(stuck(t, step_time_ns=3 * S)), 60.1, "limit 60.0 s"),
        (lambda t: Look(stuck(t), num_peers_waiting=2, num_peers=3), 30.1, "while 2 of 3 other ranks of the node wait"),
        (lambda t: Look(frozen(t, largest_gap_ns=8 * S)), 16.1, "interpreter has not run for 16.1 s (limit 16.0 s)"),
        (lambda t: Look(frozen(t, state=RankState.SETUP)), 120.1, "interpreter has not run for 120.1 s"),
        (lambda t: Look(alive(t), device_faults=("GPU 0 is lost",)), 0.0, "device fault: GPU 0 is lost"),
        (lambda t: Look(alive(min(t, 5 * S))), 15.1, "interpreter has not run for 10.1 s"),
        (lambda t: Look(stuck(t) if t > 5 * S else alive(t)), 35.1, "no progress for 30.1 s"),
    ],
)
def test_hung(script: Script, at_s: float, reason: str) -> None:
    verdict, seen_s = watch(script, 200)
    assert verdict.health is Health.HUNG
    assert reason in verdict.reason
    assert seen_s == pytest.approx(at_s, abs=0.11)


@pytest.mark.parametrize(
    "script",
    [
        lambda t: Look(alive(t)),
        lambda t: Look(stuck(t, waiting_since_ns=1)),
        lambda t: Look(stuck(t, state=RankState.SETUP)),
        lambda t: Look(stuck(t, state=RankState.FINISHED)),
        lambda t: Look(stuck(t, loop_beats=0)),
        lambda t: Look(frozen(t, is_paused=True), is_stopped=True),
        lambda t: Look(frozen(t, is_aware=False)),
        lambda t: Look(stuck(t, seq_issued=t // S)),
        lambda t: Look(alive(t), is_stopped=t % S < 4 * TICK),
        lambda t: Look(stuck(t, waiting_since_ns=int(t % (20 * S) < TICK))),
    ],
    ids=[
        "alive",
        "waits for others",
        "sets up",
        "finished",
        "has not begun to train",
        "paused",
        "plain program",
        "issues collectives",
        "was stopped for moments",
        "waits now and then",
    ],
)
def test_not_hung(script: Script) -> None:
    verdict, _ = watch(script, 200)
    assert verdict.health is not Health.HUNG


@pytest.mark.parametrize(
    "excused",
    [
        lambda t: stuck(t, waiting_since_ns=1),
        lambda t: frozen(t, is_paused=True),
        lambda t: frozen(t, state=RankState.SETUP),
    ],
    ids=["waited", "was paused", "set up"],
)
def test_time_that_was_excused_does_not_count_afterwards(excused: Callable[[int], Heartbeat]) -> None:
    def script(now_ns: int) -> Look:
        return Look(excused(now_ns) if now_ns < 100 * S else stuck(now_ns))

    verdict, seen_s = watch(script, 200)
    assert verdict.reason.startswith("hung: no progress for 30.1 s")
    assert seen_s == pytest.approx(130.1, abs=0.21)


def test_a_new_process_begins_with_a_clean_record() -> None:
    def script(now_ns: int) -> Look:
        return Look(stuck(now_ns, incarnation=int(now_ns >= 29 * S)))

    assert watch(script, 58)[0].health is not Health.HUNG


@pytest.mark.parametrize("beat", [frozen, stuck])
def test_when_the_agent_itself_did_not_run_nobody_is_blamed(beat: Callable[[int], Heartbeat]) -> None:
    settings = DetectorSettings()
    _, memory = detect(S, Look(beat(0)), None, settings)
    verdict, memory = detect(101 * S, Look(beat(0)), memory, settings)
    assert verdict.health is Health.HEALTHY
    verdict, memory = detect(101 * S + TICK, Look(beat(0)), memory, settings)
    assert verdict.health is Health.HEALTHY


def test_exact_settings_do_not_adapt() -> None:
    slow = {"largest_gap_ns": 9 * S, "step_time_ns": 9 * S}
    for script in (lambda t: Look(stuck(t, **slow)), lambda t: Look(frozen(t, **slow, state=RankState.SETUP))):
        verdict, seen_s = watch(script, 20, DetectorSettings.exactly(2.0))
        assert verdict.health is Health.HUNG
        assert seen_s == pytest.approx(2.1, abs=0.11)


def test_half_of_the_limit_is_suspect() -> None:
    verdict, _ = watch(lambda t: Look(stuck(t)), 16)
    assert verdict.health is Health.SUSPECT
    assert verdict.silent_s == pytest.approx(16, abs=0.2)
