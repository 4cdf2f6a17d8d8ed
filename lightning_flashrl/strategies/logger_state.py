"""Loggers write to the outside; a replacement of rank 0 must go on where the lost one stood, not begin a new log."""

from __future__ import annotations

import csv
import io
import os
import pickle
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_flashrl.recovery.slot import Region

if TYPE_CHECKING:
    from lightning_flashrl.strategies.runtime import RecoveryRuntime


def capture_loggers(trainer: Trainer) -> list[dict[str, Any]]:
    """What each logger has written and holds back, on rank 0; names and versions on all ranks."""
    return [_capture(logger, trainer.is_global_zero) for logger in trainer.loggers]


def _capture(logger: Any, writes: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"version": getattr(logger, "_version", None)}
    if writes and hasattr(logger, "_wandb_init") and logger._experiment is not None:
        state["run_id"] = logger._experiment.id
    if writes and isinstance(logger, CSVLogger) and logger._experiment is not None:
        writer = logger._experiment
        path = writer.metrics_file_path
        state["csv"] = {
            "path": path,
            "size": os.path.getsize(path) if os.path.exists(path) else -1,
            "keys": list(writer.metrics_keys),
            "rows": [dict(row) for row in writer.metrics],
        }
    return state


def keep_versions(trainer: Trainer, runtime: RecoveryRuntime) -> None:
    """Decide the loggers' versions before anything is written, and let a replacement take over its predecessor's."""
    if runtime.facts:
        _adopt_versions(trainer, runtime.facts["loggers"])
        return
    noted = runtime.slot.read(Region.STATIC)
    if noted is not None:
        _adopt_versions(trainer, pickle.loads(noted))
        return
    states = [{"version": logger.version if hasattr(logger, "_version") else None} for logger in trainer.loggers]
    runtime.slot.write(Region.STATIC, [pickle.dumps(states, protocol=5)])


def _adopt_versions(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Before set-up: let each logger continue the predecessor's version, and keep its files from being replaced."""
    for logger, state in zip(trainer.loggers, states, strict=False):
        if state.get("version") is not None and hasattr(logger, "_version"):
            logger._version = state["version"]
        if state.get("run_id") is not None and hasattr(logger, "_wandb_init"):
            logger._wandb_init.update(id=state["run_id"], resume="allow")
        written = state.get("csv")
        if written is not None and isinstance(logger, CSVLogger) and os.path.exists(written["path"]):
            with open(written["path"], "rb") as file:
                written["content"] = file.read()
            os.remove(written["path"])


def restore_loggers(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """After set-up: put files and pending rows back to the moment of the capture."""
    for logger, state in zip(trainer.loggers, states, strict=False):
        written = state.get("csv")
        if written is None or not isinstance(logger, CSVLogger):
            continue
        writer = logger.experiment
        writer.metrics[:] = [dict(row) for row in written["rows"]]
        writer.metrics_keys[:] = written["keys"]
        if written["size"] >= 0:
            with open(written["path"], "wb") as file:
                file.write(_content_at(written))
        elif os.path.exists(written["path"]):
            os.remove(written["path"])


def _content_at(written: dict[str, Any]) -> bytes:
    """The file as it was: cut to its size, with the columns it had (a new metric rewrites the whole file)."""
    content: bytes = written.get("content", b"")
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    if rows and list(rows[0]) != written["keys"]:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, fieldnames=written["keys"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        content = text.getvalue().encode()
    return content[: written["size"]]
