"""What the user is told of attributes that a replacement will not have, and how live tensors are found again."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_flashrl.recovery.snapshot import Refusal
from lightning_flashrl.strategies.local_state import LocalState


class Users(Callback):
    """A callback of a user."""


def _state() -> Any:
    """A state without a trainer: only what the tests below use."""
    state: Any = LocalState.__new__(LocalState)
    state._unpicklable = []
    state._device = torch.device("cpu")
    return state


def _refusal(owner: Any, attribute: str, *, is_too_large: bool = False, has_state: bool = True) -> Refusal:
    return Refusal(owner, attribute, "cannot be pickled", is_too_large, has_state)


def test_one_warning_names_all_unpicklable_attributes_of_the_users_own_objects() -> None:
    state, owner = _state(), Users()
    for attribute in ("writer", "events"):
        state._report_refused(_refusal(owner, attribute))
    state._report_refused(_refusal(owner, "lock", has_state=False))
    state._report_refused(_refusal(lightning.pytorch.callbacks.Timer(), "thing"))
    state._report_refused(_refusal(torch.nn.Linear(1, 1), "thing"))
    with pytest.warns(UserWarning, match=r"cannot be pickled: Users.events, Users.writer; a replacement") as told:
        state._warn_of_unpicklable()
    assert len(told) == 1
    assert state._unpicklable == []


def test_a_large_attribute_is_named_at_once() -> None:
    with pytest.warns(UserWarning, match="attribute 'rows' of Users .* will not have it"):
        _state()._report_refused(_refusal(Users(), "rows", is_too_large=True))


def test_nothing_is_said_of_locks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = _state()
        state._report_refused(_refusal(SimpleNamespace(lock=threading.Lock()), "lock", has_state=False))
    assert state._unpicklable == []


@pytest.mark.parametrize("live", [None, torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(2)], ids=str)
def test_the_live_tensor_has_the_type_and_shape_that_were_kept(live: torch.Tensor | None) -> None:
    state, buffers = _state(), {"x": live}
    state._places = {"module.x": (buffers, "x")}
    found = state._live("module.x", torch.float32, (2,))
    assert (found.dtype, found.shape) == (torch.float32, (2,))
    assert buffers["x"] is found
    if live is not None and live.dtype == torch.float32 and live.shape == (2,):
        assert found is live


def test_a_frozen_parameter_of_another_shape_stays_the_same_parameter() -> None:
    state, parameter = _state(), torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    state._places = {"module.x": ({"x": parameter}, "x")}
    assert state._live("module.x", torch.float64, (2, 2)) is parameter
    assert (parameter.dtype, tuple(parameter.shape)) == (torch.float64, (2, 2))


def test_a_parameter_that_ddp_does_not_reduce_is_named_once() -> None:
    state, known, new = _state(), torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    state._reduced = frozenset({id(known)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state._check_reduced("module.head.bias", known)
    with pytest.warns(UserWarning, match=r"'body.0.weight' was frozen when DDP wrapped the model and is trained now"):
        state._check_reduced("module.body.0.weight", new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state._check_reduced("module.body.0.weight", new)


def test_parts_that_are_added_in_training_are_named_once() -> None:
    state = _state()
    state._module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    state._structure = state._names_of_parts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.check_structure()
    torch.nn.utils.parametrize.register_parametrization(state._module[0], "weight", torch.nn.Identity())
    with pytest.warns(
        UserWarning, match=r"0.parametrizations, .*: added to the model, or removed from it, in training"
    ):
        state.check_structure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.check_structure()
