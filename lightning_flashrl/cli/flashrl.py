"""``flashrl``: asynchronous reinforcement learning from Hydra recipes.

::

    flashrl experiment=grpo_sort weights.max_staleness=2 rollout.workers=1
    flashrl -m experiment=grpo_sort seed=0,1,2
    flashrl status
    flashrl scale rollout=3   # while it runs
    flashrl report
    flashrl audit             # after a run with record=true
    flashrl replay            # after a run with record=true
    flashrl report outputs/grpo_sort/2026-11-25_10-00-00

Without a folder they take the newest run of those below ``outputs``.
Objects are built here and nowhere else: the library never sees a config.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import msgspec
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from lightning_flashrl.asyncrl.history import HISTORY
from lightning_flashrl.errors import ConfigurationError, FlashRLError
from lightning_flashrl.files import replacing

_OUTPUT_DIR = "FLASHRL_OUTPUT_DIR"
"""Where the run writes, for the ranks that it starts."""
_RECORD, _REPLAY = "record", "replay"
"""Folders in that of a run: its steps' rows, and what came of training them again."""
_ROOT_DIR = "outputs"
"""Below it runs have their folders, as ``paths=default`` says."""
_HERE = Path(__file__).resolve().parent.parent
CONFIGS = _HERE / "_configs" if (_HERE / "_configs").is_dir() else _HERE.parent / "configs"
"""The recipes: beside the package in a checkout, inside it in an installed one."""


# --------------------------------------------------------------------------- building
def build(cfg: DictConfig, output_dir: Path, console: Console) -> tuple[Any, Any, Any, Any]:
    """Build what a run needs, and warm the policy up.

    Args:
        cfg: the whole config.
        output_dir: where the run writes.
        console: for people.

    Returns:
        Trainer, module, data module and recorder.

    Raises:
        ConfigurationError: a value that cannot be.
    """
    from hydra.utils import instantiate

    from lightning_flashrl.asyncrl import AsyncRL, RolloutSettings, StepSettings, StreamingDataModule
    from lightning_flashrl.asyncrl.progress import RunProgress
    from lightning_flashrl.asyncrl.recorder import RunRecorder
    from lightning_flashrl.callbacks import FlashRecovery

    make = functools.partial(instantiate, _convert_="all")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    task = make(cfg.task)
    tokenizer, vocabulary = _tokenizer(plain["trainer_engine"], task)
    engine = make(cfg.trainer_engine, **vocabulary)
    data = StreamingDataModule(
        task,
        tokenizer=tokenizer,
        workflow=plain["workflow"]["mode"],
        max_staleness=plain["weights"]["max_staleness"],
        steps=StepSettings(**plain["steps"]),
        rollout=RolloutSettings(**plain["rollout"]),
        seed=plain["seed"],
        log_dir=output_dir / "logs",
        record=output_dir / _RECORD if plain["record"] else None,
        replay=plain["replay"],
    )
    _warm_start(engine, data, plain["warm_start"], output_dir, console)
    algorithm = make(cfg.algorithm)
    critic_engine = make(cfg.critic_engine, policy=engine) if algorithm.uses_critic else None
    module = AsyncRL(
        engine, algorithm, optimizer=make(cfg.optimizer), critic_engine=critic_engine, critic_lr=plain["critic_lr"]
    )
    recorder = RunRecorder(output_dir)
    callbacks = [RunProgress(), recorder, *make(cfg.callbacks).values()]
    if plain["strategy"]["name"] == "flash_ddp":
        callbacks.append(FlashRecovery())
    if cfg.chaos:
        callbacks.append(make(cfg.chaos))
    trainer = make(
        cfg.trainer,
        strategy=plain["strategy"]["name"],
        callbacks=callbacks,
        logger=[*make(cfg.logger).values()],
        default_root_dir=str(output_dir),
        enable_progress_bar=False,
        num_sanity_val_steps=-1,
        val_check_interval=plain["validate_every"],
        check_val_every_n_epoch=None,
    )
    return trainer, module, data, recorder


