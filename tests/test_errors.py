"""Errors travel between processes and say their values."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_flashrl import errors
from lightning_flashrl.errors import (
    ConfigurationError,
    DuplicateRowError,
    EndOfStream,
    FatalError,
    FlashRLError,
    JournalError,
    LeaseLostError,
    LeaseTimeoutError,
    NoDonorError,
    QueueClosedError,
    QueueFullError,
    QueueUnavailableError,
    RankLostError,
    RecoveryBudgetExhaustedError,
    RendezvousTimeoutError,
    ReplayMismatchError,
    RewardError,
    SampleError,
    SchemaMismatchError,
    SnapshotTooLargeError,
    StalenessExceededError,
    TransientError,
    UnknownFieldError,
    UnknownRowError,
    UnknownTaskError,
    UserCodeError,
    WeightMismatchError,
    WorkerFailedError,
    WouldBlock,
)

EXAMPLES: list[tuple[FlashRLError, list[str]]] = [
    (FlashRLError("what happened"), ["what happened"]),
    (ConfigurationError("devices=0; set devices to 1 or more"), ["devices=0; set devices to 1 or more"]),
    (TransientError("try again"), ["try again"]),
    (RankLostError(3, "SIGKILL"), ["rank 3", "SIGKILL"]),
    (RendezvousTimeoutError(3, 4, 30.5, "tcp://10.0.0.1:29500"), ["3 of 4", "30.5 s", "tcp://10.0.0.1:29500"]),
    (FatalError("stop"), ["stop"]),
    (NoDonorError((1, 2)), ["1, 2", "fallback='last'"]),
    (NoDonorError((5,), "runs/step=70.ckpt"), ["rank(s) 5", "runs/step=70.ckpt"]),
    (RecoveryBudgetExhaustedError(11, 10, 600.0), ["11 faults", "600 s", "10", "none was saved"]),
    (RecoveryBudgetExhaustedError(11, 10, 600.0, "runs/last.ckpt"), ["11 faults", "600 s", "10", "runs/last.ckpt"]),
    (JournalError("runs/queue.journal", "cannot be opened"), ["runs/queue.journal", "cannot be opened"]),
    (ReplayMismatchError(41, "all_reduce(8)", "broadcast(4)"), ["41", "all_reduce(8)", "broadcast(4)"]),
    (SnapshotTooLargeError(2048, 1024), ["2048", "1024"]),
    (UserCodeError(1, "ZeroDivisionError: division by zero"), ["rank 1", "ZeroDivisionError: division by zero"]),
    (WeightMismatchError(4, 0.25, 0.001), ["version 4", "0.25", "tolerance 0.001"]),
    (WorkerFailedError("rollout worker 0", "raised:\nValueError: no"), ["rollout worker 0", "ValueError: no"]),
    (StalenessExceededError(7, 1, 3, 2), ["3 row(s)", "max_staleness=1", "version 7", "room for 2"]),
    (UnknownFieldError("promt", ("prompt", "reward")), ["'promt'", "prompt, reward"]),
    (UnknownTaskError("update", ("rollout",)), ["'update'", "rollout"]),
    (QueueUnavailableError("tcp://10.0.0.1:7000", 10.0, "put"), ["tcp://10.0.0.1:7000", "10 s", "put"]),
    (LeaseLostError(255, "update", "ran out after 5 s"), ["ff", "'update'", "ran out after 5 s"]),
    (WouldBlock("nothing is ready"), ["nothing is ready"]),
    (LeaseTimeoutError("update", 2.5, 7, "32 row(s)"), ["'update'", "2.5 s", "7 row(s)", "32 row(s)"]),
    (QueueFullError(0.0, 8, 8, 100, 0), ["0 s", "8 of 8 rows", "100 of any number of bytes"]),
    (SampleError("drop it"), ["drop it"]),
    (SchemaMismatchError("reward", "1 of 2 values are NaN", "look"), ["'reward'", "1 of 2 values are NaN", "look"]),
    (DuplicateRowError((3, 4), "stand twice in one call"), ["3, 4", "stand twice"]),
    (UnknownRowError(tuple(range(20))), ["0, 1, 2", "and 12 more"]),
    (RewardError("timeout", {"answer": "3"}, "took longer than 5 s"), ["'3'", "(timeout)", "5 s", "reward.timeout_s"]),
    (EndOfStream("update"), ["'update'"]),
    (QueueClosedError(), ["closed for new rows"]),
]


def _subclasses(parent: type[FlashRLError]) -> Iterator[type[FlashRLError]]:
    yield parent
    for child in parent.__subclasses__():
        yield from _subclasses(child)


def test_every_class_has_an_example() -> None:
    defined = {cls for cls in _subclasses(FlashRLError) if cls.__module__ == errors.__name__}
    assert {type(error) for error, _ in EXAMPLES} == defined


def test_the_drawn_tree_names_every_class() -> None:
    assert errors.__doc__ is not None
    for cls in _subclasses(FlashRLError):
        if cls.__module__ == errors.__name__:
            assert cls.__name__ in errors.__doc__


@pytest.mark.parametrize(("error", "values"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_text_contains_the_values(error: FlashRLError, values: list[str]) -> None:
    for value in values:
        assert value in str(error)


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_type_text_and_attributes(error: FlashRLError, protocol: int) -> None:
    copy: Any = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("error", "standard"),
    [
        (ConfigurationError("x"), ValueError),
        (RendezvousTimeoutError(1, 2, 3.0, "x"), TimeoutError),
        (LeaseTimeoutError("t", 1.0, 0, "1 row(s)"), TimeoutError),
        (QueueFullError(0.0, 1, 1, 1, 1), TimeoutError),
        (QueueUnavailableError("x", 1.0, "put"), ConnectionError),
        (SchemaMismatchError("x", "y", "z"), ValueError),
        (UnknownRowError((1,)), LookupError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_standard_handlers_catch_them(error: FlashRLError, standard: type[Exception]) -> None:
    assert isinstance(error, standard)


def test_fatal_errors_are_outside_the_retryable_branch() -> None:
    assert not any(issubclass(cls, TransientError) for cls in _subclasses(FatalError))
    assert not issubclass(ConfigurationError, TransientError)
