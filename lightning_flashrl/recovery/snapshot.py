"""What a rank must keep per step so that it can be reborn: its random states and the plain state of known objects.

Replicated tensors (parameters, optimizer state) are not here: every other rank has them. What is here is what no other
rank has: random number generators, loop counters, partial metrics, and whatever the user's modules and callbacks keep
in attributes. A :class:`Freezer` writes the attributes of known objects as one pickle, in which known objects and
tensors of the model appear by name; large tensors and arrays stay outside it, to be copied once. The bytes never leave
the memory of this host.
"""

from __future__ import annotations

import io
import pickle
import threading
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from lightning_flashrl.recovery.bulk import bytes_of

_PLAIN = (int, float, bool, str, bytes, type(None))
TENSORS_LIMIT_BYTES = 24 << 20
"""What tensors and large arrays in one attribute may take together: they are copied at every step."""
LARGE_BYTES = 1 << 14
"""From this size on the memory of a tensor or array stays outside the pickle."""
_UNPICKLABLE = (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, ValueError, RuntimeError)
_STATELESS = (types.FunctionType, types.ModuleType, type(threading.Lock()), type(threading.RLock()))
"""Cannot be pickled, some of them, and have nothing that would be lost."""


# ---------------------------------------------------------------------- tensors by value
def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's values as bytes, in row order."""
    return bytes_of(tensor).tobytes()


def tensor_from_bytes(
    content: bytes | bytearray, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> torch.Tensor:
    """Inverse of :func:`tensor_bytes`; the tensor uses the memory of a ``bytearray``."""
    if not content:
        return torch.empty(shape, dtype=dtype, device=device)
    writable = content if isinstance(content, bytearray) else bytearray(content)
    tensor = torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor if device == "cpu" else tensor.to(device)


def _sparse(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...], is_coalesced: bool) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=True)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


_thawing: list[Callable[[Any], Any]] = []
"""Resolvers of the thaw in progress, innermost last."""


def _named(name: Any) -> Any:
    """Called while thawing: the known object of that name."""
    return _thawing[-1](name)


# ---------------------------------------------------------------------- attributes of known objects
@dataclass(slots=True)
class _Watched:
    """One object whose attributes are kept."""

    name: Any
    object: Any
    excluded: frozenset[str]
    keys: tuple[str, ...] = ()
    getter: Callable[[Any], Any] | None = None
    num_attributes: int = -1
    refused: dict[str, Refusal] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Refusal:
    """An attribute that is not kept, and the value for which this was decided.

    Attributes:
        owner: the watched object.
        attribute: of it.
        reason: what is wrong with the value.
        is_too_large: whether that is its size.
        has_state: whether a replacement lacks something without it, as far as the value's type tells.
    """

    owner: Any
    attribute: str
    reason: str
    is_too_large: bool
    has_state: bool
    _identity: tuple[int, type] = field(init=False)
    _num_others: int = 0
    _is_in_doubt: bool = False

    def __post_init__(self) -> None:
        self._identity = self._identify()

    def _identify(self) -> tuple[int, type]:
        value = vars(self.owner).get(self.attribute)
        return id(value), type(value)

    def is_in_doubt(self) -> bool:
        """Whether to look again: the value is another object, for the 1st, 2nd, 4th, 8th… time."""
        identity = self._identify()
        if identity != self._identity:
            self._identity = identity
            self._num_others += 1
            self._is_in_doubt |= self._num_others & (self._num_others - 1) == 0
        return self._is_in_doubt

    def confirm(self, reason: str) -> None:
        """It was looked at again, and the value cannot be kept either."""
        self.reason = reason
        self._is_in_doubt = False


class Frozen(NamedTuple):
    """Attributes of known objects, frozen.

    Attributes:
        schema: which attributes of which objects.
        content: their values.
        buffers: memory of large tensors and arrays in them, in order; live, so to be copied before anybody writes.
    """

    schema: bytes
    content: bytes
    buffers: list[memoryview]

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return len(self.content) + sum(buffer.nbytes for buffer in self.buffers)


