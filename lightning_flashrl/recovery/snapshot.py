"""What a rank must keep per step so that it can be reborn: its random states and the plain state of known objects.

Replicated tensors (parameters, optimizer state) are not here: every other rank has them. What is here is what no other
rank has: random number generators, loop counters, partial metrics, and whatever the user's modules and callbacks keep
in attributes. A :class:`Freezer` writes the attributes of known objects as one pickle, in which known objects and
tensors of the model appear by name. The bytes never leave the memory of this host.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import torch

_PLAIN = (int, float, bool, str, bytes, type(None))
TENSORS_LIMIT_BYTES = 24 << 20
"""What tensors in one attribute may take together: copying them costs little more than their memory traffic."""


# ---------------------------------------------------------------------- random states
def capture_rng(device: torch.device | None = None) -> tuple[Any, ...]:
    """Return the states of Python's, NumPy's, torch's and the device's generators as plain bytes and numbers."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: list[Any] = [
        (version, np.array(internal, dtype=np.uint32).tobytes(), gauss),
        (name, np.asarray(keys).tobytes(), position, has_gauss, cached),
        torch.get_rng_state().numpy().tobytes(),
    ]
    if device is not None and device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device).numpy().tobytes())
    return tuple(states)


def restore_rng(states: tuple[Any, ...], device: torch.device | None = None) -> None:
    """Set all generators to what :func:`capture_rng` returned."""
    version, internal, gauss = states[0]
    random.setstate((version, tuple(np.frombuffer(internal, dtype=np.uint32).tolist()), gauss))
    name, keys, position, has_gauss, cached = states[1]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(states[2]), dtype=torch.uint8))
    if device is not None and len(states) > 3:
        state = torch.frombuffer(bytearray(states[3]), dtype=torch.uint8)
        torch.get_device_module(device).set_rng_state(state, device)


# ---------------------------------------------------------------------- tensors by value
def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's values as bytes, in row order."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def tensor_from_bytes(content: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Inverse of :func:`tensor_bytes`."""
    if not content:
        return torch.empty(shape, dtype=dtype, device=device)
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor if device == "cpu" else tensor.to(device)


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
    refused: dict[str, str] = field(default_factory=dict)


class Freezer:
    """Keeps the plain attributes of a set of known objects.

    Args:
        attribute_limit_bytes: an attribute that takes more is left out, and reported through ``on_refused``.
        on_refused: told (object name, attribute, reason) once for each attribute that cannot be kept.
    """

    def __init__(
        self, attribute_limit_bytes: int = 1 << 20, on_refused: Callable[[Any, str, str], None] = lambda *_: None
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
        self._num_tensor_bytes += tensor.nbytes
        return (tensor_from_bytes, (tensor_bytes(tensor), tensor.dtype, tuple(tensor.shape), str(tensor.device)))

    def _dumps(self, thing: Any) -> bytes:
        stream = io.BytesIO()
        pickler = pickle.Pickler(stream, protocol=5)
        pickler.dispatch_table = self._dispatch
        pickler.dump(thing)
        return stream.getvalue()

    # ------------------------------------------------------------------ schema
    def _may_keep(self, watched: _Watched, key: str, value: Any) -> bool:
        if key in watched.excluded:
            return False
        if isinstance(value, _PLAIN):
            return True
        if key in watched.refused:
            return False
        if isinstance(value, self._skipped) or id(value) in self._names:
            return not isinstance(value, self._skipped)
        self._num_tensor_bytes = 0
        try:
            size = len(self._dumps(value))
        except (
            pickle.PicklingError,
            TypeError,
            AttributeError,
            NotImplementedError,
            ValueError,
            RuntimeError,
        ) as error:
            watched.refused[key] = f"cannot be pickled ({error})"
        else:
            tensors = min(self._num_tensor_bytes, size)
            if size - tensors <= self._limit and tensors <= TENSORS_LIMIT_BYTES:
                return True
            watched.refused[key] = f"takes {size} bytes, more than {self._limit} (or {TENSORS_LIMIT_BYTES} in tensors)"
        self._on_refused(watched.name, key, watched.refused[key])
        return False

    def refuse_largest(self) -> bool:
        """Leave out, from now on, the attribute that takes most; false if none is worth it."""
        sizes = [
            (len(self._dumps(vars(watched.object)[key])), index, key)
            for index, watched in enumerate(self._watched)
            for key in watched.keys
            if not isinstance(vars(watched.object).get(key), _PLAIN) and key in vars(watched.object)
        ]
        if not sizes or max(sizes)[0] < self._limit:
            return False
        size, index, key = max(sizes)
        self._watched[index].refused[key] = f"has grown to {size} bytes"
        self._on_refused(self._watched[index].name, key, self._watched[index].refused[key])
        self._is_stale = True
        return True

    def _refresh(self, watched: _Watched) -> None:
        attributes = vars(watched.object)
        watched.keys = tuple(key for key, value in attributes.items() if self._may_keep(watched, key, value))
        watched.num_attributes = len(attributes)
        watched.getter = itemgetter(*watched.keys) if watched.keys else None

    def _update_schema(self) -> None:
        for watched in self._watched:
            self._refresh(watched)
        self._schema = pickle.dumps([(w.name, w.keys) for w in self._watched if w.keys], protocol=5)
        self._is_stale = False

    # ------------------------------------------------------------------ freeze and thaw
    def freeze(self, extra: Any = None) -> tuple[bytes, bytes]:
        """Return (schema, content) of all watched objects and of ``extra``, which may refer to them."""
        if self._is_stale or any(len(vars(w.object)) != w.num_attributes for w in self._watched):
            self._update_schema()
        try:
            return self._schema, self._dumps(([w.getter(vars(w.object)) for w in self._watched if w.getter], extra))
        except (pickle.PicklingError, TypeError, AttributeError, KeyError, RuntimeError):
            self._update_schema()  # an attribute vanished, or holds something new that cannot be kept
            return self._schema, self._dumps(([w.getter(vars(w.object)) for w in self._watched if w.getter], extra))

    def thaw(self, schema: bytes, content: bytes) -> Any:
        """Set the attributes of all watched objects to what was frozen; return ``extra``.

        Args:
            schema: from :meth:`freeze`.
            content: from :meth:`freeze`.
        """
        _thawing.append(self._objects.__getitem__)
        try:
            states, extra = pickle.loads(content)  # our own memory, never the network
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


# ---------------------------------------------------------------------- changed buffers
class BufferWatch:
    """Finds tensors that were written in place since they were last looked at.

    A write is seen by the tensor's version counter. Some kernels (running statistics) do not count their writes, and
    small tensors are not worth the doubt: those are always taken to be changed.

    Args:
        tensors: by name.
        always: names of tensors that are taken to be changed whatever their counter says.
    """

    SMALL_BYTES = 1 << 15

    def __init__(self, tensors: Mapping[str, torch.Tensor], always: Iterable[str] = ()) -> None:
        self._tensors = dict(tensors)
        self._versions = {name: tensor._version for name, tensor in self._tensors.items()}
        self._changed = {name for name in always if name in self._tensors}
        self._changed |= {name for name, tensor in self._tensors.items() if tensor.nbytes <= self.SMALL_BYTES}
        self._unchanged = set(self._tensors) - self._changed

    def changed(self) -> dict[str, torch.Tensor]:
        """Tensors that may differ from the start, by name."""
        found = {name for name in self._unchanged if self._tensors[name]._version != self._versions[name]}
        self._changed |= found
        self._unchanged -= found
        return {name: self._tensors[name] for name in sorted(self._changed)}
