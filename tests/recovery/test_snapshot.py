"""What a rank publishes of itself is what its replacement gets."""

from __future__ import annotations

import pickle
import random
import threading
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_flashrl.recovery.snapshot import (
    LARGE_BYTES,
    TENSORS_LIMIT_BYTES,
    Freezer,
    Refusal,
    tensor_bytes,
    tensor_from_bytes,
)

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Thing(SimpleNamespace):
    """An object with attributes."""


def _frozen_and_thawed(before: Any, after: Any, extra: Any = None, **names: tuple[Any, Any]) -> Any:
    """Freeze ``before`` under the name "thing" and thaw into ``after``; ``names`` are known on both sides."""
    sender, receiver = Freezer(), Freezer()
    for name, (theirs, ours) in names.items():
        sender.name(theirs, name)
        receiver.name(ours, name)
    sender.watch(before, "thing")
    receiver.watch(after, "thing")
    return receiver.thaw(*sender.freeze(extra))


# ---------------------------------------------------------------------- tensors by value
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    content = bytes(range(1, 97)) if dtype != torch.bool else bytes([0, 1] * 48)
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(2, -1)
    again = tensor_from_bytes(tensor_bytes(tensor), dtype, tuple(tensor.shape), "cpu")
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert _bits(again) == content


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_tensors_of_any_shape_and_layout_come_back(
    dtype: torch.dtype, shape: list[int], order: random.Random, data: st.DataObject
) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape, dtype=np.int64))
    largest = 1 if dtype == torch.bool else 255
    content = bytes(data.draw(st.lists(st.integers(0, largest), min_size=count * size, max_size=count * size)))
    tensor = torch.empty(shape, dtype=dtype)
    if count:
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape)
    dims = list(range(len(shape)))
    order.shuffle(dims)
    tensor = tensor.permute(dims)  # not contiguous any more
    again = tensor_from_bytes(tensor_bytes(tensor), dtype, tuple(tensor.shape), "cpu")
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert again.is_contiguous()
    if count:
        assert _bits(again) == _bits(tensor)


def test_a_restored_tensor_can_be_written() -> None:
    again = tensor_from_bytes(tensor_bytes(torch.zeros(3)), torch.float32, (3,), "cpu")
    again += 1
    assert again.tolist() == [1, 1, 1]


def test_views_that_are_conjugated_or_negated_are_stored_as_what_they_say() -> None:
    values = torch.tensor([1 + 2j, 3 - 1j])
    for view in (values.conj(), values.conj().imag):
        assert torch.equal(tensor_from_bytes(tensor_bytes(view), view.dtype, (2,), "cpu"), view)


# ---------------------------------------------------------------------- attributes
def test_attributes_of_many_kinds_come_back() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(2, generator=generator)
    before = Thing(
        number=3,
        nothing=None,
        text="ä",
        half=0.5,
        infinite=float("inf"),
        items=[1, (2, 3), {"a": {4}}],
        ordered=OrderedDict([("b", 1), ("a", 2)]),
        recent=deque([1, 2], maxlen=3),
        array=np.arange(3),
        numpy_generator=np.random.default_rng(1),
        generator=generator,
        scalar=torch.tensor(1.5, dtype=torch.bfloat16),
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    after = Thing(number=0, recent=None, only_here="stays")
    _frozen_and_thawed(before, after)
    assert after.only_here == "stays"
    for name in ("number", "nothing", "text", "half", "infinite", "items", "ordered", "recent", "dtype", "device"):
        assert getattr(after, name) == getattr(before, name)
    assert list(after.ordered) == ["b", "a"]
    assert after.recent.maxlen == 3
    assert after.array.tolist() == [0, 1, 2]
    assert after.numpy_generator.random() == np.random.default_rng(1).random()
    assert torch.equal(torch.rand(3, generator=after.generator), torch.rand(3, generator=generator))
    assert torch.equal(after.scalar, before.scalar)
    assert after.scalar.dtype == torch.bfloat16


def test_what_is_one_object_stays_one_object() -> None:
    shared, tensor = [1], torch.zeros(2)
    before = Thing(first=shared, second=[shared], tensor=tensor, again={"same": tensor})
    other = Thing(third=shared)
    after, other_after = Thing(), Thing()
    sender, receiver = Freezer(), Freezer()
    for freezer, things in ((sender, (before, other)), (receiver, (after, other_after))):
        freezer.watch(things[0], "thing")
        freezer.watch(things[1], "other")
    receiver.thaw(*sender.freeze())
    assert after.first is after.second[0]
    assert after.first is other_after.third
    assert after.tensor is after.again["same"]


def test_a_known_object_is_replaced_by_the_receivers_own() -> None:
    theirs, ours = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2))
    before, after = Thing(held=[theirs], parent=None), Thing()
    before.parent = before
    extra = _frozen_and_thawed(before, after, extra={"key": theirs, "thing": before}, weight=(theirs, ours))
    assert after.held[0] is ours
    assert after.parent is after
    assert extra["key"] is ours
    assert extra["thing"] is after


