"""Random faults for the soak: drawn from a seed, struck from outside at moments that no phase names.

Flow of a run: ``draw(seed)`` says which job and which faults; :class:`Assailant` looks into the slots of the running
job and strikes; what is left at the end is compared by the test. The same seed gives the same draw; at which
instruction a strike from outside hits is the machine's choice.

A run never loses every copy of the state, which ends a job by design: faults come in bouts, each bout spares one rank,
and the next begins only when everybody is back. Faults at phases come at moments that nobody here controls, so a run
that has some spares the same rank throughout.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lightning_flashrl.recovery.slot import Heartbeat, RankSlot, RankState
from lightning_flashrl.supervisor.environment import slot_region_bytes
from lightning_flashrl.types import Phase
from tests.multiprocess.harness import Run, environment, flash_command, read_digests
from tests.processes import supervisor_of

LENGTH = "--epochs 3 --batches 10"
MANY = "--feature csv --feature batchnorm --feature endsync --feature gather --feature gradnorm --clip 1.0 --sanity 2"
MANY += " --val-every 4 --checkpoint-every 3"
CONFIGURATIONS = tuple(
    tuple(shlex.split(line))
    for line in f"""
3 30 {MANY}
2 30
4 30 --ddp '{{"bucket_cap_mb": 0.005}}' --clip 0.5
2 15 --accumulate 2 --clip 0.3 --feature noisy --feature csv
3 30 --feature ema --feature best --val-every 5
2 30 --workers 2 --val-every 5
3 30 --data iterable --feature batchnorm
2 30 --data stateful --workers 2 --checkpoint-every 4
2 60 --manual --ddp '{{"find_unused_parameters": true}}'
2 25 --precision 16-mixed --clip 0.5 --val-every 7
3 30 --precision bf16-mixed --checkpoint-every 5 --feature objects
4 30 {MANY} --feature noisy
2 30 --data iterable --workers 2 --feature persist
3 30 --feature unused --ddp '{{"find_unused_parameters": true, "bucket_cap_mb": 0.005}}'
2 30 --ddp '{{"static_graph": true, "bucket_cap_mb": 0.005}}' --feature endsync
3 30 --feature usesbatch --feature plateau --feature earlystop --val-every 5 --sanity 1
""".strip().splitlines()
)
"""Ranks, updates of the whole job, then arguments of the job."""

SUPERVISOR = -1
"""In the place of a rank: strikes the process that looks after them."""
TIMEOUT_S = 150.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segfault": signal.SIGSEGV}
_PHASES = ["batch_start", "forward", "backward", "all_reduce", "commit", "optimizer_step", "batch_end", "checkpoint"]
_PHASES += ["validation", "epoch_end"]


@dataclass(frozen=True)
class Strike:
    """A fault from outside: ``delay_s`` after the strike before it (the first one: after its bout began)."""

    rank: int
    how: str
    delay_s: float


@dataclass(frozen=True)
class Bout:
    """Strikes close together. It begins when any rank has come to ``step``; -1: when processes exist."""

    step: int
    strikes: tuple[Strike, ...]


@dataclass(frozen=True)
class Draw:
    """Everything that a seed decides."""

    seed: int
    ranks: int
    arguments: tuple[str, ...]
    chaos: tuple[str, ...]
    bouts: tuple[Bout, ...]

    @property
    def options(self) -> tuple[str, ...]:
        needs_detector = any(line.startswith(("hang", "gil")) for line in self.chaos)
        return ("--hang-timeout", "8") if needs_detector else ()

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.ranks} ranks, {shlex.join(self.arguments)}", *self.chaos]
        for bout in self.bouts:
            when = "from the start" if bout.step < 0 else f"from step {bout.step}"
            told = [f"{s.how} {_whom(s.rank)} after {s.delay_s * 1e3:.1f} ms" for s in bout.strikes]
            lines.append(f"{when}: {', '.join(told)}")
        return "\n  ".join(lines)


def _whom(rank: int) -> str:
    return "the supervisor" if rank == SUPERVISOR else f"rank {rank}"


def draw(seed: int) -> Draw:
    """Decide what a run is."""
    rng = random.Random(seed)
    ranks_text, updates_text, *arguments = rng.choice(CONFIGURATIONS)
    ranks, updates = int(ranks_text), int(updates_text)
    num_faults = rng.randint(1, 4)
    has_phases = rng.random() < 0.4
    spared = rng.randrange(ranks)
    chaos: list[str] = []
    while has_phases and num_faults and (not chaos or rng.random() < 0.4):
        chaos.append(_draw_line(rng, updates, _other(rng, ranks, spared)))
        num_faults -= 1
    steps = sorted(rng.choice((-1, *(rng.randrange(updates) for _ in range(4)))) for _ in range(num_faults))
    bouts: list[Bout] = []
    while num_faults > 0:
        if not has_phases:
            spared = rng.randrange(ranks)
        size = min(num_faults, rng.choice((1, 2, 2, 3)))
        step = steps[len(steps) - num_faults]
        first_s = rng.uniform(0.0, 2.5) if step < 0 else rng.choice((0.0, rng.uniform(0.0, 0.1)))
        strikes = [Strike(_other(rng, ranks, spared), _draw_signal(rng), first_s)]
        for _ in range(size - 1):
            delay_s = rng.choice((0.0, 0.001 * 1000 ** rng.random(), 0.001 * 1000 ** rng.random(), rng.uniform(0, 1.5)))
            strikes.append(Strike(_other(rng, ranks, spared), _draw_signal(rng), delay_s))
        bouts.append(Bout(step, tuple(strikes)))
        num_faults -= size
    for _ in range(rng.choice((0, 0, 1, 2))):
        _add_supervisor(rng, updates, bouts)
    return Draw(seed, ranks, (*LENGTH.split(), *arguments), tuple(chaos), tuple(bouts))


def _add_supervisor(rng: random.Random, updates: int, bouts: list[Bout]) -> None:
    """Strike the supervisor too: beside ranks, or in a bout of its own."""
    strike = Strike(SUPERVISOR, rng.choice(["kill"] * 4 + ["stop"]), rng.choice((0.0, 0.001 * 1000 ** rng.random())))
    index = rng.randrange(len(bouts) + 1)
    if index == len(bouts):
        after = bouts[-1].step + 1 if bouts else 0
        bouts.append(Bout(rng.randrange(min(after, updates - 1), updates), (strike,)))
    else:
        bout = bouts[index]
        place = rng.randrange(len(bout.strikes) + 1)
        bouts[index] = Bout(bout.step, (*bout.strikes[:place], strike, *bout.strikes[place:]))


def _other(rng: random.Random, ranks: int, spared: int) -> int:
    return rng.choice([rank for rank in range(ranks) if rank != spared])


def _draw_signal(rng: random.Random) -> str:
    return rng.choice(["kill"] * 6 + ["stop", "segfault"])


def _draw_line(rng: random.Random, updates: int, rank: int) -> str:
    how = rng.choice(["kill"] * 10 + ["segfault", "exit", "stop"] * 2 + ["hang", "gil"])
    return f"{how} rank={rank} step={rng.randrange(updates)} phase={rng.choice(_PHASES)}"


@dataclass
class Outcome:
    """What a run was like.

    Attributes:
        run: for the comparison.
        strikes: those that were made from outside, with the place at which they hit.
        losses: reasons of the losses that the controller told of.
        seconds: of the whole run.
    """

    run: Run
    strikes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wheres(self) -> list[str]:
        return [strike.partition(" at ")[2] for strike in self.strikes]


class Assailant:
    """Strikes the ranks of one running job, and their supervisor, one look at a time.

    Args:
        root: process id of ``flashrun``.
        out: folder of the job.
        bouts: what to do.
        ranks: of the job.
    """

    def __init__(self, root: int, out: Path, bouts: tuple[Bout, ...], ranks: int) -> None:
        self.struck: list[str] = []
        self._root = root
        self._struck_supervisor: int | None = None
        self._out = out
        self._ranks = ranks
        self._slots: dict[int, RankSlot] = {}
        self._bouts = collections.deque(bouts)
        self._strikes: collections.deque[Strike] = collections.deque()
        self._since = time.monotonic()
        self._gone: dict[int, int] = {}
        """Incarnation that was struck last, by rank."""

    def look(self) -> None:
        """Strike if it is time to."""
        if len(self._slots) < self._ranks and not self._map_slots():
            return
        beats = {rank: slot.heartbeat() for rank, slot in self._slots.items()}
        if not self._strikes:
            if not self._bouts or not self._may_begin(self._bouts[0], beats):
                return
            self._strikes.extend(self._bouts.popleft().strikes)
            self._since = time.monotonic()
        strike = self._strikes[0]
        if time.monotonic() - self._since < strike.delay_s:
            return
        if strike.rank == SUPERVISOR:
            if self._strike_supervisor(strike, beats[0]):
                self._strikes.popleft()
                self._since = time.monotonic()
            return
        beat = beats[strike.rank]
        if beat.pid == 0:
            return
        if self._gone.get(strike.rank, -1) >= beat.incarnation or len(list(self._out.glob("digest*"))) == self._ranks:
            return
        if self._strike(strike, beat):
            self._strikes.popleft()
            self._since = time.monotonic()

    def _may_begin(self, bout: Bout, beats: dict[int, Heartbeat]) -> bool:
        for rank, incarnation in self._gone.items():
            if beats[rank].incarnation <= incarnation:
                return False
        is_calm = all(beat.state in (RankState.TRAINING, RankState.FINISHED) for beat in beats.values())
        if bout.step < 0 and not self._gone:
            return any(beat.pid for beat in beats.values())
        return is_calm and max(beat.global_step for beat in beats.values()) >= bout.step

    def _strike(self, strike: Strike, beat: Heartbeat) -> bool:
        try:
            pidfd = os.pidfd_open(beat.pid)
        except ProcessLookupError:
            return False
        try:
            now = self._slots[strike.rank].heartbeat()
            if (now.pid, now.incarnation) != (beat.pid, beat.incarnation):
                return False
            signal.pidfd_send_signal(pidfd, _SIGNALS[strike.how])
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        where = now.state.name.lower()
        if now.state is RankState.TRAINING:
            where = f"{Phase(now.phase).name.lower()}"
        states = [slot.heartbeat().state for rank, slot in self._slots.items() if rank != strike.rank]
        is_training = any(state in (RankState.TRAINING, RankState.FINISHED) for state in states)
        if is_training and any(state not in (RankState.TRAINING, RankState.FINISHED) for state in states):
            where += " beside a recovery"
        self._gone[strike.rank] = now.incarnation
        self.struck.append(
            f"{strike.how} rank {strike.rank} incarnation {now.incarnation} step {now.global_step} at {where}"
        )
        return True

    def _strike_supervisor(self, strike: Strike, beat: Heartbeat) -> bool:
        pid = supervisor_of(self._root)
        if pid in (None, self._struck_supervisor):
            return False
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _SIGNALS[strike.how])
        self._struck_supervisor = pid
        self.struck.append(f"{strike.how} the supervisor at {Phase(beat.phase).name.lower()} of rank 0")
        return True

    def _map_slots(self) -> bool:
        """Find the memory files of the job's slots among the descriptors of its root."""
        folder = Path(f"/proc/{self._root}/fd")
        with contextlib.suppress(OSError):
            for entry in folder.iterdir():
                found = re.fullmatch(r"/memfd:flashrl-rank(\d+) .*", os.readlink(entry))
                if found is None or int(found[1]) in self._slots:
                    continue
                fd = os.open(entry, os.O_RDWR)
                if os.fstat(fd).st_size:
                    self._slots[int(found[1])] = RankSlot(fd, slot_region_bytes())
                else:  # just made
                    os.close(fd)
        return len(self._slots) == self._ranks

    def pids(self) -> list[int]:
        """Processes of the ranks."""
        return [pid for slot in self._slots.values() if (pid := slot.heartbeat().pid)]

    def close(self) -> None:
        for slot in self._slots.values():
            slot.close()
            os.close(slot.fd)
        self._slots.clear()


