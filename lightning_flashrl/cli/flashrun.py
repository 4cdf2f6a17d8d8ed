"""``flashrun``: start a job as ``torchrun`` does, and keep it alive.

Take a command line of ``torchrun`` and write ``flashrun`` instead. What differs:

- A rank of a program that trains with a flash strategy is replaced when its process dies; the others go on. Then
  ``--max-restarts`` is the number of faults allowed per ``--restart-window`` (100 per hour unless given). For any other
  program it means what it means for torchrun, where all ranks start again, and is 0 unless given.
- All ranks print to the terminal. With ``--log-dir`` the output of every process that ever was a rank is kept as
  ``DIR/rank{R}/incarnation{K}.log`` (stdout and stderr in order) and also shown, each line with its rank;
  ``--redirects 3`` (or ``0:3,1:0`` by local rank) keeps it off the terminal, ``--tee`` puts it there again. Streams are
  not told apart: 1, 2 and 3 mean the same. ``DIR/recovery.jsonl`` gets one line per recovery. A directory holds the
  logs of one job; those of an earlier one are replaced.
- ``flashrun`` itself is two processes: one that does next to nothing, and one that looks after the ranks. The latter
  may die: the former starts another one, and the ranks go on.
- The number of nodes is fixed: ``--nnodes 2``, not ``1:2``. Several nodes share a secret in ``FLASHRL_JOB_SECRET``.

Exit status: 0 when all ranks left with 0, 130 after Ctrl-C, 143 after SIGTERM, the status of the rank that failed
otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from lightning_flashrl.cli.values import (
    check_log_dir,
    check_numbers,
    check_program,
    read_join_timeout,
    read_ranks,
)
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.messaging.loop import EventLoop
from lightning_flashrl.messaging.security import JobKeys
from lightning_flashrl.recovery.detector import DetectorSettings
from lightning_flashrl.recovery.faults import Fault
from lightning_flashrl.recovery.slot import RankSlot
from lightning_flashrl.supervisor.chronicle import Chronicle
from lightning_flashrl.supervisor.controller import JobSettings
from lightning_flashrl.supervisor.environment import RankEnvironment, slot_region_bytes
from lightning_flashrl.supervisor.pool import StandbyPool
from lightning_flashrl.supervisor.preload import core_modules, scan_program
from lightning_flashrl.supervisor.process import die_with_parent
from lightning_flashrl.supervisor.root import Root
from lightning_flashrl.supervisor.root_link import RootLink
from lightning_flashrl.supervisor.seat import AgentSettings
from lightning_flashrl.supervisor.supervise import Supervision

SECRET_VARIABLE = "FLASHRL_JOB_SECRET"
CHAOS_VARIABLE = "FLASHRL_CHAOS"
_DEFAULT_PORT = 29500


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; options may be written with ``-`` or ``_``."""
    parser = argparse.ArgumentParser(
        prog="flashrun",
        description="Start a job as torchrun does, and keep it alive.",
        allow_abbrev=False,  # argparse would look for abbreviations of our options among those of the program
    )

    def add(*names: str, **keywords: object) -> None:
        both = [
            n
            for name in names
            for n in dict.fromkeys((name, "--" + name[2:].replace("-", "_") if name[:2] == "--" else name))
        ]
        parser.add_argument(*both, **keywords)  # type: ignore[arg-type]

    add("--nproc-per-node", default="1", metavar="N", help="ranks of this node: a number, cpu, gpu, npu or auto")
    add("--nnodes", default="1", metavar="N", help="nodes of the job")
    add("--node-rank", type=int, default=None, metavar="I", help="number of this node")
    add("--master-addr", default=None, metavar="HOST", help="host of node 0")
    add("--master-port", type=int, default=None, metavar="PORT", help="port of the controller on node 0")
    add("--rdzv-endpoint", default="", metavar="HOST:PORT", help="same as --master-addr and --master-port")
    add("--rdzv-backend", default="static", help="accepted; there is one kind of rendezvous")
    add("--rdzv-id", default="none", metavar="ID", help="name of the job, TORCHELASTIC_RUN_ID of the ranks")
    add("--rdzv-conf", default="", metavar="K=V,…", help="join_timeout=SECONDS; other keys are accepted")
    add("--standalone", action="store_true", help="one node, whatever the other flags say")
    add("--max-restarts", type=int, default=None, metavar="N", help="faults allowed per --restart-window")
    add("--restart-window", type=float, default=None, metavar="S", help="seconds, 3600 unless given")
    add("--monitor-interval", type=float, default=0.1, help="accepted; the end of a process is seen at once")
    add("--start-method", default="spawn", help="accepted")
    add("--role", default="default", help="ROLE_NAME of the ranks")
    add("--local-addr", default=None, help="accepted")
    add("--log-dir", default=None, metavar="DIR", help="keep the output of all ranks and recovery.jsonl")
    add("-r", "--redirects", default="0", help="keep output off the terminal, as for torchrun")
    add("-t", "--tee", default="0", help="keep output and show it, as for torchrun")
    add("--local-ranks-filter", default="", help="show only these local ranks on the terminal; needs --log-dir")
    add("-m", "--module", action="store_true", help="the program is a module, as for python -m")
    add("--no-python", action="store_true", help="the program is any command")
    add("--run-path", action="store_true", help="accepted")
    for name in ("--event-log-handler", "--logs-specs", "--signals-to-handle", "--shutdown-timeout"):
        add(name, default=None, help="accepted")
    for name in ("--duplicate-stdout-filters", "--duplicate-stderr-filters"):
        add(name, default=None, help="accepted; nothing is duplicated")
    add("--standby", type=int, default=1, metavar="N", help="processes that wait to replace a rank; 0 starts them cold")
    add(
        "--hang-timeout", type=float, default=None, metavar="S", help="take a rank without progress for hung after this"
    )
    add("--chaos", action="append", default=[], metavar="SPEC", help='inject a fault: "kill rank=1 step=33"')
    parser.add_argument("program", help="script, module (-m) or command (--no-python)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the program")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; torchrun's ``PET_*`` variables give defaults, as there."""
    parser = build_parser()
    for action in parser._actions:
        value = os.environ.get(f"PET_{action.dest.upper()}")
        if value is not None and action.option_strings and action.nargs != 0:
            try:
                action.default = value if action.type is None else action.type(value)  # type: ignore[operator]
            except ValueError as error:
                raise ConfigurationError(
                    f"PET_{action.dest.upper()}={value!r} is no number; set or unset it"
                ) from error
    return parser.parse_args(argv)