def test_an_attribute_that_appears_later_is_kept_and_one_that_vanishes_is_not() -> None:
    before, after = Thing(a=1, b=2), Thing()
    sender, receiver = Freezer(), Freezer()
    sender.watch(before, "thing")
    receiver.watch(after, "thing")
    sender.freeze()
    before.c = 3
    del before.a
    receiver.thaw(*sender.freeze())
    assert vars(after) == {"b": 2, "c": 3}


def test_one_attribute_for_another_is_noticed() -> None:
    before, after = Thing(a=1), Thing()
    sender, receiver = Freezer(), Freezer()
    sender.watch(before, "thing")
    receiver.watch(after, "thing")
    sender.freeze()
    del before.a
    before.b = [2]
    receiver.thaw(*sender.freeze())
    assert vars(after) == {"b": [2]}


def test_a_value_frozen_is_the_value_of_that_moment() -> None:
    before, after = Thing(items=[1], tensor=torch.zeros(2)), Thing()
    sender, receiver = Freezer(), Freezer()
    sender.watch(before, "thing")
    receiver.watch(after, "thing")
    frozen = sender.freeze()
    before.items.append(2)
    before.tensor += 1
    receiver.thaw(*frozen)
    assert after.items == [1]
    assert after.tensor.tolist() == [0, 0]


def test_excluded_attributes_and_skipped_types_stay_the_receivers() -> None:
    class Loader:
        pass

    before, after = Thing(a=1, b=2, loader=Loader()), Thing(a=0, b=0, loader="mine")
    sender, receiver = Freezer(), Freezer()
    sender.skip_types(Loader)
    sender.watch(before, "thing", excluded={"b"})
    receiver.watch(after, "thing")
    receiver.thaw(*sender.freeze())
    assert vars(after) == {"a": 1, "b": 0, "loader": "mine"}


def test_what_cannot_be_pickled_is_left_out_and_reported_once() -> None:
    told: list[Refusal] = []
    freezer = Freezer(on_refused=told.append)
    before, after = Thing(lock=threading.Lock(), call=lambda: None, number=1), Thing(lock="mine")
    freezer.watch(before, "thing")
    freezer.freeze()
    before.more = 2
    frozen = freezer.freeze()
    assert sorted(refusal.attribute for refusal in told) == ["call", "lock"]
    assert told[0].owner is before
    assert "cannot be pickled" in told[0].reason
    receiver = Freezer()
    receiver.watch(after, "thing")
    receiver.thaw(*frozen)
    assert vars(after) == {"lock": "mine", "number": 1, "more": 2}


def test_an_attribute_that_can_no_longer_be_pickled_is_left_out_from_then_on() -> None:
    told: list[str] = []
    freezer, receiver = Freezer(on_refused=lambda refusal: told.append(refusal.attribute)), Freezer()
    before, after = Thing(value=[1], number=1), Thing()
    freezer.watch(before, "thing")
    freezer.freeze()
    before.value = threading.Lock()
    receiver.watch(after, "thing")
    receiver.thaw(*freezer.freeze())
    assert vars(after) == {"number": 1}
    assert told == ["value"]


