"""What a user does in the cells of a notebook, as one program: each named cell prints a line of JSON with its outcome.

``python notebook.py OUT CELL...``; the cells share one interpreter, as in a notebook.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_flashrl import FaultSchedule, FlashRecovery, Phase, StepTag

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
OUT = Path(sys.argv[1])
NUM_STEPS = 18


class Points(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random points, moved at random by whoever loads them."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        point = torch.randn(12, generator=generator) + 0.1 * random.random() + 0.1 * torch.randn(12)
        return point, torch.randint(0, 5, (), generator=generator)


class Model(L.LightningModule):
    def __init__(self, *, dies_at_the_end: bool = False, raises: bool = False, is_slow: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 5))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=5)
        self.dies_at_the_end, self.raises, self.is_slow = dies_at_the_end, raises, is_slow

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.is_slow:
            time.sleep(0.05)
        if self.raises and self.global_step == 4 and self.global_rank == 1:
            raise ValueError("a mistake of the user")
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        is_first = os.environ.get("RANK") == "0" and os.environ.get("FLASHRL_INCARNATION") == "0"
        if self.dies_at_the_end and is_first and self.trainer.state.finished:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().state_dict(*args, **kwargs)


def loader(num_workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Points(), batch_size=8, shuffle=True, num_workers=num_workers)


def make_trainer(name: str, strategy: Any = "flash_ddp_notebook", callbacks: Any = (), **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=kwargs.pop("devices", 2),
        strategy=strategy,
        max_epochs=3,
        logger=CSVLogger(OUT / name, flush_logs_every_n_steps=4),
        log_every_n_steps=1,
        callbacks=[ModelCheckpoint(OUT / name / "best", monitor="val_loss", save_top_k=2, save_last=True), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
        **kwargs,
    )


def digest(name: str, model: Model, trainer: L.Trainer) -> dict[str, Any]:
    """Everything that came back to the interpreter."""
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.numpy().tobytes())
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    content = torch.load(OUT / name / "best" / "last.ckpt", weights_only=False)
    csv = sorted((OUT / name).rglob("metrics.csv"))
    return {
        "weights": sha.hexdigest(),
        "is_training": model.training,
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "callback_metrics": {k: float(v) for k, v in sorted(trainer.callback_metrics.items())},
        "logged_metrics": {k: float(v) for k, v in sorted(trainer.logged_metrics.items())},
        "progress_bar_metrics": {k: float(v) for k, v in sorted(trainer.progress_bar_metrics.items())},
        "state": [str(trainer.state.status), str(trainer.state.fn), str(trainer.state.stage)],
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "best": [Path(checkpoint.best_model_path).name, float(checkpoint.best_model_score or 0.0)],
        "optimizers": hashlib.sha256(repr(content["optimizer_states"]).encode()).hexdigest(),
        "csv": [path.read_text() for path in csv],
        "log_dir": os.path.relpath(trainer.log_dir or OUT, OUT / name),
        "rank_pids": getattr(trainer.strategy, "rank_pids", dict)(),
    }


def fit(
    name: str, *, strategy: Any = "flash_ddp_notebook", callbacks: Any = (), num_workers: int = 0, **of_model: Any
) -> Any:
    L.seed_everything(3, verbose=False)
    model, trainer = Model(**of_model), make_trainer(name, strategy, callbacks)
    trainer.fit(model, loader(num_workers), loader())
    return digest(name, model, trainer)


def parent(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


def kill_at_step(trainer: L.Trainer, rank: int, step: int) -> threading.Thread:
    """What a cell does: look at the ranks from a thread, and kill one."""

    def look_and_kill() -> None:
        strategy: Any = trainer.strategy
        while strategy.heartbeats().get(rank) is None or strategy.heartbeats()[rank].global_step < step:
            time.sleep(0.005)
        os.kill(strategy.rank_pids()[rank], signal.SIGKILL)

    thread = threading.Thread(target=look_and_kill)
    thread.start()
    return thread


# --------------------------------------------------------------------------- cells
def plain() -> Any:
    return fit("plain")


def stock() -> Any:
    return fit("stock", strategy="ddp_notebook")


def scheduled() -> Any:
    faults = FaultSchedule().kill(0, StepTag(3, Phase.BACKWARD)).kill(1, StepTag(8, Phase.OPTIMIZER_STEP))
    faults.kill(0, StepTag(6, Phase.VALIDATION)).stop(1, StepTag(14, Phase.FORWARD))
    return fit("scheduled", callbacks=[faults, FlashRecovery(hang_timeout_s=2.0)])


def at_the_end() -> Any:
    return fit("at_the_end", dies_at_the_end=True)


def killed_by_hand() -> Any:
    L.seed_everything(3, verbose=False)
    model, trainer = Model(is_slow=True), make_trainer("killed_by_hand")
    killer = kill_at_step(trainer, rank=1, step=5)
    trainer.fit(model, loader(), loader())
    killer.join()
    return digest("killed_by_hand", model, trainer)


def supervisor_killed() -> Any:
    """The process that looks after the ranks is killed, and a rank with it."""
    L.seed_everything(3, verbose=False)
    model, trainer = Model(is_slow=True), make_trainer("supervisor_killed")

    def look_and_kill() -> None:
        strategy: Any = trainer.strategy
        while not strategy.rank_pids() or strategy.heartbeats()[0].global_step < 3:
            time.sleep(0.005)
        victim = strategy.rank_pids()[1]
        for name in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if name.read_text() == "flashrl-superv\n" and parent(name.parent.name) == parent(victim):
                    os.kill(int(name.parent.name), signal.SIGKILL)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=look_and_kill)
    killer.start()
    trainer.fit(model, loader(), loader())
    killer.join()
    return digest("supervisor_killed", model, trainer)


def in_a_thread() -> Any:
    L.seed_everything(3, verbose=False)
    model, trainer = Model(is_slow=True), make_trainer("in_a_thread")
    thread = threading.Thread(target=trainer.fit, args=(model, loader(), loader()))
    thread.start()
    kill_at_step(trainer, rank=0, step=5).join()
    thread.join()
    return digest("in_a_thread", model, trainer)


def with_workers() -> Any:
    faults = FaultSchedule().kill(1, StepTag(5, Phase.FORWARD))
    return [fit("with_workers", num_workers=2), fit("with_workers_killed", num_workers=2, callbacks=[faults])]


def other_functions() -> Any:
    L.seed_everything(3, verbose=False)
    model, trainer = Model(), make_trainer("other", callbacks=[FaultSchedule().kill(1, StepTag(0, Phase.VALIDATION))])
    validated = trainer.validate(model, loader(), verbose=False)
    predicted = trainer.predict(model, loader())
    try:
        trainer.predict(model, loader(), return_predictions=True)
    except ValueError as error:
        refused = str(error)
    return {
        "validated": validated,
        "metrics": list(map(str, trainer.callback_metrics)),
        "predicted": predicted,
        "refused": refused,
    }


def after_the_fit() -> Any:
    """The interpreter goes on with what came back."""
    L.seed_everything(3, verbose=False)
    model, trainer = Model(), make_trainer("after")
    trainer.fit(model, loader(), loader())
    trainer.save_checkpoint(OUT / "after.ckpt")
    saved = torch.load(OUT / "after.ckpt", weights_only=False)
    validated = trainer.validate(model, loader(), verbose=False)
    best = trainer.validate(model, loader(), ckpt_path="best", verbose=False)
    try:
        trainer.fit(model, loader(), loader())
    except ValueError as error:
        refused = str(error)
    same = all(torch.equal(saved["state_dict"][name], value) for name, value in model.state_dict().items())
    return {"step": saved["global_step"], "same": same, "validated": validated, "best": best, "refused": refused}


def mistake() -> Any:
    try:
        fit("mistake", raises=True)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return {"kind": type(error).__name__, "text": str(error), "rank": getattr(error, "global_rank", None)}
    return None


def output() -> Any:
    """A notebook's streams are objects, not descriptors."""

    class Chatty(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            print(f"hello from {trainer.global_rank}")
            print(f"grüße von {trainer.global_rank}", file=sys.stderr)
            logging.getLogger("chat").warning("log of %d", trainer.global_rank)
            os.write(1, b"written\n")

    shown, shown_too = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown_too):
        handler = logging.StreamHandler()
        logging.getLogger("chat").addHandler(handler)
        fit("output", callbacks=[Chatty(), FaultSchedule().kill(1, StepTag(5, Phase.FORWARD))])
    logging.getLogger("chat").removeHandler(handler)
    return {"stdout": shown.getvalue(), "stderr": shown_too.getvalue()}


