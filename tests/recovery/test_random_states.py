"""Random states come back bit for bit, and what did not change is the same object."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import torch

from lightning_flashrl.recovery.random_states import capture_rng, restore_rng


def _draws() -> tuple[Any, ...]:
    return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())


def test_random_states_come_back_bit_for_bit() -> None:
    outer = capture_rng()
    random.gauss(0, 1)  # Python and NumPy keep the second of two normal numbers
    np.random.randn()
    states = capture_rng(torch.device("cpu"))
    first, second = _draws(), _draws()
    assert first != second
    restore_rng(states, torch.device("cpu"))
    assert (_draws(), _draws()) == (first, second)
    restore_rng(outer)


def test_captured_random_states_do_not_move_with_the_generators() -> None:
    outer = capture_rng()
    states = capture_rng()
    first = _draws()
    assert capture_rng() != states
    restore_rng(states)
    assert capture_rng() == states
    assert _draws() == first
    restore_rng(outer)


def test_what_did_not_change_is_kept_once() -> None:
    outer = capture_rng()
    np.random.rand()
    torch.rand(1)
    first, second = capture_rng(), capture_rng()
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert len(pickle.dumps([first, second])) < 1.1 * len(pickle.dumps(first))
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        before = capture_rng()
        draw()
        assert sum(one is not other for one, other in zip(before, capture_rng(), strict=True)) == 1
    restore_rng(outer)


def test_the_second_of_two_normal_numbers_is_seen_although_nothing_else_moves() -> None:
    outer = capture_rng()
    np.random.seed(1)
    np.random.randn()
    kept = capture_rng()
    np.random.randn()
    used = capture_rng()
    assert kept[1][:3] == used[1][:3]
    assert kept != used
    np.random.set_state((kept[1][0], np.frombuffer(kept[1][1], dtype=np.uint32), *kept[1][2:]))
    assert capture_rng() == kept
    restore_rng(outer)


def test_another_numpy_generator_is_captured_as_it_is() -> None:
    outer, generator = capture_rng(), np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.MT19937(5))
    try:
        first = capture_rng()
        np.random.rand()
        assert capture_rng() != first
        restore_rng(first)
        assert capture_rng() == first
    finally:
        np.random.set_bit_generator(generator)
    assert capture_rng() == outer