def test_an_attribute_over_the_limit_is_left_out_and_reported() -> None:
    told: list[str] = []
    freezer = Freezer(attribute_limit_bytes=100, on_refused=lambda refusal: told.append(refusal.reason))
    before, after = Thing(large=list(range(1000)), small=1), Thing()
    freezer.watch(before, "thing")
    receiver = Freezer()
    receiver.watch(after, "thing")
    receiver.thaw(*freezer.freeze())
    assert vars(after) == {"small": 1}
    assert len(told) == 1
    assert "more than 100" in told[0]


def test_an_object_unknown_to_the_receiver_is_passed_over() -> None:
    sender, receiver, after = Freezer(), Freezer(), Thing()
    sender.watch(Thing(a=1), "gone")
    sender.watch(Thing(a=2), "thing")
    receiver.watch(after, "thing")
    receiver.thaw(*sender.freeze())
    assert vars(after) == {"a": 2}


def test_things_of_a_known_type_that_have_no_name_travel_whole() -> None:
    named, unnamed = Thing(a=1), Thing(a=2)
    before, after = Thing(items=[unnamed, named]), Thing()
    ours = Thing()
    _frozen_and_thawed(before, after, named=(named, ours))
    assert after.items[0] == unnamed
    assert after.items[0] is not unnamed
    assert after.items[1] is ours


def test_a_thaw_may_happen_inside_a_thaw() -> None:
    inner_sender, inner_receiver = Freezer(), Freezer()
    inner_sender.watch(Thing(value=1), "inner")
    inner_after = Thing()
    inner_receiver.watch(inner_after, "inner")
    frozen = inner_sender.freeze()
    sender, receiver, after = Freezer(), Freezer(), Thing()
    sender.watch(Thing(value=_Nested()), "outer")
    receiver.watch(after, "outer")
    _Nested.thaw = lambda: inner_receiver.thaw(*frozen)
    receiver.thaw(*sender.freeze())
    assert inner_after.value == 1
    assert isinstance(after.value, _Nested)


class _Nested:
    thaw: Any = None

    def __reduce__(self) -> Any:
        return _make_nested, ()


def _make_nested() -> _Nested:
    _Nested.thaw()
    return _Nested()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 warns although it is told
def test_sparse_tensors_come_back_as_they_are() -> None:
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.rand(3, 2), (4, 2), check_invariants=True)
    sender, receiver, after = Freezer(), Freezer(), Thing()
    sender.watch(Thing(twice=twice, once=twice.coalesce()), "thing")
    receiver.watch(after, "thing")
    receiver.thaw(*sender.freeze())
    assert torch.equal(after.twice._indices(), twice._indices())
    assert torch.equal(after.twice._values(), twice._values())
    assert not after.twice.is_coalesced()
    assert after.once.is_coalesced()