def kept_logs() -> Any:
    from lightning_flashrl.strategies import FlashDDPNotebookStrategy

    faults = FaultSchedule().kill(1, StepTag(5, Phase.FORWARD))
    fit("kept", strategy=FlashDDPNotebookStrategy(log_dir=str(OUT / "logs")), callbacks=[faults])
    records = [json.loads(line) for line in (OUT / "logs" / "recovery.jsonl").read_text().splitlines()]
    return {
        "files": sorted(str(p.relative_to(OUT / "logs")) for p in (OUT / "logs").rglob("*.log")),
        "lost": records[0]["lost"],
    }


def after_thread_pools() -> Any:
    """Thread pools that the interpreter has used do not exist in a fork."""
    torch.set_num_threads(2)
    side = torch.randn(512, 512, requires_grad=True)
    (side @ side).sum().backward()
    try:
        return {"weights": fit("after_thread_pools")["weights"], "threads": torch.get_num_threads()}
    finally:
        torch.set_num_threads(1)


def interrupted() -> Any:
    """Ctrl-C in a cell, and then another cell."""
    model, trainer = Model(is_slow=True), make_trainer("interrupted")

    def interrupt() -> None:
        strategy: Any = trainer.strategy
        while strategy.heartbeats().get(0) is None or strategy.heartbeats()[0].global_step < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    began = time.monotonic()
    try:
        trainer.fit(model, loader(), loader())
    except (SystemExit, KeyboardInterrupt) as error:
        kind = type(error).__name__
    thread.join()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return {"kind": kind, "status": str(trainer.state.status), "took_s": time.monotonic() - began}


