"""What the values of ``flashrun``'s flags must be, checked before anything is started."""

from __future__ import annotations

import argparse
import math
import os
import shutil

from lightning_flashrl.errors import ConfigurationError

_JOIN_TIMEOUT_S = 600.0


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        ConfigurationError: one of them is out of its range.
    """
    above_zero = {"--hang-timeout": arguments.hang_timeout, "--restart-window": arguments.restart_window}
    for flag, seconds in above_zero.items():
        if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
            raise ConfigurationError(f"{flag} {seconds:g}: give a number of seconds above 0")
    for flag, count in {"--standby": arguments.standby, "--max-restarts": arguments.max_restarts}.items():
        if count is not None and count < 0:
            raise ConfigurationError(f"{flag} {count}: give 0 or a positive number")
    if arguments.master_port is not None and not 0 <= arguments.master_port < 1 << 16:
        raise ConfigurationError(f"--master-port {arguments.master_port}: ports are numbers below {1 << 16}")


def check_program(arguments: argparse.Namespace) -> None:
    """Refuse a script or command that is not there; modules are looked for by Python.

    Raises:
        ConfigurationError: there is none of that name.
    """
    program = arguments.program
    if arguments.module:
        return
    if arguments.no_python:
        if shutil.which(program) is None:
            raise ConfigurationError(f"--no-python {program}: no such command; give its path, or a name on PATH")
    elif not os.path.exists(program):
        raise ConfigurationError(
            f"no such script: {program}; give its path, -m for a module, or --no-python for another command"
        )


def check_log_dir(log_dir: str | None) -> None:
    """Make the folder of the logs.

    Raises:
        ConfigurationError: that is not possible, or nothing can be written there.
    """
    if log_dir is None:
        return
    try:
        os.makedirs(log_dir, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--log-dir {log_dir} cannot be made ({error.strerror}); give another folder"
        ) from error
    if not os.access(log_dir, os.W_OK | os.X_OK):
        raise ConfigurationError(f"--log-dir {log_dir} cannot be written to; give another folder")


def read_join_timeout(rdzv_conf: str) -> float:
    """Read ``join_timeout`` of ``--rdzv-conf``, seconds.

    >>> read_join_timeout("read_timeout=3,join_timeout=20"), read_join_timeout("")
    (20.0, 600.0)

    Raises:
        ConfigurationError: it is no number.
    """
    conf = dict(pair.partition("=")[::2] for pair in rdzv_conf.split(",") if pair)
    text = conf.get("join_timeout", str(_JOIN_TIMEOUT_S))
    try:
        return float(text)
    except ValueError as error:
        raise ConfigurationError(f"--rdzv-conf join_timeout={text}: give a number of seconds") from error


def read_ranks(text: str) -> frozenset[int]:
    """Read ``--local-ranks-filter``.

    >>> sorted(read_ranks("0,2"))
    [0, 2]

    Raises:
        ConfigurationError: it is no list of numbers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigurationError(f"--local-ranks-filter {text!r}: give local ranks, such as 0 or 0,2")
    return frozenset(map(int, parts))
