"""Large tensors in a slot: which have been written, where each lies, and how they get in and out without a second copy.

A rank publishes at every step, and most large tensors that it must publish (averaged weights that are renewed once an
epoch, frozen weights that were loaded once) are then what they were. :class:`TensorWatch` finds out which are not, and
:class:`BulkWriter` copies only those. Each buffer of the slot has its own bulk, so each remembers for itself what it
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch

from lightning_flashrl.recovery.slot import RankSlot, Region

_ALIGNMENT = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors = MutableMapping[str, torch.Tensor | None]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's values in row order: its own memory where it lies so on the host, else a copy."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fill(tensor: torch.Tensor, read: Callable[[memoryview], None]) -> None:
    """Let ``read`` write a tensor's values in row order: straight into its memory where it lies so on the host."""
    with torch.no_grad():
        target = tensor.detach()
        lies_here = target.device.type == "cpu" and target.is_contiguous() and not target.is_conj()
        host = target if lies_here else torch.empty(target.shape, dtype=target.dtype)
        if host.numel():
            read(bytes_of(host))
        if lies_here:
            torch.autograd.graph.increment_version(tensor)
        else:
            target.copy_(host)


# ---------------------------------------------------------------------- what has been written
@dataclass(slots=True)
class _Watched:
    """One place of a module that holds a tensor."""

    owner: Tensors
    key: str
    is_uncounted: bool
    """Written by kernels that leave no trace."""
    tensor: torch.Tensor | None = None
    version: int = 0
    pointer: int = 0
    sample: torch.Tensor | None = None
    """A few of the tensor's elements, a view of its memory."""
    num_writes: int = 0

    def look(self) -> bool:
        """Note a write that leaves a trace; true if another tensor, or none, is there now."""
        tensor = self.owner.get(self.key)
        if tensor is None:
            was_here = self.tensor is not None
            self.tensor, self.sample = None, None
            return was_here
        if tensor is self.tensor and self.is_uncounted:
            self.num_writes += 1
            return False
        if tensor is self.tensor and tensor.data_ptr() == self.pointer:
            if tensor._version != self.version:
                self.version = tensor._version
                self.num_writes += 1
            return False
        self.num_writes += 1
        self._meet(tensor)
        return True

    def _meet(self, tensor: torch.Tensor) -> None:
        self.tensor, self.sample = tensor, None
        if tensor.nbytes <= TensorWatch.SMALL_BYTES or tensor.is_inference():
            self.is_uncounted = True
        if not self.is_uncounted:
            self.version, self.pointer = tensor._version, tensor.data_ptr()
            self.sample = _sample(tensor)
            self.is_uncounted = self.sample is None


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """The bits of a few elements, as a view; ``None`` if the tensor's memory has gaps or overlaps."""
    flat = tensor.detach()
    if not torch.ops.aten.is_non_overlapping_and_dense(flat):
        return None
    flat = flat.as_strided((flat.numel(),), (1,), flat.storage_offset())
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    bits = flat.view(_BITS[flat.element_size()])
    return bits[:: bits.numel() // TensorWatch.NUM_SAMPLES][: TensorWatch.NUM_SAMPLES]


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor that may not be what it was at the start.

    Attributes:
        tensor: itself, not a copy.
        num_writes: grows when the tensor may have been written.
    """

    tensor: torch.Tensor
    num_writes: int


class TensorWatch:
    """Finds tensors that were written since they were last looked at.

    A write is seen by the tensor's version counter, and by its address where another memory was put in
    (``p.data = …``). Writes through ``p.data`` are not counted by torch; those that go over all of a tensor, as
    averaging does, are seen by a sample of its elements. Kernels of running statistics are not counted either: their
    tensors, and small ones, are always taken to be written. A place is looked at, not a tensor: a buffer may be
    assigned anew.

    Args:
        places: by name, the dict of a module and the key in it.
        uncounted: names of tensors that are taken to be written whatever is seen.
    """

    SMALL_BYTES = 1 << 15
    NUM_SAMPLES = 16

    def __init__(self, places: Mapping[str, tuple[Tensors, str]], uncounted: Iterable[str] = ()) -> None:
        always = set(uncounted)
        self._watched = {name: _Watched(owner, key, name in always) for name, (owner, key) in places.items()}
        for watched in self._watched.values():
            tensor = watched.owner.get(watched.key)
            if tensor is not None:
                watched._meet(tensor)
        self._groups: list[tuple[list[_Watched], torch.Tensor]] = []
        self._group()

    def _group(self) -> None:
        """Samples that can be compared at once."""
        groups: dict[tuple[torch.device, torch.dtype], list[_Watched]] = {}
        for watched in self._watched.values():
            if watched.sample is not None:
                groups.setdefault((watched.sample.device, watched.sample.dtype), []).append(watched)
        self._groups = [(group, _values(group)) for group in groups.values()]

    def look(self) -> dict[str, Written]:
        """Tensors that may differ from the start, by name."""
        is_moved = False
        for watched in self._watched.values():
            is_moved |= watched.look()
        for index, (group, before) in enumerate(self._groups):
            if is_moved or torch.equal(now := _values(group), before):
                continue
            for watched, is_same in zip(group, (now == before).all(1).tolist(), strict=True):
                watched.num_writes += not is_same
            self._groups[index] = (group, now)
        if is_moved:
            self._compare_alone()
        return {
            name: Written(watched.tensor, watched.num_writes)
            for name, watched in self._watched.items()
            if watched.tensor is not None and watched.num_writes
        }

    def _compare_alone(self) -> None:
        for group, before in self._groups:
            for watched, sample in zip(group, before, strict=True):
                if watched.sample is None or watched.sample.dtype != sample.dtype:
                    continue
                watched.num_writes += not torch.equal(watched.sample, sample.to(watched.sample.device))
        self._group()


def _values(group: list[_Watched]) -> torch.Tensor:
    return torch.stack([watched.sample for watched in group if watched.sample is not None])


# ---------------------------------------------------------------------- where it lies
@dataclass(frozen=True, slots=True)
class Place:
    """Where in the bulk a tensor lies.

    Attributes:
        offset: of its first byte.
        dtype: torch's name of its type.
        shape: of the tensor.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the bulk of a resume point holds.

    Attributes:
        places: of tensors, by name.
        pieces: (offset, bytes) of buffers without a name, in order.
    """

    places: dict[str, Place] = field(default_factory=dict)
    pieces: tuple[tuple[int, int], ...] = ()


class BulkWriter:
    """Lays out the bulk of each buffer and remembers which tensors it holds.

    A tensor has the same place in every bulk, given when it is first written. Buffers without a name come last, anew
    each time.
    """

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._end = 0
        self._held: dict[Region, dict[str, tuple[Place, int]]] = {}

    def lay_out(self, tensors: Mapping[str, Written], buffers: Sequence[memoryview]) -> tuple[Contents, int]:
        """Return (what the bulk will hold, where it ends)."""
        places = {name: self._place(name, written.tensor) for name, written in tensors.items()}
        end, pieces = self._end, []
        for buffer in buffers:
            pieces.append((end, buffer.nbytes))
            end = _aligned(end + buffer.nbytes)
        return Contents(places, tuple(pieces)), end

    def _place(self, name: str, tensor: torch.Tensor) -> Place:
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        place = self._places.get(name)
        if place is None or (place.shape, place.dtype) != (shape, dtype):
            place = self._places[name] = Place(self._end, dtype, shape)
            self._end = _aligned(self._end + tensor.nbytes)
        return place

    def pieces(
        self, region: Region, contents: Contents, tensors: Mapping[str, Written], buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, memoryview]]:
        """What has to be written to make the bulk of ``region`` hold ``contents``; one host copy at a time."""
        held = self._held.pop(region, {})  # unknown until all is written
        now = {name: (place, tensors[name].num_writes) for name, place in contents.places.items()}
        for name, state in now.items():
            if held.get(name) != state:
                yield state[0].offset, bytes_of(tensors[name].tensor)
        for (offset, _), buffer in zip(contents.pieces, buffers, strict=True):
            yield offset, buffer
        self._held[region] = now


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one moment, on its way into a buffer of a slot.

    Attributes:
        schema: which attributes of which objects the content holds.
        content: their values, without large tensors.
        bulk: what the bulk holds once it is written.
        bulk_bytes: where the bulk ends.
        pieces: given the buffer, what has to be written into its bulk. They are views of live memory.
    """

    schema: bytes
    content: bytes
    bulk: Contents
    bulk_bytes: int
    pieces: Callable[[Region], Iterator[tuple[int, memoryview]]]


@dataclass(frozen=True, slots=True)
class StoredBulk:
    """The bulk of a resume point, read piece by piece."""

    slot: RankSlot
    region: Region
    contents: Contents

    def buffers(self) -> Iterator[bytearray]:
        """The buffers without a name, in order, one at a time."""
        for offset, size in self.contents.pieces:
            buffer = bytearray(size)
            self.slot.read_bulk(self.region, offset, memoryview(buffer))
            yield buffer

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Set ``tensor`` to the stored one of that name and of its type and shape."""
        offset = self.contents.places[name].offset
        fill(tensor, lambda target: self.slot.read_bulk(self.region, offset, target))
