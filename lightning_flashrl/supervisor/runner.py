"""Run the user's program in this process as ``python script`` or ``python -m module`` would, and report how it ended.

Used by both ways in which a rank starts: forked from a standby process, or cold with
``python -m lightning_flashrl.supervisor.runner``. An exception that reaches the top is told to the agent before it
ends the process; that is how a user's error is told from a machine's fault. The slot keeps it, for an agent that takes
over from one that died with the report.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence

from lightning_flashrl.errors import SnapshotTooLargeError
from lightning_flashrl.recovery.slot import RankSlot, Region, Word
from lightning_flashrl.supervisor import protocol
from lightning_flashrl.supervisor.channel import rank_channel
from lightning_flashrl.supervisor.process import die_with_parent, let_workers_die_with_rank, let_workers_leave_no_files

_OWN_FILES = (
    __file__,
    os.path.join(os.path.dirname(__file__), "standby.py"),
    "<frozen runpy>",
    "<frozen importlib._bootstrap>",
    "<frozen importlib._bootstrap_external>",
)

before_program: list[Callable[[], None]] = []
"""Called in a rank before its program runs, by modules that a standby process has imported ahead of need."""


def redirect_output(log_path: str | None) -> None:
    """Send stdout and stderr to the end of a file, and write whole lines at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    if log_path is not None:
        os.makedirs(os.path.dirname(log_path), exist_ok=True)
        fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, write_through=False)  # under `python -u`, too


@contextlib.contextmanager
def own_slot() -> Iterator[RankSlot]:
    """Map the slot of the rank that this process is, as its environment says."""
    pairs = (pair.split(":") for pair in os.environ["FLASHRL_SLOT_FDS"].split(","))
    fd = next(int(fd) for global_rank, fd in pairs if global_rank == os.environ["RANK"])
    slot = RankSlot(fd, int(os.environ["FLASHRL_SLOT_REGION_BYTES"]))
    try:
        yield slot
    finally:
        slot.close()


def write_name() -> None:
    """Say in the slot which process has the seat, for an agent that does not know it from its beginning."""
    with own_slot() as slot:
        slot[Word.PID] = os.getpid()


def run_program(argv: Sequence[str], *, is_module: bool) -> None:
    """Execute the program as ``__main__``, with its end reported."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv[:] = argv
    sys.excepthook = _show_without_own_frames

    def program() -> None:
        code = _load_module(main, argv[0]) if is_module else _load_script(main, argv[0])
        exec(code, main.__dict__)

    run_reported(program)


def run_reported(program: Callable[[], None]) -> None:
    """Call the rank's program. Whatever ends it leaves this function after it was reported."""
    let_workers_die_with_rank()
    let_workers_leave_no_files()
    try:
        for prepare in before_program:
            prepare()
        program()
    except SystemExit as error:
        _report_exit(error)
        raise
    except BaseException as error:
        report(protocol.Raised(_describe(error)))
        raise


def _load_script(main: types.ModuleType, path: str) -> types.CodeType:
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main.__file__ = path
    main.__dict__["__builtins__"] = __builtins__
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec", dont_inherit=True)


def _load_module(main: types.ModuleType, name: str) -> types.CodeType:
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_code"):
        raise ImportError(f"No module named {name!r} that can be run", name=name)
    code: types.CodeType | None = spec.loader.get_code(spec.name)
    if code is None:
        raise ImportError(f"module {name!r} has no code to run", name=name)
    main.__spec__ = spec
    main.__loader__ = spec.loader
    main.__file__ = spec.origin
    main.__package__ = spec.parent
    main.__dict__["__builtins__"] = __builtins__
    sys.argv[0] = spec.origin or name
    return code


# --------------------------------------------------------------------------- how it ended
def _own_frames_removed(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return trace


def _describe(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, _own_frames_removed(error.__traceback__)))


def _show_without_own_frames(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    shown = _own_frames_removed(trace)
    sys.__excepthook__(kind, error.with_traceback(shown), shown)


def _report_exit(error: SystemExit) -> None:
    if error.code is None or error.code == 0:
        return
    exit_code = error.code & 0xFF if isinstance(error.code, int) else 1
    report(protocol.Raised(f"SystemExit: {error.code}\n", exit_code))


def report(raised: protocol.Raised) -> None:
    """Tell the agent of an exception. On return the message has left this process."""
    channel = rank_channel()
    if channel is not None and channel.is_own:
        text = raised.traceback.encode(errors="backslashreplace").decode()  # a name of a file need not be UTF-8
        payload = protocol.encode(protocol.Raised(text, raised.exit_code))
        with own_slot() as slot, contextlib.suppress(SnapshotTooLargeError):
            slot.write(Region.RAISED, [payload])
        channel.send(payload)


def main() -> None:
    """Become a rank: ``runner (-m module | script) args…`` or, with ``FLASHRL_NO_PYTHON``, any command."""
    die_with_parent(int(os.environ["FLASHRL_ROOT_PID"]))
    write_name()
    redirect_output(os.environ.get("FLASHRL_LOG_PATH"))
    argv = sys.argv[1:]
    if os.environ.get("FLASHRL_NO_PYTHON") == "1":
        os.execvp(argv[0], argv)
    is_module = argv[0] == "-m"
    run_program(argv[1:] if is_module else argv, is_module=is_module)


if __name__ == "__main__":
    main()
