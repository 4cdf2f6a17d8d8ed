"""The environment of a rank: torchrun's variables, and ours."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.recovery.slot import Region
from lightning_flashrl.supervisor.protocol import Launch

_NOT_INHERITED = (
    "FLASHRL_LOG_DIR",
    "FLASHRL_CHAOS",
    "FLASHRL_RESUME_CKPT",
    "FLASHRL_CONTROL_FD",
    "FLASHRL_JOB_SECRET",
    "FLASHRL_NO_PYTHON",
    "FLASHRL_LOG_PATH",
)

_MOST_OF_MEMORY = 4
"""A region holds at most one part in so many of the machine's memory: a rank keeps so many buffers."""


def slot_region_bytes() -> int:
    """Return the capacity of each region of a rank's slot: what the user set, or what the machine could hold.

    Memory is used only for what is written. Only a limit on the size of files, which counts these as well, lowers it.
    """
    if "FLASHRL_SLOT_MB" in os.environ:
        text = os.environ["FLASHRL_SLOT_MB"]
        if not text.isdecimal() or int(text) == 0:
            raise ConfigurationError(f"FLASHRL_SLOT_MB={text!r}: give a number of megabytes, or unset it")
        return int(text) << 20
    capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MOST_OF_MEMORY
    largest_file, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest_file != resource.RLIM_INFINITY:
        capacity = min(capacity, largest_file // (len(Region) + 1))
    return max(capacity >> 20, 1) << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """What all ranks of a node have in common.

    Attributes:
        base: environment of ``flashrun``.
        num_local_ranks: ranks of the node.
        num_nodes: nodes of the job.
        max_restarts: for scripts that look at torchrun's variable.
        slot_fds: descriptor of each local rank's slot, by local rank.
        region_bytes: capacity of each region of a slot.
        log_dir: where logs are kept.
        role: of torchrun's ``--role``.
        chaos: fault specifications for the ranks to parse.
    """

    base: Mapping[str, str]
    num_local_ranks: int
    num_nodes: int
    max_restarts: int
    slot_fds: Sequence[int]
    region_bytes: int
    log_dir: str | None = None
    role: str = "default"
    chaos: Sequence[str] = ()

    def common(self, launch: Launch) -> dict[str, str]:
        """Variables that do not depend on the rank."""
        environ = dict(self.base)
        environ |= {
            "WORLD_SIZE": str(launch.world_size),
            "LOCAL_WORLD_SIZE": str(self.num_local_ranks),
            "GROUP_RANK": str(launch.node_rank),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "NODE_RANK": str(launch.node_rank),
            "ROLE_NAME": self.role,
            "ROLE_WORLD_SIZE": str(launch.world_size),
            "MASTER_ADDR": launch.master_addr,
            "MASTER_PORT": str(launch.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(launch.incarnation),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_RUN_ID": launch.run_id,
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "FLASHRL_SLOT_FDS": ",".join(f"{launch.first_rank + i}:{fd}" for i, fd in enumerate(self.slot_fds)),
            "FLASHRL_SLOT_REGION_BYTES": str(self.region_bytes),
        }
        environ.setdefault("PYTHONHASHSEED", launch.hash_seed)
        if self.num_local_ranks > 1:
            environ.setdefault("OMP_NUM_THREADS", "1")
        for name in _NOT_INHERITED:
            environ.pop(name, None)
        if self.log_dir is not None:
            environ["FLASHRL_LOG_DIR"] = self.log_dir
        if self.chaos:
            environ["FLASHRL_CHAOS"] = msgspec.json.encode(list(self.chaos)).decode()
        if launch.resume_checkpoint is not None:
            environ["FLASHRL_RESUME_CKPT"] = launch.resume_checkpoint
        return environ

    def of_rank(self, launch: Launch, local_rank: int, incarnation: int, *, is_newcomer: bool) -> dict[str, str]:
        """The complete environment of one rank."""
        global_rank = str(launch.first_rank + local_rank)
        return self.common(launch) | {
            "RANK": global_rank,
            "LOCAL_RANK": str(local_rank),
            "ROLE_RANK": global_rank,
            "FLASHRL_INCARNATION": str(incarnation),
            "FLASHRL_IS_NEWCOMER": str(int(is_newcomer)),
        }
