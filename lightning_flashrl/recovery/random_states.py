"""Random states as plain bytes and numbers, captured several times a step.

To copy the states of Python and NumPy out of their interfaces takes much longer than to see in their memory that they
are what they were. A state that did not change since it was captured last is given as the same object, so that a pickle
of several states holds it once.
"""

from __future__ import annotations

import _random
import ctypes
import random
import struct
from typing import Any

import numpy as np
import torch

_PYTHON = struct.Struct("=625I")
"""Key and position, as :func:`random.getstate` tells them."""
_MEMORY_BYTES = 2500
"""Of key and position of a Mersenne twister; Python and NumPy have them in other orders."""

_newest: dict[Any, Any] = {}
"""State captured last, by the kind of generator or device."""


def capture_rng(device: torch.device | None = None) -> tuple[Any, ...]:
    """Return the states of Python's, NumPy's, torch's and the device's generators as plain bytes and numbers."""
    states = [_python.capture(), _numpy.capture(), _shared("torch", torch.get_rng_state().numpy().tobytes())]
    if device is not None and device.type != "cpu":
        state = torch.get_device_module(device).get_rng_state(device)
        states.append(_shared(device, state.numpy().tobytes()))
    return tuple(states)


def restore_rng(states: tuple[Any, ...], device: torch.device | None = None) -> None:
    """Set all generators to what :func:`capture_rng` returned."""
    version, internal, gauss = states[0]
    random.setstate((version, _PYTHON.unpack(internal), gauss))
    name, keys, position, has_gauss, cached = states[1]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(states[2]), dtype=torch.uint8))
    if device is not None and len(states) > 3:
        state = torch.frombuffer(bytearray(states[3]), dtype=torch.uint8)
        torch.get_device_module(device).set_rng_state(state, device)


def _shared(kind: Any, state: Any) -> Any:
    if _newest.get(kind) != state:
        _newest[kind] = state
    return _newest[kind]


class _PythonState:
    """Python's global generator."""

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._address = 0
        start = object.__basicsize__
        if _random.Random.__basicsize__ >= start + _MEMORY_BYTES:
            self._address = id(random._inst) + start

    def capture(self) -> tuple[Any, ...]:
        """Version, key and position, second of two normal numbers."""
        memory = self._look()
        if memory is not None and memory == self._memory:
            newest: tuple[Any, ...] = _newest["python"]
            if newest[2] == random._inst.gauss_next:  # type: ignore[attr-defined]
                return newest
        version, internal, gauss = random.getstate()
        content = _PYTHON.pack(*internal)
        is_as_expected = memory in (content, content[-4:] + content[:-4])
        self._memory = memory if is_as_expected else None
        return _shared("python", (version, content, gauss))  # type: ignore[no-any-return]

    def _look(self) -> bytes | None:
        return ctypes.string_at(self._address, _MEMORY_BYTES) if self._address else None


class _NumpyState:
    """NumPy's global generator."""

    def __init__(self) -> None:
        self._generator: Any = None
        self._memory: bytes | None = None
        self._keeps_normals = False
        """The second of two normal numbers was kept once: such a number is not in the memory that is looked at."""

    def capture(self) -> tuple[Any, ...]:
        """Name, key, position, whether there is a second of two normal numbers, that number."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        is_known = generator is self._generator and self._memory is not None and not self._keeps_normals
        if is_known and self._look(generator) == self._memory:
            return _newest["numpy"]  # type: ignore[no-any-return]
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        content = np.asarray(keys).tobytes()
        self._generator, self._memory = generator, None
        self._keeps_normals |= bool(has_gauss)
        if isinstance(generator, np.random.MT19937):
            memory = self._look(generator)
            if memory == content + int(position).to_bytes(4, "little"):
                self._memory = memory
        return _shared("numpy", (name, content, position, has_gauss, cached))  # type: ignore[no-any-return]

    @staticmethod
    def _look(generator: Any) -> bytes:
        return ctypes.string_at(generator.ctypes.state_address, _MEMORY_BYTES)


_python = _PythonState()
_numpy = _NumpyState()