class Freezer:
    """Keeps the plain attributes of a set of known objects.

    An attribute that cannot be kept is left out, and looked at again when its value is another object. One whose value
    is another object at every step is looked at less and less often.

    Args:
        attribute_limit_bytes: an attribute that takes more is left out, and reported through ``on_refused``.
        on_refused: told once for each attribute that cannot be kept.
    """

    def __init__(
        self, attribute_limit_bytes: int = 1 << 20, on_refused: Callable[[Refusal], None] = lambda refusal: None
    ) -> None:
        self._limit = attribute_limit_bytes
        self._on_refused = on_refused
        self._watched: list[_Watched] = []
        self._names: dict[int, Any] = {}
        self._objects: dict[Any, Any] = {}
        self._keep_alive: list[Any] = []
        self._skipped: tuple[type, ...] = ()
        self._dispatch: dict[type, Callable[[Any], Any]] = {
            torch.Tensor: self._reduce_tensor,
            torch.nn.Parameter: self._reduce_tensor,
            torch.dtype: lambda dtype: (_dtype, (str(dtype).removeprefix("torch."),)),
            torch.device: lambda device: (torch.device, (str(device),)),
        }
        self._schema = b""
        self._is_stale = True
        self._num_tensor_bytes = 0
        self._refusals: list[Refusal] = []
        self._told: set[tuple[Any, str]] = set()

    # ------------------------------------------------------------------ what is known
    def name(self, thing: Any, name: Any) -> None:
        """Let ``thing`` appear by ``name`` wherever it is referred to."""
        self._names[id(thing)] = name
        self._objects[name] = thing
        self._keep_alive.append(thing)
        self._dispatch.setdefault(type(thing), self._reduce_known)

    def skip_types(self, *types: type) -> None:
        """Leave out attributes of these types: the newcomer's own are right."""
        self._skipped += types

    def watch(self, thing: Any, name: Any, excluded: Iterable[str] = ()) -> None:
        """Keep the attributes of ``thing``, except the excluded ones."""
        if id(thing) not in self._names:
            self.name(thing, name)
        self._watched.append(_Watched(name, thing, frozenset(excluded)))
        self._is_stale = True

    def _reduce_known(self, thing: Any) -> Any:
        name = self._names.get(id(thing))
        return thing.__reduce_ex__(5) if name is None else (_named, (name,))

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        name = self._names.get(id(tensor))
        if name is not None:
            return (_named, (name,))
        if tensor.layout is torch.sparse_coo:
            parts = tensor.detach()._indices(), tensor.detach()._values()
            return (_sparse, (*parts, tuple(tensor.shape), tensor.is_coalesced()))
        content: Any
        if tensor.nbytes >= LARGE_BYTES:
            content = pickle.PickleBuffer(bytes_of(tensor))
        else:
            self._num_tensor_bytes += tensor.nbytes
            content = tensor_bytes(tensor)
        return (tensor_from_bytes, (content, tensor.dtype, tuple(tensor.shape), str(tensor.device)))

    def _dumps(self, thing: Any) -> Frozen:
        stream, buffers = io.BytesIO(), list[memoryview]()

        def goes_inside(buffer: pickle.PickleBuffer) -> bool:
            memory = buffer.raw()
            if memory.nbytes >= LARGE_BYTES:
                buffers.append(memory)
                return False
            return True

        pickler = pickle.Pickler(stream, protocol=5, buffer_callback=goes_inside)
        pickler.dispatch_table = self._dispatch
        pickler.dump(thing)
        return Frozen(self._schema, stream.getvalue(), buffers)

    # ------------------------------------------------------------------ schema
    def _may_keep(self, watched: _Watched, key: str, value: Any) -> bool:
        if key in watched.excluded:
            return False
        refusal = watched.refused.get(key)
        if isinstance(value, _PLAIN) or id(value) in self._names:
            may_keep = not isinstance(value, self._skipped)
        elif isinstance(value, self._skipped) or (refusal is not None and not refusal.is_in_doubt()):
            return False
        else:
            may_keep = self._try(watched, key, value)
        if may_keep and refusal is not None:
            self._refusals.remove(watched.refused.pop(key))
        return may_keep

    def _try(self, watched: _Watched, key: str, value: Any) -> bool:
        self._num_tensor_bytes = 0
        try:
            frozen = self._dumps(value)
        except _UNPICKLABLE as error:
            self._refuse(watched, key, f"cannot be pickled ({error})", has_state=not isinstance(value, _STATELESS))
            return False
        tensors = self._num_tensor_bytes + sum(buffer.nbytes for buffer in frozen.buffers)
        if frozen.num_bytes - tensors <= self._limit and tensors <= TENSORS_LIMIT_BYTES:
            return True
        limits = f"{self._limit} (or {TENSORS_LIMIT_BYTES} in tensors)"
        self._refuse(watched, key, f"takes {frozen.num_bytes} bytes, more than {limits}", is_too_large=True)
        return False

    def _refuse(
        self, watched: _Watched, key: str, reason: str, *, is_too_large: bool = False, has_state: bool = True
    ) -> None:
        refusal = watched.refused.get(key)
        if refusal is not None:
            refusal.confirm(reason)
            return
        refusal = watched.refused[key] = Refusal(watched.object, key, reason, is_too_large, has_state)
        self._refusals.append(refusal)
        if (watched.name, key) not in self._told:
            self._told.add((watched.name, key))
            self._on_refused(refusal)

    def refuse_largest(self) -> bool:
        """Leave out, from now on, the attribute that takes most; false if none is worth it."""
        sizes = [
            (self._dumps(vars(watched.object)[key]).num_bytes, index, key)
            for index, watched in enumerate(self._watched)
            for key in watched.keys
            if not isinstance(vars(watched.object).get(key), _PLAIN) and key in vars(watched.object)
        ]
        if not sizes or max(sizes)[0] < self._limit:
            return False
        size, index, key = max(sizes)
        self._refuse(self._watched[index], key, f"has grown to {size} bytes", is_too_large=True)
        self._is_stale = True
        return True

    def _refresh(self, watched: _Watched) -> None:
        attributes = vars(watched.object)
        for key in watched.refused.keys() - attributes.keys():
            self._refusals.remove(watched.refused.pop(key))
        watched.keys = tuple(key for key, value in attributes.items() if self._may_keep(watched, key, value))
        watched.num_attributes = len(attributes)
        watched.getter = itemgetter(*watched.keys) if watched.keys else None

    def _update_schema(self) -> None:
        for watched in self._watched:
            self._refresh(watched)
        self._schema = pickle.dumps([(w.name, w.keys) for w in self._watched if w.keys], protocol=5)
        self._is_stale = False

    # ------------------------------------------------------------------ freeze and thaw
    def _needs_schema(self) -> bool:
        return (
            self._is_stale
            or any(len(vars(w.object)) != w.num_attributes for w in self._watched)
            or any(refusal.is_in_doubt() for refusal in self._refusals)
        )

    def freeze(self, extra: Any = None) -> Frozen:
        """Freeze all watched objects and ``extra``, which may refer to them."""
        if self._needs_schema():
            self._update_schema()
        try:
            return self._dumps(([w.getter(vars(w.object)) for w in self._watched if w.getter], extra))
        except (*_UNPICKLABLE, KeyError):
            self._update_schema()  # an attribute vanished, or holds something new that cannot be kept
            return self._dumps(([w.getter(vars(w.object)) for w in self._watched if w.getter], extra))

    def thaw(self, schema: bytes, content: bytes, buffers: Iterable[Any] = ()) -> Any:
        """Set the attributes of all watched objects to what was frozen; return ``extra``.

        Args:
            schema: from :meth:`freeze`.
            content: from :meth:`freeze`.
            buffers: from :meth:`freeze`; what is thawed uses their memory.
        """
        _thawing.append(self._objects.__getitem__)
        try:
            states, extra = pickle.loads(content, buffers=buffers)  # our own memory, never the network
        finally:
            _thawing.pop()
        for (name, keys), values in zip(pickle.loads(schema), states, strict=True):
            target = self._objects.get(name)
            if target is None:
                continue
            if len(keys) == 1:
                values = (values,)
            vars(target).update(zip(keys, values, strict=True))
        return extra