# ---------------------------------------------------------------------- large tensors
def test_large_tensors_and_arrays_stay_outside_the_pickle_and_are_not_copied() -> None:
    tensor, array = torch.zeros(LARGE_BYTES // 4), np.zeros(LARGE_BYTES)
    sender, receiver, after = Freezer(), Freezer(), Thing()
    sender.watch(Thing(tensor=tensor, array=array, again=[tensor], small=torch.ones(3)), "thing")
    receiver.watch(after, "thing")
    frozen = sender.freeze()
    assert len(frozen.content) < 2000
    assert [buffer.nbytes for buffer in frozen.buffers] == [LARGE_BYTES, 8 * LARGE_BYTES]
    assert frozen.num_bytes == len(frozen.content) + 9 * LARGE_BYTES
    tensor[1] = 5  # seen through the buffer: it is the tensor's own memory
    buffers = [bytearray(buffer) for buffer in frozen.buffers]
    receiver.thaw(frozen.schema, frozen.content, iter(buffers))
    assert after.tensor[:2].tolist() == [0, 5]
    assert after.again[0] is after.tensor
    assert after.array.shape == (LARGE_BYTES,)
    assert after.small.tolist() == [1, 1, 1]
    buffers[0][0:4] = np.float32(7).tobytes()
    assert after.tensor[0] == 7  # nor is it copied on the way in
    after.array += 1  # and it can be written


def test_tensors_in_an_attribute_have_a_limit_of_their_own() -> None:
    told: list[Refusal] = []
    freezer = Freezer(attribute_limit_bytes=1000, on_refused=told.append)
    freezer.watch(
        Thing(
            fits=torch.empty(TENSORS_LIMIT_BYTES, dtype=torch.uint8),
            many=[torch.zeros(10) for _ in range(2)],
            large=torch.empty(TENSORS_LIMIT_BYTES + 1, dtype=torch.uint8),
        ),
        "thing",
    )
    freezer.freeze()
    assert [(refusal.attribute, refusal.is_too_large) for refusal in told] == [("large", True)]


# ---------------------------------------------------------------------- refused attributes
def _kept(freezer: Freezer) -> set[str]:
    frozen = freezer.freeze()
    return {key for _, keys in pickle.loads(frozen.schema) for key in keys}


@pytest.mark.parametrize("refused", [threading.Lock(), "x" * 5000], ids=["lock", "too large"])
@pytest.mark.parametrize("other", [None, [1]], ids=str)
def test_a_refused_attribute_is_kept_once_it_is_another_object(refused: Any, other: Any) -> None:
    told: list[Refusal] = []
    freezer, thing = Freezer(attribute_limit_bytes=1000, on_refused=told.append), Thing(a=[refused], b=1)
    freezer.watch(thing, "thing")
    assert _kept(freezer) == {"b"}
    assert _kept(freezer) == {"b"}
    thing.a = other
    assert _kept(freezer) == {"a", "b"}
    thing.a = [refused]
    if isinstance(refused, str):
        del thing.b  # sizes are looked at when the schema is made
    assert "a" not in _kept(freezer)
    assert [refusal.attribute for refusal in told] == ["a"]  # told once


def test_an_attribute_that_is_always_another_object_is_looked_at_less_and_less() -> None:
    looks: list[int] = []

    class Iterator:
        def __init__(self, number: int) -> None:
            self.number = number

        def __reduce__(self) -> Any:
            looks.append(self.number)
            raise TypeError("an iterator")

    objects = [Iterator(number) for number in range(40)]  # all alive: no two have one address
    freezer, thing = Freezer(), Thing(iterator=None)
    freezer.watch(thing, "thing")
    for thing.iterator in objects:
        freezer.freeze()
    assert looks == [0, 1, 2, 4, 8, 16, 32]


def test_a_refused_attribute_that_vanishes_is_forgotten() -> None:
    told: list[Refusal] = []
    freezer, thing = Freezer(on_refused=told.append), Thing(lock=threading.Lock(), number=1)
    freezer.watch(thing, "thing")
    freezer.freeze()
    del thing.lock
    assert _kept(freezer) == {"number"}
    assert not freezer._needs_schema()
    thing.lock = [1]
    assert _kept(freezer) == {"lock", "number"}


@pytest.mark.parametrize(
    ("value", "has_state"),
    [
        (lambda: None, False),
        (threading.Lock(), False),
        (pickle, False),
        ((x for x in "ab"), True),
        ([len, pickle], True),
    ],
    ids=["function", "lock", "module", "generator", "list"],
)
def test_what_has_no_state_of_its_own_is_told_apart(value: Any, has_state: bool) -> None:
    told: list[Refusal] = []
    freezer = Freezer(on_refused=told.append)
    freezer.watch(Thing(value=value), "thing")
    freezer.freeze()
    assert [(refusal.has_state, refusal.is_too_large) for refusal in told] == [(has_state, False)]