@contextlib.contextmanager
def busy_loop() -> Iterator[None]:
    """Other work on the same machine."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_under_fire(draw: Draw, out: Path) -> Outcome:
    """Run the job of a draw beside a busy loop, struck as drawn."""
    out.mkdir(parents=True)
    command = flash_command(out, draw.ranks, *draw.arguments, chaos=draw.chaos, options=draw.options)
    began = time.monotonic()
    log = out / "output.log"
    with busy_loop(), log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment() | {"PYTHONFAULTHANDLER": "1"},
            cwd=out,
            start_new_session=True,
        )
        assailant = Assailant(process.pid, out, draw.bouts, draw.ranks)
        try:
            while process.poll() is None and time.monotonic() - began < TIMEOUT_S:
                assailant.look()
                time.sleep(0.0005)
            returncode = process.poll()
            if returncode is None:
                _show_stacks(process.pid, assailant.pids())
                process.kill()
                process.wait()
                returncode = -1
        finally:
            assailant.close()
    output = log.read_text()
    if returncode == -1:
        output += f"\nstill running after {TIMEOUT_S} s; the stacks of all ranks are in their logs"
    losses = re.findall(r"rank \d+ lost: (.*?); it is replaced", output)
    run = Run(returncode, output, read_digests(out), out)
    return Outcome(run, assailant.struck, losses, time.monotonic() - began)


def _show_stacks(root: int, pids: list[int]) -> None:
    """Let every rank write its stacks to its log, and end; the supervisor must not replace them meanwhile."""
    os.kill(root, signal.SIGSTOP)  # first, so that nobody replaces the supervisor either
    supervisor = supervisor_of(root)
    if supervisor is not None:
        os.kill(supervisor, signal.SIGSTOP)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    time.sleep(1.0)
