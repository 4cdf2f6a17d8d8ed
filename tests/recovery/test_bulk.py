"""Large tensors are copied when they were written, lie where they are looked for, and come back bit for bit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_flashrl.recovery.bulk import BulkWriter, Contents, StoredBulk, TensorWatch, Written
from lightning_flashrl.recovery.slot import RankSlot, Region

LARGE = TensorWatch.SMALL_BYTES // 4 + 1
REGION_BYTES = 1 << 20


class Module:
    """A place for tensors, as the dicts of a module are."""

    def __init__(self, **tensors: torch.Tensor | None) -> None:
        self.tensors: dict[str, torch.Tensor | None] = dict(tensors)

    def watch(self, *uncounted: str) -> TensorWatch:
        return TensorWatch({name: (self.tensors, name) for name in self.tensors}, uncounted)

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]


def _changes(watch: TensorWatch) -> set[str]:
    """Names of tensors that are taken to be written from one look to the next."""
    before = {name: written.num_writes for name, written in watch.look().items()}
    return {name for name, written in watch.look().items() if written.num_writes != before.get(name)}


# ---------------------------------------------------------------------- what has been written
def test_a_tensor_is_taken_to_be_written_once_for_each_write() -> None:
    module = Module(
        written=torch.zeros(LARGE), never=torch.zeros(LARGE), statistics=torch.zeros(LARGE), small=torch.zeros(2)
    )
    watch = module.watch("statistics", "unknown")
    assert sorted(watch.look()) == ["small", "statistics"]
    module["written"][3] = 1
    look = watch.look()
    assert sorted(look) == ["small", "statistics", "written"]
    assert look["written"].tensor is module["written"]
    assert _changes(watch) == {"small", "statistics"}
    assert sorted(watch.look()) == ["small", "statistics", "written"]


def _set_data(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone()


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda tensor: tensor.add_(1),
    "one element": lambda tensor: tensor.reshape(-1)[5:6].fill_(1),
    "through a view": lambda tensor: tensor.view(2, -1)[1].fill_(1),
    "detached": lambda tensor: tensor.detach().mul_(0.5).add_(1),
    "through data": lambda tensor: tensor.data.add_(1),
    "other memory": _set_data,
    "NumPy": lambda tensor: tensor.detach().numpy().__iadd__(1),
    "to not a number": lambda tensor: tensor.data.fill_(float("nan")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("num_others", [0, 2])
def test_a_write_is_seen_however_it_is_made(write: Callable[[torch.Tensor], Any], num_others: int) -> None:
    module = Module(tensor=torch.nn.Parameter(torch.zeros(2 * LARGE)))
    module.tensors |= {f"other{i}": torch.zeros(LARGE) for i in range(num_others)}
    watch = module.watch()
    assert watch.look() == {}
    for _ in range(2):
        with torch.no_grad():
            write(module["tensor"])
        assert list(watch.look()) == ["tensor"]
    assert watch.look()["tensor"].num_writes >= 1
    assert _changes(watch) == set()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.int64, torch.bool]
)
def test_a_write_through_data_is_seen_in_every_type(dtype: torch.dtype) -> None:
    module = Module(
        tensor=torch.zeros(64, 2048, dtype=dtype), last=torch.zeros(64, 8, 32, 8).to(memory_format=torch.channels_last)
    )
    watch = module.watch()
    assert watch.look() == {}
    module["tensor"].data.fill_(1)
    module["last"].data.fill_(1)
    assert sorted(watch.look()) == ["last", "tensor"]
    assert _changes(watch) == set()


def test_a_tensor_of_which_no_sample_can_be_had_is_always_taken_to_be_written() -> None:
    module = Module(expanded=torch.zeros(1).expand(2 * LARGE))
    watch = module.watch()
    assert _changes(watch) == {"expanded"}


def test_a_tensor_in_the_place_of_another_is_looked_at() -> None:
    module = Module(first=torch.zeros(LARGE), second=torch.zeros(LARGE), none=None)
    watch = module.watch()
    module.tensors["first"] = replaced = torch.ones(2 * LARGE)
    module["second"].data.add_(1)
    assert watch.look().keys() == {"first", "second"}
    assert watch.look()["first"].tensor is replaced
    assert _changes(watch) == set()
    replaced.data.add_(1)
    module.tensors["none"] = torch.zeros(LARGE)
    module.tensors["second"] = None
    assert watch.look().keys() == {"first", "none"}
    assert _changes(watch) == set()
    with torch.inference_mode():
        module.tensors["none"] = torch.zeros(LARGE)  # such tensors count nothing
    watch.look()
    assert _changes(watch) == {"none"}


# ---------------------------------------------------------------------- into a slot and back
@pytest.fixture
def slot() -> Iterator[RankSlot]:
    fd = RankSlot.create(0, REGION_BYTES)
    slot = RankSlot(fd, REGION_BYTES)
    yield slot
    slot.close()
    os.close(fd)


def _publish(
    slot: RankSlot, writer: BulkWriter, region: Region, written: dict[str, Written], *buffers: bytes
) -> tuple[Contents, list[int]]:
    """Return (what the bulk holds, bytes of the pieces written)."""
    views = [memoryview(buffer) for buffer in buffers]
    contents, end = writer.lay_out(written, views)
    pieces = list(writer.pieces(region, contents, written, views))
    slot.write(region, [b"content"], pieces, end)
    return contents, [piece.nbytes for _, piece in pieces]


def test_a_buffer_gets_what_was_written_since_it_was_last_published(slot: RankSlot) -> None:
    module, writer = Module(a=torch.zeros(LARGE), b=torch.zeros(2 * LARGE)), BulkWriter()
    watch, regions = module.watch(), itertools.cycle([Region.COMMIT_A, Region.COMMIT_B])
    sizes: list[list[int]] = []
    for step in range(8):
        if step == 1:
            module["a"].add_(1)
        if step in (3, 4):
            module["b"].add_(1)
        contents, pieces = _publish(slot, writer, region := next(regions), watch.look())
        sizes.append([size // LARGE for size in pieces])
        for name in contents.places:
            back = torch.empty_like(module[name])
            StoredBulk(slot, region, contents).fill(name, back)
            assert torch.equal(back, module[name])
    assert sizes == [[], [4], [4], [8], [8], [8], [], []]


def test_a_writer_that_failed_does_not_count_on_what_the_buffer_holds(slot: RankSlot) -> None:
    module, writer = Module(a=torch.zeros(LARGE), b=torch.zeros(LARGE)), BulkWriter()
    watch = module.watch()
    module["a"].add_(1)
    module["b"].add_(1)
    _publish(slot, writer, Region.MID_A, watch.look())
    module["b"].add_(1)
    written = watch.look()
    contents, _ = writer.lay_out(written, [])
    next(writer.pieces(Region.MID_A, contents, written, []))  # and never the rest
    _, sizes = _publish(slot, writer, Region.MID_A, written)
    assert len(sizes) == 2


def test_buffers_without_a_name_come_after_the_tensors_and_anew_each_time(slot: RankSlot) -> None:
    module, writer = Module(a=torch.zeros(LARGE), b=torch.zeros(LARGE)), BulkWriter()
    watch = module.watch()
    for step, name in enumerate("ab"):
        module[name].fill_(step + 1)
        contents, _ = _publish(slot, writer, Region.MID_A, watch.look(), b"first" * 100, b"", b"second")
        bulk = StoredBulk(slot, Region.MID_A, contents)
        assert list(bulk.buffers()) == [b"first" * 100, b"", b"second"]
    for name, value in (("a", 1), ("b", 2)):
        back = torch.empty(LARGE)
        bulk.fill(name, back)
        assert torch.equal(back, torch.full((LARGE,), float(value)))


def test_a_tensor_of_another_shape_gets_another_place(slot: RankSlot) -> None:
    module, writer = Module(a=torch.zeros(LARGE)), BulkWriter()
    watch = module.watch()
    module["a"].fill_(1)
    _publish(slot, writer, Region.MID_A, watch.look())
    module.tensors["a"] = torch.full((3, LARGE), 2, dtype=torch.float64)
    contents, _ = _publish(slot, writer, Region.MID_A, watch.look())
    assert contents.places["a"].shape == (3, LARGE)
    back = torch.empty(3, LARGE, dtype=torch.float64)
    StoredBulk(slot, Region.MID_A, contents).fill("a", back)
    assert torch.equal(back, module["a"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Parameter(torch.zeros(30, 40)),
        lambda: torch.zeros(40, 30).t(),
        lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.zeros(30, 40, dtype=torch.complex64).conj(),
        lambda: torch.zeros(30, dtype=torch.bfloat16),
        lambda: torch.zeros(()),
        lambda: torch.zeros(0, 3),
    ],
    ids=["parameter", "transposed", "channels last", "conjugated", "bfloat16", "scalar", "empty"],
)
def test_a_tensor_of_any_layout_is_filled_in_place(slot: RankSlot, make: Callable[[], torch.Tensor]) -> None:
    source, target, writer = make(), make(), BulkWriter()
    with torch.no_grad():
        source.copy_(torch.randn(source.shape))
    contents, _ = _publish(slot, writer, Region.COMMIT_A, {"x": Written(source, 1)})
    pointer, version = target.data_ptr(), target._version
    StoredBulk(slot, Region.COMMIT_A, contents).fill("x", target)
    assert torch.equal(target, source)
    assert target.data_ptr() == pointer
    assert target._version > version  # the next look has to see it