# --------------------------------------------------------------------------- the meaning of flags
def count_ranks(text: str) -> int:
    """Read ``--nproc-per-node``.

    Raises:
        ConfigurationError: it is neither a positive number nor one of the words.
    """
    num_devices = {"gpu": "/dev/nvidia[0-9]*", "npu": "/dev/davinci[0-9]*"}
    if text in num_devices or text == "auto":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES" if text != "npu" else "ASCEND_RT_VISIBLE_DEVICES")
        kinds = [text] if text != "auto" else ["gpu", "npu"]
        for kind in kinds:
            num_present = len(glob.glob(num_devices[kind]))
            num_wanted = num_present if visible is None else min(num_present, len([p for p in visible.split(",") if p]))
            if num_wanted:
                return num_wanted
        if text != "auto":
            raise ConfigurationError(f"--nproc-per-node {text}: no such device is visible; give a number, or cpu")
        return os.cpu_count() or 1
    if text == "cpu":
        return os.cpu_count() or 1
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigurationError(f"--nproc-per-node {text!r} is neither a positive number nor cpu, gpu, npu or auto")


def count_nodes(text: str) -> int:
    """Read ``--nnodes``: ``2``, or ``2:2``.

    Raises:
        ConfigurationError: it is a range or no number.
    """
    least, _, most = text.partition(":")
    if least.isdecimal() and (most or least) == least and int(least) > 0:
        return int(least)
    raise ConfigurationError(
        f"--nnodes {text!r}: the number of nodes is fixed here; give one number, such as --nnodes 2"
    )


