"""Another process's memory on the same host, read in one copy and without that process's doing anything.

The kernel lets a process read the memory of another of the same user (``process_vm_readv``). Where a kernel or a
container forbids it, :class:`ForeignMemoryError` says so, and the caller takes another way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator, Sequence

import torch

_PR_SET_PTRACER = 0x59616D61
_MAX_SPANS = 512
"""The kernel takes up to 1,024 in one call."""
_MAX_BYTES = 1 << 28
_GONE = (errno.ESRCH, errno.EFAULT)
_libc = ctypes.CDLL(None, use_errno=True)


class ForeignMemoryError(Exception):
    """This kernel or container does not let one process read another's memory."""


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def readable_by(pid: int) -> Iterator[None]:
    """Let process ``pid`` read this one's memory, where the kernel asks for such a permission (Yama)."""
    _libc.prctl(_PR_SET_PTRACER, pid, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_PTRACER, 0, 0, 0, 0)


def read_tensors(pid: int, addresses: Sequence[int], targets: Sequence[torch.Tensor]) -> None:
    """Fill contiguous host tensors with the bytes at ``addresses`` of process ``pid``.

    Raises:
        ForeignMemoryError: it is not allowed here; nothing was read.
        ConnectionError: the process is gone.
    """
    spans: list[tuple[int, int, int]] = []
    for address, target in zip(addresses, targets, strict=True):
        assert target.is_contiguous()
        assert target.device.type == "cpu"
        for start in range(0, target.nbytes, _MAX_BYTES):
            size = min(_MAX_BYTES, target.nbytes - start)
            spans.append((target.data_ptr() + start, address + start, size))
    while spans:
        batch, num_bytes = 0, 0
        while batch < min(len(spans), _MAX_SPANS) and num_bytes < _MAX_BYTES:
            num_bytes += spans[batch][2]
            batch += 1
        spans = _after(spans, _read(pid, spans[:batch]))


def _read(pid: int, spans: Sequence[tuple[int, int, int]]) -> int:
    """Read some of the first spans; return the bytes read, at least one."""
    here = (_Span * len(spans))(*(_Span(ours, size) for ours, _, size in spans))
    there = (_Span * len(spans))(*(_Span(theirs, size) for _, theirs, size in spans))
    read: int = _libc.process_vm_readv(
        pid, here, ctypes.c_ulong(len(spans)), there, ctypes.c_ulong(len(spans)), ctypes.c_ulong(0)
    )
    if read > 0:
        return read
    number = ctypes.get_errno()
    if read == 0 or number in _GONE:
        raise ConnectionError(f"Connection to the donor's memory was lost: process {pid} is gone")
    raise ForeignMemoryError(f"reading the memory of process {pid}: {os.strerror(number)}")


def _after(spans: list[tuple[int, int, int]], num_read: int) -> list[tuple[int, int, int]]:
    """What is left when ``num_read`` bytes have been read.

    >>> _after([(0, 100, 8), (50, 200, 4), (60, 300, 2)], 10)
    [(52, 202, 2), (60, 300, 2)]
    """
    for index, (ours, theirs, size) in enumerate(spans):
        if num_read < size:
            return [(ours + num_read, theirs + num_read, size - num_read), *spans[index + 1 :]]
        num_read -= size
    return []
