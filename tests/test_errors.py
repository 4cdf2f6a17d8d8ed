"""Errors travel between processes and say their values."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_flashrl import errors
from lightning_flashrl.errors import (
    ConfigurationError,
    FatalError,
    FlashRLError,
    NoDonorError,
    RankLostError,
    RecoveryBudgetExhaustedError,
    RendezvousTimeoutError,
    ReplayMismatchError,
    SnapshotTooLargeError,
    TransientError,
    UserCodeError,
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
    (ReplayMismatchError(41, "all_reduce(8)", "broadcast(4)"), ["41", "all_reduce(8)", "broadcast(4)"]),
    (SnapshotTooLargeError(2048, 1024), ["2048", "1024"]),
    (UserCodeError(1, "ZeroDivisionError: division by zero"), ["rank 1", "ZeroDivisionError: division by zero"]),
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
    ("error", "standard"), [(EXAMPLES[1][0], ValueError), (EXAMPLES[4][0], TimeoutError)], ids=["setting", "time-out"]
)
def test_standard_handlers_catch_them(error: FlashRLError, standard: type[Exception]) -> None:
    assert isinstance(error, standard)


def test_fatal_errors_are_outside_the_retryable_branch() -> None:
    assert not any(issubclass(cls, TransientError) for cls in _subclasses(FatalError))
    assert not issubclass(ConfigurationError, TransientError)