def parse_streams(text: str, num_ranks: int) -> list[bool]:
    """Read ``--redirects`` or ``--tee`` into one answer per local rank.

    >>> parse_streams("3", 2), parse_streams("1:3", 2)
    ([True, True], [False, True])

    Raises:
        ConfigurationError: it is not of the form ``3`` or ``0:3,1:0``.
    """
    parts = [part.split(":") for part in text.split(",")]
    if not all(len(part) in (1, 2) and all(p.isdecimal() for p in part) and int(part[-1]) <= 3 for part in parts):
        raise ConfigurationError(f"{text!r} is not a stream selection; write 0, 1, 2 or 3, or 0:3,1:0 by local rank")
    answers = [False] * num_ranks
    for part in parts:
        for local_rank in range(num_ranks) if len(part) == 1 else [int(part[0])]:
            if local_rank < num_ranks:
                answers[local_rank] = part[-1] != "0"
    return answers


def chaos_lines(flags: Sequence[str]) -> tuple[str, ...]:
    """Faults of ``FLASHRL_CHAOS`` (a JSON list; for programs that start their own ranks), then those of the flags.

    Raises:
        ConfigurationError: the variable holds something else, or a line cannot be read.
    """
    text = os.environ.get(CHAOS_VARIABLE, "[]")
    try:
        lines = msgspec.json.decode(text, type=list[str])
    except msgspec.MsgspecError as error:
        raise ConfigurationError(
            f"{CHAOS_VARIABLE}={text!r} is not a JSON list of faults; write '[\"kill rank=1 step=33\"]'"
        ) from error
    for line in (*lines, *flags):
        Fault.parse(line)
    return (*lines, *flags)


@dataclass(frozen=True, slots=True)
class Place:
    """Where this node stands in the job.

    Attributes:
        num_nodes: nodes of the job.
        node_rank: number of this one; -1 lets the controller choose.
        is_host: whether the controller runs here.
        host: where the controller is.
        port: its port.
    """

    num_nodes: int
    node_rank: int
    is_host: bool
    host: str
    port: int


def find_place(arguments: argparse.Namespace) -> Place:
    """Combine torchrun's ways to say where node 0 is.

    Raises:
        ConfigurationError: the flags contradict each other.
    """
    num_nodes = 1 if arguments.standalone else count_nodes(str(arguments.nnodes))
    host, _, port_text = (
        arguments.rdzv_endpoint.rpartition(":") if ":" in arguments.rdzv_endpoint else (arguments.rdzv_endpoint, "", "")
    )
    host = host.strip("[]") or arguments.master_addr or "127.0.0.1"
    port = int(port_text) if port_text.isdecimal() else arguments.master_port or _DEFAULT_PORT
    if num_nodes == 1:
        return Place(1, 0, True, host, port)
    node_rank = arguments.node_rank
    if node_rank is None and arguments.rdzv_backend == "static":
        raise ConfigurationError(
            "--nnodes above 1 needs --node-rank, or --rdzv-backend c10d to number nodes as they come"
        )
    if node_rank is not None and not 0 <= node_rank < num_nodes:
        raise ConfigurationError(f"--node-rank {node_rank} is not below --nnodes {num_nodes}")
    is_host = node_rank == 0 if node_rank is not None else _can_listen(host, port)
    return Place(num_nodes, 0 if is_host else (-1 if node_rank is None else node_rank), is_host, host, port)


