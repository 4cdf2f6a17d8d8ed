"""Loggers write to the outside; a replacement of rank 0 must go on where the lost one stood, not begin a new log."""

from __future__ import annotations

import csv
import io
import os
import pickle
import shutil
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

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
        _guard_rewrites(writer)
        state["csv"] = {
            "path": path,
            "size": os.path.getsize(path) if os.path.exists(path) else -1,
            "keys": list(writer.metrics_keys),
            "rows": [dict(row) for row in writer.metrics],
        }
    return state


def keep_versions(trainer: Trainer, runtime: RecoveryRuntime, number: int) -> None:
    """Decide the loggers' versions before anything is written, and let a replacement take over its predecessor's.

    Args:
        trainer: before its first function runs in this process.
        runtime: of this process.
        number: of this Trainer among those of the program.
    """
    noted = runtime.slot.read(Region.STATIC)
    versions: dict[int, list[dict[str, Any]]] = pickle.loads(noted) if noted is not None else {}
    if number in versions:
        _adopt_versions(trainer, versions[number])
        if number < runtime.facts.get("trainer", 0) and trainer.is_global_zero:
            _set_past_aside(trainer)
    else:
        versions[number] = [
            {"version": logger.version if hasattr(logger, "_version") else None} for logger in trainer.loggers
        ]
        runtime.slot.write(Region.STATIC, [pickle.dumps(versions, protocol=5)])
    if runtime.facts.get("trainer") == number:
        _adopt_versions(trainer, runtime.facts["loggers"])


def _adopt_versions(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Before set-up: let each logger continue the predecessor's version, and keep its files from being replaced."""
    for logger, state in zip(trainer.loggers, states, strict=False):
        if state.get("version") is not None and hasattr(logger, "_version"):
            logger._version = state["version"]
        if state.get("run_id") is not None and hasattr(logger, "_wandb_init"):
            logger._wandb_init.update(id=state["run_id"], resume="allow")
        written = state.get("csv")
        if written is not None and isinstance(logger, CSVLogger):
            _set_aside(written["path"])


def restore_loggers(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """After set-up: put files and pending rows back to the moment of the capture."""
    while _past:
        path = _past.pop()
        if os.path.exists(_kept(path)):
            os.replace(_kept(path), path)
    for logger, state in zip(trainer.loggers, states, strict=False):
        written = state.get("csv")
        if written is None or not isinstance(logger, CSVLogger):
            continue
        writer = logger.experiment
        writer.metrics[:] = [dict(row) for row in written["rows"]]
        writer.metrics_keys[:] = written["keys"]
        _put_back(written)


def _kept(path: str) -> str:
    """Where the log stands while its file is not whole. If it is there, it is the log, whatever the file holds."""
    return f"{path}.kept"


def _set_aside(path: str) -> None:
    """Move a log away from the writer, which removes a log that it finds.

    A log that stands aside already was left by a replacement that died on its way, or in a rewrite.
    """
    if not os.path.exists(path):
        return
    if os.path.exists(_kept(path)):
        os.remove(path)
    else:
        os.replace(path, _kept(path))


_past: list[str] = []
"""Logs of Trainers that the predecessor was done with; a replacement writes parts of them again on its way."""


def _set_past_aside(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            path = os.path.join(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)
            _set_aside(path)
            _past.append(path)


def _put_back(written: dict[str, Any]) -> None:
    path, kept = written["path"], _kept(written["path"])
    content = b""
    if os.path.exists(kept):
        with open(kept, "rb") as file:
            content = file.read()
    if written["size"] >= 0:
        with open(path, "wb") as file:
            file.write(_content_at(written, content))
    elif os.path.exists(path):
        os.remove(path)
    if os.path.exists(kept):
        os.remove(kept)


def _guard_rewrites(writer: Any) -> None:
    """Keep the log whole while the writer empties its file and writes it anew, for a column that has come."""
    if "_rewrite_with_new_header" in vars(writer):
        return
    rewrite = writer._rewrite_with_new_header

    def guarded(fieldnames: list[str]) -> None:
        path, kept = writer.metrics_file_path, _kept(writer.metrics_file_path)
        shutil.copyfile(path, f"{kept}.part")
        os.replace(f"{kept}.part", kept)
        rewrite(fieldnames)
        os.remove(kept)

    writer._rewrite_with_new_header = guarded


def _content_at(written: dict[str, Any], content: bytes) -> bytes:
    """The file as it was: cut to its size, with the columns it had (a new metric rewrites the whole file)."""
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    if rows and list(rows[0]) != written["keys"]:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, fieldnames=written["keys"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        content = text.getvalue().encode()
    return content[: written["size"]]
