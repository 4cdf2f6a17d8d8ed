"""Which rows each rank trained in each step, written down, and trained again.

A run that is asynchronous is never the same twice: which rows are ready when decides what a step trains. A record keeps
that: for each step and rank its micro-batches in order, with all that was trained of their rows. From it a run is
trained again bit for bit, without rollouts, whatever ``max_staleness`` was, and whoever died meanwhile.

::

    DIR/record.json                   ranks of the run
    DIR/step-0000012/rank-1.pt        the micro-batches that rank 1 trained in the step that starts from version 12
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.files import replacing
from lightning_flashrl.streaming import Batch, Lease, Ragged

_NEVER_S = float("inf")


class StepRecord:
    """A folder with the micro-batches of each step.

    Args:
        folder: where it is.
        rank: whose micro-batches are written and read.
        world_size: ranks of the run.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder = folder
        self._rank = rank
        self._world_size = world_size

    # ------------------------------------------------------------------ writing
    def begin(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            with replacing(self.folder / "record.json") as beside:
                beside.write_text(json.dumps({"world_size": self._world_size}))

    def write(self, version: int, leases: Sequence[Lease]) -> None:
        """Write the micro-batches that this rank has trained in the step that starts from a version."""
        path = self._path(version)
        path.parent.mkdir(exist_ok=True)
        parts = [(lease.task, list(lease.rows), _plain(lease.batch)) for lease in leases]
        with replacing(path) as beside:
            torch.save(parts, beside)

    # ------------------------------------------------------------------ reading
    def check(self) -> None:
        """Compare the record with this run.

        Raises:
            ConfigurationError: there is no record, or it is one of another number of ranks.
        """
        try:
            world_size = json.loads((self.folder / "record.json").read_text())["world_size"]
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{self.folder} holds no record; give the folder that a run wrote with record=..."
            ) from error
        if world_size != self._world_size:
            raise ConfigurationError(
                f"the record in {self.folder} is of {world_size} rank(s) and this run has {self._world_size}; give "
                f"Trainer(devices={world_size})"
            )

    def has(self, version: int) -> bool:
        """Whether there is a step that starts from a version."""
        return self._path(version).exists()

    def read(self, version: int) -> Iterator[Lease]:
        """Iterate over the micro-batches that this rank has trained in the step that starts from a version."""
        for task, rows, columns in torch.load(self._path(version), weights_only=True):
            yield Lease(
                0,
                task,
                tuple(rows),
                Batch({name: _restored(column) for name, column in columns.items()}),
                _NEVER_S,
                _NEVER_S,
            )

    def _path(self, version: int) -> Path:
        return self.folder / f"step-{version:07d}" / f"rank-{self._rank}.pt"


def _plain(batch: Batch) -> dict[str, Any]:
    return {
        name: (column.values, column.lengths) if isinstance(column, Ragged) else column
        for name, column in batch.columns.items()
    }


def _restored(column: Any) -> Any:
    return Ragged(*column) if isinstance(column, tuple) else column
