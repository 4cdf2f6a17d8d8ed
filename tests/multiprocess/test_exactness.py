# ruff: noqa: E501 - one line a case
"""A run with faults ends bit for bit like stock `ddp` without any: weights, optimizer state, schedulers, random states of
every rank, loop counters, logged values, callbacks.

One line a case: ``name | ranks | arguments of the job | chaos lines, separated by ; | options of flashrun``. Faults are
given as chaos lines, or as ``--die rank:step:hook[:how[:incarnation]]`` in the job's own hooks.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.multiprocess.harness import assert_exact, run_flash, run_stock

MANY = "--feature csv --feature batchnorm --feature endsync --feature gather --feature gradnorm --clip 1.0 --sanity 2"
MANY += " --val-every 4 --checkpoint-every 3"
SMALL_BUCKETS = "{'bucket_cap_mb': 0.005}"

QUICK = f"""
forward | 3 | {MANY} | kill rank=1 step=5 phase=forward |
inside the optimizer | 3 | {MANY} --die 0:4:optimizer | |
batch end | 3 | {MANY} --die 1:6:batch_end_late | |
a replacement saves a checkpoint | 3 | {MANY} | kill rank=1 step=5 phase=optimizer_step;kill rank=1 step=6 phase=checkpoint |
all-reduce | 3 | --ddp "{SMALL_BUCKETS}" | kill rank=2 step=4 phase=all_reduce count=2 |
donor gives | 3 | --die 1:4:backward --die 0:1:giving | |
stopped | 3 | | stop rank=1 step=4 phase=backward |
accumulation | 3 | --accumulate 3 --clip 0.3 --batches 7 | kill rank=1 step=1 phase=forward count=3 |
"""

SLOW = f"""
commit | 3 | | kill rank=1 step=4 phase=commit |
five times | 2 | | {";".join(f"kill rank=1 step={s} phase={p}" for s, p in [(2, "backward"), (2, "commit"), (4, "forward"), (6, "batch_start"), (8, "backward")])} |
after the last collective of a batch by hand, before validation | 2 | --manual --feature single --val-every 4 --die 0:4:batch_end | |
sanity check | 3 | {MANY} --die 0:0:sanity | |
set-up | 3 | {MANY} | kill rank=1 step=0 phase=setup |
all but one | 3 | | kill rank=0 step=4 phase=backward;kill rank=2 step=4 phase=backward |
survivor in rendezvous | 3 | --die 1:4:backward --die 2:1:rendezvous | |
segfault | 2 | | segfault rank=1 step=4 phase=forward |
optimizer step | 3 | | kill rank=0 step=4 phase=optimizer_step |
two steps out of order and one twice | 3 | | kill rank=1 step=8;kill rank=1 step=4;kill rank=1 step=4 |
validation of rank 0 | 3 | {MANY} --die 0:8:validation | |
saving a checkpoint | 3 | {MANY} --die 0:6:checkpoint | |
newcomer enters | 3 | --die 1:4:backward --die 1:1:enter:kill:1 | |
state is sent | 3 | --send --die 1:4:backward --die 1:1:take:kill:1 | |
holds the GIL | 2 | | gil rank=1 step=4 phase=forward | --hang-timeout 4
loader workers | 2 | --workers 2 | kill rank=1 step=8 phase=backward |
backward of rank 0 | 3 | {MANY} | kill rank=0 step=5 phase=backward |
second step | 3 | {MANY} --die 0:1:backward | |
before the step | 3 | {MANY} --die 1:6:before_step | |
collective at batch end, by its count of updates | 3 | {MANY} | kill rank=1 step=6 phase=batch_end |
validation, by its count of updates | 3 | {MANY} | kill rank=0 step=8 phase=validation count=2 |
epoch end | 3 | {MANY} --die 0:12:epoch_end_late | |
train end | 3 | {MANY} --die 1:12:train_end | |
first step | 3 | {MANY} | kill rank=2 step=0 phase=backward |
last step | 3 | | kill rank=1 step=11 phase=forward |
two at once | 4 | | kill rank=0 step=4 phase=forward;kill rank=3 step=4 phase=optimizer_step |
newcomer receives | 3 | --die 1:4:backward --die 1:1:take:kill:1 | |
exit | 2 | | exit rank=1 step=4 phase=optimizer_step |
averaged weights | 3 | --feature ema --feature best --val-every 4 --die 0:8:validation | |
gradients collected by hand | 2 | --manual --feature single --feature collects | kill rank=1 step=1 phase=forward count=2;kill rank=0 step=2 phase=forward count=3 |
sparse gradients | 2 | --feature sparse | kill rank=1 step=4 phase=backward |
loaders made anew | 2 | --reload 1 --val-every 2 --sanity 1 | kill rank=1 step=8 phase=backward;kill rank=0 step=9 phase=batch_start |
scaler | 2 | --precision 16-mixed --clip 0.5 --die 1:4:before_step | |
buffers and frozen weights by hand | 2 | --feature byhand --width 64 | kill rank=1 step=8 phase=backward |
iterable | 2 | --data iterable | kill rank=1 step=8 phase=backward |
group added in training | 2 | --feature unfreeze --feature addgroup --ddp "{{'find_unused_parameters': True}}" | kill rank=1 step=8 phase=backward |
loaders of two lengths | 2 | --data combined --batches 10 --epochs 1 | kill rank=1 step=7 phase=backward |
rich progress bar | 2 | --feature rich --sanity 1 --val-every 3 | kill rank=0 step=7 phase=backward |
stateful loader | 2 | --data stateful --workers 2 | kill rank=0 step=3 phase=backward |
bf16 | 2 | --precision bf16-mixed --die 0:3:optimizer | |
two optimizers | 2 | --manual --ddp "{{'find_unused_parameters': True}}" --die 0:5:between | |
static graph | 2 | --ddp "{{'static_graph': True, 'bucket_cap_mb': 0.005}}" | kill rank=1 step=4 phase=backward |
unfrozen in training | 2 | --feature unfreeze --ddp "{{'find_unused_parameters': True}}" | kill rank=1 step=4 phase=backward;kill rank=0 step=8 phase=backward |
loaders made anew every other epoch | 2 | --reload 2 --epochs 4 --batches 4 --workers 2 --feature persist --feature valworkers | kill rank=1 step=14 phase=forward;kill rank=0 step=16 phase=validation count=2 |
stateful loaders made anew | 2 | --reload 1 --epochs 3 --data stateful --workers 2 | kill rank=1 step=14 phase=backward |
batch start | 3 | {MANY} | kill rank=1 step=6 phase=batch_start |
batch end | 3 | {MANY} --die 1:6:batch_end | |
validation end | 3 | {MANY} --die 1:8:validation_end | |
validation of rank 1 | 3 | {MANY} --die 1:8:validation | |
checkpoint on rank 1 | 3 | {MANY} | kill rank=1 step=6 phase=checkpoint |
set-up of rank 0 | 3 | {MANY} | kill rank=0 step=0 phase=setup |
fit start | 3 | --die 0:0:fit_start | |
train start | 3 | --die 1:0:train_start | |
train end of rank 0 | 3 | --die 0:12:train_end --feature best | |
fit end | 3 | | kill rank=0 step=12 phase=fit_end |
epoch end of rank 2 | 3 | | kill rank=2 step=12 phase=epoch_end |
commit of rank 0 | 3 | | kill rank=0 step=4 phase=commit |
three of four | 4 | | kill rank=0 step=4 phase=commit;kill rank=2 step=4 phase=backward;kill rank=3 step=4 phase=optimizer_step |
two ranks | 2 | | kill rank=1 step=7 phase=backward |
four ranks | 4 | | kill rank=2 step=7 phase=backward |
eight ranks | 8 | | kill rank=5 step=7 phase=backward |
donor before giving | 3 | --die 1:4:backward --die 0:1:give | |
newcomer hears of the state | 3 | --die 1:4:backward --die 1:1:arrival:kill:1 | |
survivor reports | 3 | --die 1:4:backward --die 2:1:report | |
newcomer reports | 3 | --die 1:4:backward --die 1:1:report:kill:1 | |
newcomer in rendezvous | 3 | --die 1:4:backward --die 1:1:rendezvous:kill:1 | |
survivor redoes | 3 | --die 1:4:backward --die 0:1:redo | |
newcomer restored | 3 | --die 1:4:backward --die 1:1:restored:kill:1 | |
survivor restored | 3 | --die 1:4:backward --die 0:1:restored | |
out of memory | 3 | --die 1:5:backward:oom | |
hang without the GIL | 3 | | hang rank=1 step=4 phase=backward | --hang-timeout 4
cold start | 2 | | kill rank=1 step=4 phase=backward | --standby 0
accumulation at the end | 3 | --accumulate 4 --batches 6 | kill rank=1 step=2 phase=batch_end count=1 |
stochastic weight averaging | 3 | --feature swa --epochs 4 | kill rank=0 step=18 phase=epoch_end |
large averaged weights | 2 | --width 2400 --feature ema --max-steps 5 | kill rank=1 step=3 phase=backward |
early stopping | 3 | --feature stops --epochs 6 --die 1:12:validation | |
plateau | 3 | --feature plateau --epochs 3 --die 0:6:validation_end | |
best checkpoints | 3 | --feature best --feature earlystop --epochs 3 --die 0:6:checkpoint | |
one optimizer by hand | 3 | --manual --feature single --ddp "{SMALL_BUCKETS}" | kill rank=0 step=4 phase=backward |
unused parameters | 3 | --feature unused --ddp "{{'find_unused_parameters': True, 'bucket_cap_mb': 0.005}}" | kill rank=1 step=4 phase=backward |
gradients are views | 3 | --ddp "{{'gradient_as_bucket_view': True, 'bucket_cap_mb': 0.005}}" | kill rank=1 step=4 phase=all_reduce count=2 |
static graph, first steps | 3 | --ddp "{{'static_graph': True, 'bucket_cap_mb': 0.005}}" | kill rank=0 step=1 phase=backward |
activation checkpointing | 3 | --feature checkpointing --ddp "{SMALL_BUCKETS}" | kill rank=1 step=5 phase=backward |
persistent workers | 2 | --workers 2 --feature persist | kill rank=0 step=8 phase=forward |
validation every second epoch | 2 | --val-epochs 2 --epochs 4 --batches 3 | kill rank=1 step=4 phase=forward;kill rank=0 step=8 phase=backward |
persistent workers in validation | 2 | --workers 2 --feature persist --feature valworkers --val-every 3 --epochs 3 | kill rank=0 step=7 phase=forward;kill rank=1 step=13 phase=backward |
persistent workers in a validation that is killed | 2 | --workers 2 --feature persist --feature valworkers --sanity 2 --limit-val 2 --die 0:12:validation | |
iterable with workers | 2 | --data iterable --workers 2 | kill rank=0 step=4 phase=optimizer_step |
limits | 3 | --limit-train 4 --limit-val 2 | kill rank=1 step=7 phase=backward |
max steps | 3 | --max-steps 9 | kill rank=0 step=9 phase=fit_end |
LBFGS | 3 | --feature lbfgs | kill rank=1 step=1 phase=backward |
wandb offline | 2 | --feature wandb | kill rank=0 step=7 phase=backward;kill rank=1 step=9 phase=backward |
noisy CSV | 3 | --feature csv --feature noisy --die 0:6:epoch_end_late | |
"""


@dataclass(frozen=True)
class Case:
    """One line of the tables above."""

    name: str
    ranks: int
    arguments: tuple[str, ...]
    chaos: tuple[str, ...]
    options: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Case:
        name, ranks, arguments, chaos, options = (part.strip() for part in line.split("|"))
        words = tuple(word.replace("'", '"').replace("True", "true") for word in shlex.split(arguments))
        return cls(name, int(ranks), words, tuple(c for c in chaos.split(";") if c), tuple(options.split()))

    @property
    def without_faults(self) -> tuple[str, ...]:
        """The same job for the reference."""
        kept: list[str] = []
        words = iter(self.arguments)
        for word in words:
            if word == "--die":
                next(words)
            else:
                kept.append(word)
        return tuple(kept)

    @property
    def num_faults(self) -> int:
        return len(self.chaos) + self.arguments.count("--die")


def _cases() -> list[object]:
    quick = [pytest.param(case, id=case.name) for case in map(Case.parse, QUICK.strip().splitlines())]
    slow = [
        pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in map(Case.parse, SLOW.strip().splitlines())
    ]
    return [*quick, *slow]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", _cases())
def test_ends_like_ddp_without_faults(tmp_path: Path, case: Case) -> None:
    expected = run_stock(case.ranks, *case.without_faults)
    run = run_flash(tmp_path / "run", case.ranks, *case.arguments, chaos=case.chaos, options=case.options)
    assert_exact(run, expected)
    assert run.num_faults >= 1, run.output
    assert sum(len(record["lost"]) for record in run.recoveries) >= case.num_faults, run.recoveries
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.mark.timeout(400)
def test_a_rank_that_is_told_to_end_stops_all_after_the_same_step(tmp_path: Path) -> None:
    run = run_flash(tmp_path / "run", 3, "--feature", "stopped", "--die", "1:4:forward:sigterm")
    assert run.returncode == 0, run.output
    assert "is replaced" not in run.output
    stopped = {int(path.suffix[1:]): path.read_text() for path in (tmp_path / "run").glob("stopped.*")}
    assert stopped == dict.fromkeys(range(3), "6")


@pytest.mark.slow
def test_resumed_from_a_checkpoint_and_killed(tmp_path: Path) -> None:
    first = run_flash(tmp_path / "first", 2, "--checkpoint-every", "4", "--max-steps", "6")
    assert first.returncode == 0, first.output
    checkpoint = str(next((tmp_path / "first" / "ckpt").glob("*step=4.ckpt")))
    expected = run_stock(2, "--resume", checkpoint)
    run = run_flash(tmp_path / "run", 2, "--resume", checkpoint, chaos=("kill rank=1 step=7 phase=backward",))
    assert_exact(run, expected)
    assert run.num_faults == 1


@pytest.mark.timeout(400)
def test_a_rank_killed_when_all_programs_are_over_is_not_missed(tmp_path: Path) -> None:
    expected = run_stock(2)
    run = run_flash(tmp_path / "run", 2, "--die", "1:0:left", "--die", "0:0:left")
    assert_exact(run, expected)
    assert run.num_faults == 0