def all_die() -> Any:
    """Nobody is left to give state."""
    faults = FaultSchedule().kill(0, StepTag(8, Phase.FORWARD)).kill(1, StepTag(8, Phase.FORWARD))
    try:
        fit("all_die", callbacks=[faults])
    except Exception as error:  # noqa: BLE001 - the test looks at it
        kind, text = type(error).__name__, str(error)
    again = fit("all_die_and_restart", callbacks=[faults, FlashRecovery(fallback="last")])
    return {"kind": kind, "text": text, "again": again}


def keeper_killed() -> Any:
    """The one process whose loss ends the job, besides the interpreter."""
    model, trainer = Model(is_slow=True), make_trainer("keeper_killed")

    def look_and_kill() -> None:
        strategy: Any = trainer.strategy
        while not strategy.rank_pids() or strategy.heartbeats()[0].global_step < 3:
            time.sleep(0.005)
        os.kill(parent(strategy.rank_pids()[0]), signal.SIGKILL)

    threading.Thread(target=look_and_kill).start()
    try:
        trainer.fit(model, loader(), loader())
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return {"kind": type(error).__name__, "text": str(error)}
    return None


def dies() -> Any:
    """The interpreter itself is killed in the middle."""
    model, trainer = Model(is_slow=True), make_trainer("dies")
    kill_at_step(trainer, rank=1, step=3)
    threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    trainer.fit(model, loader(), DataLoader(Points(), batch_size=2))
    time.sleep(60)


def refusals() -> Any:
    """Where no rank can be forked."""

    def text_of(function: Callable[[], Any]) -> str:
        try:
            function()
        except ValueError as error:
            return str(error)
        return ""

    found = {"devices": text_of(lambda: make_trainer("refused", devices=1).fit(Model(), loader()))}
    is_initialized, torch.cuda.is_initialized = torch.cuda.is_initialized, lambda: True
    found["cuda"] = text_of(lambda: make_trainer("refused").fit(Model(), loader()))
    torch.cuda.is_initialized = is_initialized
    found["nodes"] = text_of(lambda: make_trainer("refused", num_nodes=2).fit(Model(), loader()))
    return found


def children() -> list[str]:
    """Processes below this one that live; the kernel gets a moment to end those of a keeper that was killed."""
    deadline = time.monotonic() + 3.0
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                state, parent = (
                    (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
                    if entry.name.isdigit()
                    else (b"", b"0")
                )
                if int(parent) == os.getpid() and state != b"Z":
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        found = [command for command in found if "resource_tracker" not in command]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def main() -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come here, so that they are seen
    num_fds = -1
    for name in sys.argv[2:]:
        outcome = globals()[name]()
        left = children()
        if num_fds < 0:
            num_fds = len(os.listdir("/proc/self/fd"))
        line = {"cell": name, "outcome": outcome, "left": left, "fds": len(os.listdir("/proc/self/fd")) - num_fds}
        print("CELL " + json.dumps(line, default=str), flush=True)


if __name__ == "__main__":
    main()
