"""A callback that lets processes of a run be killed, to see that nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L

from lightning_flashrl.asyncrl import killer
from lightning_flashrl.asyncrl.host_process import start_below_root
from lightning_flashrl.asyncrl.killer import ROLES, Strike
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.strategies.ddp import FlashDDPStrategy


class Chaos(L.Callback):
    """Kills processes of an :class:`~lightning_flashrl.AsyncRL` run, at random or on schedule.

    With SIGKILL, or with SIGSTOP: then they hang until somebody notices. Every kill is written to ``kills.jsonl`` in
    the run's folder, and drawn in its report. A trainer rank is spared until all ranks have gone on from the last loss:
    of two ranks, one must be left.

    Args:
        output_dir: of the run's :class:`~lightning_flashrl.asyncrl.recorder.RunRecorder`, which must be there.
        mtbf_s: mean time between kills; ``None`` for none at random.
        schedule: kills at set steps, such as ``"rollout 0 at step 12"``, ``"queue hangs at step 20"``.
        roles: whose processes are killed at random.
        seed: of the random numbers.
        max_kills: in all; ``None`` for no limit.
        hang_share: of those at random, how many are stopped instead of killed, 0 to 1.

    Raises:
        ConfigurationError: a time, role or schedule that cannot be.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        mtbf_s: float | None = None,
        schedule: Sequence[str] = (),
        roles: Sequence[str] = ROLES,
        seed: int = 0,
        max_kills: int | None = None,
        hang_share: float = 0.0,
    ) -> None:
        if mtbf_s is not None and not mtbf_s > 0:
            raise ConfigurationError(f"chaos.mtbf_s={mtbf_s}; use a time above 0 s, or null for none at random")
        if not 0 <= hang_share <= 1:
            raise ConfigurationError(f"chaos.hang_share={hang_share}; use a share from 0 to 1")
        if mtbf_s is None and not schedule:
            raise ConfigurationError("chaos kills nothing; give mtbf_s or a schedule")
        unknown = sorted(set(roles) - set(ROLES))
        if unknown or not roles:
            raise ConfigurationError(f"chaos.roles={list(roles)}; use some of {', '.join(ROLES)}")
        try:
            strikes = [Strike.parse(text) for text in schedule]
        except ValueError as error:
            raise ConfigurationError(f"chaos.schedule: {error}") from error
        self._roles = set(roles if mtbf_s is not None else ()) | {strike.role for strike in strikes}
        self._settings = {
            "folder": str(Path(output_dir).resolve()),
            "mtbf_s": mtbf_s,
            "schedule": list(schedule),
            "roles": list(roles),
            "seed": seed,
            "max_kills": max_kills,
            "hang_share": hang_share,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that would not survive.

        Raises:
            ConfigurationError: it would not.
        """
        survives = isinstance(trainer.strategy, FlashDDPStrategy) and trainer.world_size > 1
        missing = sorted(self._roles & {"queue", "standby", "supervisor"})
        if missing and not isinstance(trainer.strategy, FlashDDPStrategy):
            raise ConfigurationError(
                f"chaos kills {', '.join(missing)}, and this run has no such processes; use strategy=flash_ddp, or "
                f"leave them out of chaos.roles and chaos.schedule"
            )
        if "trainer" in self._roles and not survives:
            raise ConfigurationError(
                "chaos kills trainer ranks, and this run does not survive that; use strategy=flash_ddp with "
                "trainer.devices=2 or more, or leave 'trainer' out of chaos.roles"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to kill."""
        if not trainer.is_global_zero or os.environ.get("FLASHRL_INCARNATION", "0") != "0":
            return
        text = json.dumps(self._settings)
        if isinstance(trainer.strategy, FlashDDPStrategy):
            start_below_root(killer.__name__, [text])
        else:
            command = [sys.executable, "-m", killer.__name__, str(os.getpid()), text]
            self._process = subprocess.Popen(command, start_new_session=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Kill no more."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Kill no more."""
        self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