def _can_listen(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address means this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("10.0.0.1")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def job_keys(place: Place, run_id: str) -> JobKeys | None:
    """Derive the job's keys; a job on one node opens no port and needs none.

    Raises:
        ConfigurationError: the job has several nodes and no secret.
    """
    if place.num_nodes == 1:
        return None
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        if not is_loopback(place.host):
            raise ConfigurationError(
                f"{SECRET_VARIABLE} is not set; a job on several nodes needs a secret that only its nodes know: run "
                f"`python -c 'import secrets; print(secrets.token_hex(32))'` once and export the result on every node"
            )
        secret = f"loopback of user {os.getuid()}, job {run_id}, port {place.port}"
    return JobKeys.derive(secret)


# --------------------------------------------------------------------------- running
def tell(text: str) -> None:
    """Show an event on stderr."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write("".join(f"[flashrun] {line}\n" for line in text.splitlines()))
        sys.stderr.flush()


def show(text: str) -> None:
    """Show output of ranks on stdout."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text)
        sys.stdout.flush()


def _agent_settings(arguments: argparse.Namespace, place: Place, num_ranks: int, log_dir: str | None) -> AgentSettings:
    redirected = parse_streams(arguments.redirects, num_ranks)
    teed = parse_streams(arguments.tee, num_ranks)
    shown = {r for r in range(num_ranks) if teed[r] or not redirected[r]}
    if arguments.local_ranks_filter:
        shown &= read_ranks(arguments.local_ranks_filter)
    hang_timeout_s = arguments.hang_timeout
    return AgentSettings(
        argv=(arguments.program, *arguments.arguments),
        is_module=arguments.module,
        is_python=not arguments.no_python,
        num_ranks=num_ranks,
        node_rank=place.node_rank,
        log_dir=log_dir,
        show_ranks=frozenset(shown),
        detector=DetectorSettings() if hang_timeout_s is None else DetectorSettings.exactly(hang_timeout_s),
        is_detector_fixed=hang_timeout_s is not None,
        join_timeout_s=read_join_timeout(arguments.rdzv_conf),
        token=secrets.token_hex(8),
    )


def _path_entry(program: str, *, is_module: bool) -> str:
    return os.getcwd() if is_module else os.path.dirname(os.path.realpath(program))


def run(arguments: argparse.Namespace) -> int:
    """Run a job and return the exit status.

    Raises:
        ConfigurationError: flags that cannot work.
    """
    check_numbers(arguments)
    check_program(arguments)
    place = find_place(arguments)
    num_ranks = count_ranks(str(arguments.nproc_per_node))
    run_id = arguments.rdzv_id
    keys = job_keys(place, run_id)
    wants_log = arguments.redirects != "0" or arguments.tee != "0"
    log_dir = arguments.log_dir or (os.path.join("flashrun_logs", run_id) if wants_log else None)
    log_dir = None if log_dir is None else os.path.abspath(log_dir)
    check_log_dir(log_dir)
    settings = _agent_settings(arguments, place, num_ranks, log_dir)
    program = scan_program(arguments.program, is_module=arguments.module)
    region_bytes, chaos = slot_region_bytes(), chaos_lines(arguments.chaos)
    slots = [RankSlot(RankSlot.create(local_rank, region_bytes), region_bytes) for local_rank in range(num_ranks)]
    environment = RankEnvironment(
        base=os.environ,
        num_local_ranks=num_ranks,
        num_nodes=place.num_nodes,
        max_restarts=arguments.max_restarts or 0,
        slot_fds=[slot.fd for slot in slots],
        region_bytes=region_bytes,
        log_dir=log_dir,
        chaos=chaos,
        role=arguments.role,
    )
    job = JobSettings(
        num_nodes=place.num_nodes,
        max_restarts=arguments.max_restarts,
        restart_window_s=arguments.restart_window,
        uses_flash=program.uses_flash,
        master_addr=place.host,
        run_id=run_id,
        hash_seed=str(int.from_bytes(hashlib.sha256(secrets.token_bytes(16)).digest()[:4], "little")),
    )
    path_entry = _path_entry(arguments.program, is_module=arguments.module)

    def make_pool(loop: EventLoop, link: RootLink, tell: Callable[[str], None]) -> StandbyPool:
        return StandbyPool(loop, link, arguments.standby, program.modules, core_modules(program), path_entry, tell)

    address = f"[{place.host}]" if ":" in place.host else place.host
    supervision = Supervision(
        settings=settings,
        environment=environment,
        slots=slots,
        make_pool=make_pool,
        tell=tell,
        show=show,
        job=job if place.is_host else None,
        chronicle=Chronicle(),
        endpoint=f"tcp://{address}:{place.port}" if place.num_nodes > 1 else None,
        keys=keys,
        log_dir=log_dir,
    )
    return Root(supervision.run, settings.detector, tell).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    launcher_pid = os.environ.pop("FLASHRL_LAUNCHER_PID", None)
    if launcher_pid is not None and launcher_pid == str(os.getppid()):
        die_with_parent(int(launcher_pid))  # `python train.py` was killed: its ranks go with it
    try:
        return run(parse_arguments(argv))
    except ConfigurationError as error:
        tell(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
