"""What a run has written down of its steps, as lines of JSON that only grow in number."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HISTORY, KILLS = "history.jsonl", "kills.jsonl"


def read_history(output_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the steps and validations of a run; a last line that is cut off is left out.

    Raises:
        FileNotFoundError: there are none yet.
    """
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    for text in _whole(output_dir / HISTORY).splitlines():
        line = json.loads(text)
        (steps if line.pop("kind") == "step" else validations).append(line)
    return steps, validations


def mend_history(output_dir: Path, last_step: int | None = None) -> None:
    """Cut off a last line whose writer died before it was whole; more may follow then.

    Args:
        output_dir: of the run.
        last_step: also cut off what came after this step, of a run that goes on from there.
    """
    path = output_dir / HISTORY
    if not path.exists():
        return
    whole = _whole(path)
    if last_step is not None:
        lines = whole.splitlines(keepends=True)
        whole = b"".join(line for line in lines if json.loads(line)["step"] <= last_step)
        path.write_bytes(whole)
    os.truncate(path, len(whole))


def append_history(output_dir: Path, line: dict[str, Any]) -> None:
    """Write down a step or a validation, as its ``kind`` says."""
    with (output_dir / HISTORY).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_kills(output_dir: Path) -> list[dict[str, Any]]:
    """Return the kills of a run: ``step``, ``role``, ``rank`` and more of each; none where nobody was killed."""
    try:
        lines = (output_dir / KILLS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _whole(path: Path) -> bytes:
    before, newline, _ = path.read_bytes().rpartition(b"\n")
    return before + newline