def _tokenizer(trainer_engine: dict[str, Any], task: Any) -> tuple[Any, dict[str, int]]:
    """Return the tokenizer, and the vocabulary of a model that is made from a config."""
    from lightning_flashrl.tasks import CharacterTokenizer

    path = trainer_engine.get("path")
    if path is None:
        tokenizer = CharacterTokenizer(task.alphabet)
        return tokenizer, {"vocab_size": len(tokenizer)}
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True), {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"trainer_engine.path={path!r} holds no tokenizer ({error}); save one beside the model"
        ) from error


def _warm_start(engine: Any, data: Any, settings: dict[str, Any], output_dir: Path, console: Console) -> None:
    """Train on demonstrations first; once for all ranks and their replacements."""
    import torch

    from lightning_flashrl.asyncrl.warm_start import warm_start

    if not settings["steps"]:
        return
    kept = output_dir / "warm_start.pt"
    if kept.exists():
        engine.load_state_dict(torch.load(kept))
        return
    if int(os.environ.get("LOCAL_RANK", "0")) or int(os.environ.get("NODE_RANK", "0")):
        return  # rank 0's weights are everybody's
    every = max(1, settings["steps"] // 3)

    def tell(step: int, loss: float) -> None:
        if (step + 1) % every == 0:
            console.print(f"warm start: step {step + 1}/{settings['steps']}, loss {loss:.3f}", highlight=False)

    warm_start(engine, data.task, data.tokenizer, **settings, on_step=tell)
    with replacing(kept) as beside:
        torch.save(engine.state_dict(), beside)


def train(cfg: DictConfig, output_dir: Path, console: Console) -> dict[str, Any]:
    """Do a run and return its summary.

    Args:
        cfg: the whole config.
        output_dir: where it writes.
        console: for people.
    """
    import lightning as L
    import torch

    from lightning_flashrl.asyncrl.recorder import SUMMARY_KEYS
    from lightning_flashrl.report.run_report import write_run_report

    output_dir.mkdir(parents=True, exist_ok=True)
    if "OMP_NUM_THREADS" not in os.environ:
        num_processes = cfg.rollout.workers + (cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
    L.seed_everything(cfg.seed, verbose=False)
    trainer, module, data, recorder = build(cfg, output_dir, console)
    trainer.fit(module, data, ckpt_path=cfg.resume_from)
    if recorder.last_validated_step != trainer.global_step:
        trainer.validate(module, data, verbose=False)
    if not trainer.is_global_zero:
        return {}
    summary: dict[str, Any] = recorder.write_summary(module)
    report = write_run_report(output_dir, SUMMARY_KEYS)
    _print_summary(console, summary)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return summary


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    def shown(name: str) -> str:
        value = summary[name]
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"

    table = Table(show_header=False, box=None)
    for title, names in (
        ("steps", ("steps",)),
        ("reward, first and last", ("reward_first", "reward_last")),
        ("accuracy, first and last", ("accuracy_first", "accuracy_last")),
        ("rows generated, trained", ("rows_generated", "rows_trained")),
        ("rows dropped, lost, doubled", ("rows_dropped", "rows_lost", "rows_duplicated")),
        ("staleness, largest", ("staleness_max",)),
        ("idle, trainer and rollout", ("trainer_idle_share", "rollout_idle_share")),
        ("seconds", ("wall_s",)),
    ):
        table.add_row(title, *(shown(name) for name in names))
    if summary["kills"]:
        table.add_row("kills", shown("kills"))
        for role, some in summary["recovery_ms"].items():
            if some:
                table.add_row(f"{role} back after, ms", ", ".join(f"{ms:,.0f}" for ms in some))
        table.add_row("steps lost", shown("steps_lost"))
    console.print(table)


# --------------------------------------------------------------------------- commands
@contextlib.contextmanager
def _announced(output_dir: Path) -> Iterator[None]:
    """Let ranks that this process starts write to the same folder."""
    before = os.environ.get(_OUTPUT_DIR)
    os.environ[_OUTPUT_DIR] = str(output_dir)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_OUTPUT_DIR]


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def _run(cfg: DictConfig) -> float | None:
    settings = HydraConfig.get()
    output_dir = Path(os.environ.get(_OUTPUT_DIR) or settings.runtime.output_dir).resolve()
    cfg.paths.output_dir = str(output_dir)
    if settings.mode == RunMode.MULTIRUN and cfg.strategy.name == "flash_ddp":
        raise ConfigurationError("strategy=flash_ddp starts its ranks with the same command line; run without -m")
    with _announced(output_dir):
        summary = train(cfg, output_dir, Console())
    return summary.get("reward_last")


# --------------------------------------------------------------------------- what is asked of a run
def status(output_dir: Path, console: Console) -> int:
    """Show a run's processes. Returns the exit status."""
    from lightning_flashrl import clock
    from lightning_flashrl.asyncrl.processes import read_processes

    path = output_dir / "processes.json"
    try:
        written_s, entries = read_processes(path)
    except FileNotFoundError:
        console.print(f"{path} does not exist; give the output folder of a run that has begun to train", style="red")
        return 1
    table = Table("role", "rank", "pid", "since", "state")
    now_s = clock.wall_s()
    for entry in entries:
        is_there = Path(f"/proc/{entry.pid}").exists()
        since = f"{now_s - entry.since_s:,.0f} s" if is_there and entry.since_s else "–"
        rank = str(entry.rank) if entry.rank >= 0 else ""
        table.add_row(entry.role, rank, str(entry.pid), since, entry.state if is_there else "ended")
    console.print(table)
    console.print(f"as of {now_s - written_s:,.1f} s ago", highlight=False)
    return 0


def report(output_dir: Path, console: Console) -> int:
    """Draw a run's report anew. Returns the exit status."""
    from lightning_flashrl.asyncrl.recorder import SUMMARY_KEYS
    from lightning_flashrl.report.run_report import write_run_report

    try:
        path = write_run_report(output_dir, SUMMARY_KEYS)
    except FileNotFoundError as error:
        console.print(f"{error.filename} does not exist; give the output folder of a run", style="red")
        return 1
    console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def scale(output_dir: Path, wishes: Sequence[str], console: Console) -> int:
    """Add or remove workers of a run that goes on. Returns the exit status.

    Args:
        output_dir: of the run.
        wishes: ``role=number`` each.
        console: for people.
    """
    from lightning_flashrl.asyncrl.host import HostAddress
    from lightning_flashrl.asyncrl.host_calls import RemoteHost

    numbers = {}
    for wish in wishes:
        role, _, number = wish.partition("=")
        if not role or not number.isdecimal():
            console.print(f"{wish!r} is no wish; write role=number, such as rollout=3", style="red")
            return 2
        numbers[role] = int(number)
    path = output_dir / "session.json"
    try:
        address = msgspec.json.decode(path.read_bytes(), type=HostAddress)
    except FileNotFoundError:
        console.print(f"{path} does not exist; give the output folder of a run that goes on", style="red")
        return 1
    try:
        host = RemoteHost(address)
        with host.queue:
            for role, count in numbers.items():
                host.scale(role, count)
                console.print(f"{count} {role} worker(s)", highlight=False)
    except FlashRLError as error:
        console.print(str(error), style="red")
        return 1
    return 0


def audit(output_dir: Path, console: Console) -> int:
    """Check a recorded run's rows one by one. Returns the exit status."""
    from lightning_flashrl.asyncrl.audit import audit as check

    path = output_dir / "config" / "config.yaml"
    try:
        bound = OmegaConf.load(path).weights.max_staleness if path.exists() else None
        found = check(output_dir, bound)
    except ConfigurationError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 1
    told = f"{found.num_steps:,} steps, {found.num_rows:,} rows, {found.num_kills:,} kills"
    console.print(f"{told}, staleness at most {found.staleness_max}", highlight=False)
    for fault in found.faults:
        console.print(fault, style="red", soft_wrap=True)
    if not found.faults:
        console.print("every step is there, every row was trained once and in time", highlight=False)
    return 1 if found.faults else 0


def replay(output_dir: Path, console: Console) -> int:
    """Train a recorded run again, without rollouts, and compare the weights. Returns the exit status."""
    output_dir, config = output_dir.resolve(), output_dir.resolve() / "config"
    if not (output_dir / _RECORD).is_dir() or not config.is_dir():
        console.print(f"{output_dir} holds no recorded run; give the folder of one with record=true", style="red")
        return 1
    again = output_dir / _REPLAY
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    warm = output_dir / "warm_start.pt"
    if warm.exists():
        shutil.copy(warm, again)
    settings = ["record=false", f"replay={output_dir / _RECORD}", f"paths.output_dir={again}", f"hydra.run.dir={again}"]
    settings += ["hydra.output_subdir=config", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    command = ["-m", "lightning_flashrl.cli.flashrl", "--config-path", str(config), "--config-name", "config"]
    done = subprocess.run([sys.executable, *command, *settings], check=False)
    if done.returncode:
        return done.returncode
    found = [json.loads((folder / "summary.json").read_text())["weights_sha256"] for folder in (output_dir, again)]
    if found[0] == found[1]:
        console.print(f"the same weights, bit for bit: sha256 {found[0]}", highlight=False, soft_wrap=True)
        return 0
    console.print(f"other weights: sha256 {found[0]} then, {found[1]} now", style="red", soft_wrap=True)
    return 1


_COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "status": (status, "processes.json"),
    "report": (report, HISTORY),
    "scale": (scale, "session.json"),
    "audit": (audit, _RECORD),
    "replay": (replay, _RECORD),
}
"""Commands, and what the folder of a run must have for each."""


def _ask(command: str, words: list[str], console: Console) -> int:
    """Do what is asked of a run, of the newest if no folder is given. Returns the exit status."""
    function, name = _COMMANDS[command]
    output_dir = None
    if words and (command != "scale" or "=" not in words[0] or Path(words[0]).is_dir()):
        output_dir = Path(words.pop(0))
    if bool(words) != (command == "scale"):
        told = "ROLE=NUMBER …" if command == "scale" else ""
        print(f"usage: flashrl {command} [DIR] {told}".rstrip(), file=sys.stderr)
        return 2
    if output_dir is None:
        found = sorted(Path(_ROOT_DIR).glob(f"*/*/{name}"), key=lambda path: path.stat().st_mtime)
        if not found:
            told = f"no run below {Path(_ROOT_DIR).resolve()} has {name}; give its folder: flashrl {command} DIR"
            console.print(told, style="red", soft_wrap=True)
            return 1
        output_dir = found[-1].parent
        console.print(str(output_dir), highlight=False, soft_wrap=True)
    return function(output_dir, *([words] if words else []), console)


# --------------------------------------------------------------------------- the command line
def _what_was_wrong(error: BaseException) -> str:
    """Return the package's own text if there is one below Hydra's, else Hydra's and what it was caused by."""
    own: BaseException | None = error
    while own is not None and not isinstance(own, FlashRLError):
        own = own.__cause__
    if own is not None:
        return str(own)
    cause = "" if error.__cause__ is None else f"\n{error.__cause__}"
    return f"{error}{cause}"


def main() -> None:
    """Be ``flashrl``."""
    if len(sys.argv) > 1 and sys.argv[1] in _COMMANDS:
        sys.exit(_ask(sys.argv[1], sys.argv[2:], Console()))
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        _run()
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        print(f"flashrl: {_what_was_wrong(error)}", file=sys.stderr)
        sys.exit(2)
    except FlashRLError as error:
        print(f"flashrl: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
