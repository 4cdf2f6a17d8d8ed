"""The typed messages between a queue's clients and its server. Arrays travel as their bytes.

::

    client ── Request ──▶ server    every request has a number, and its answer the same
    client ◀─ Answer ──── server
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from lightning_flashrl import errors
from lightning_flashrl.errors import FlashRLError
from lightning_flashrl.streaming.ledger import Written
from lightning_flashrl.streaming.rows import Rows
from lightning_flashrl.streaming.schema import Field, Schema
from lightning_flashrl.streaming.unit import UnitSpec


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the class name is the tag."""


# --------------------------------------------------------------------------- values inside messages
class FieldSpec(Message, frozen=True):
    """A field of the schema."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    allow_nan: bool


class WrittenSpec(Message, frozen=True):
    """A field that was written, one row after the other: where, how long each is, and values that samplers look at."""

    field: str
    place: int
    lengths: bytes
    tags: bytes | None = None


class LocatedSpec(Message, frozen=True):
    """A field of some rows: where each of them begins, and how long it is."""

    field: str
    places: bytes
    lengths: bytes


# --------------------------------------------------------------------------- client → server
class Hello(Message, frozen=True):
    """A client is there."""


class GrantExtent(Message, frozen=True):
    """Room to write at least so many bytes."""

    num_bytes: int


class SealExtent(Message, frozen=True):
    """The extent at a place is done with. No answer."""

    place: int


class Put(Message, frozen=True):
    """Make fields visible; see :meth:`Control.put`."""

    written: tuple[WrittenSpec, ...]
    rows: bytes | None
    lease: tuple[int, str] | None
    timeout_s: float | None


class TakeLease(Message, frozen=True):
    """Lease rows; see :meth:`QueueVerbs.lease`."""

    task: str
    fields: tuple[str, ...]
    count: int | None
    tokens: int | None
    allow_partial: bool
    replica_rank: int
    policy_version: int | None
    micro_batch: int | None
    sampler: str | None
    lease_timeout_s: float
    timeout_s: float | None


class EndLease(Message, frozen=True):
    """Commit or release a lease, or some of its rows."""

    lease_id: int
    task: str
    is_commit: bool
    rows: bytes | None


class Renew(Message, frozen=True):
    """Begin a lease's time anew."""

    lease_id: int
    task: str


class Clear(Message, frozen=True):
    """Forget rows; ``None`` for all."""

    rows: bytes | None


class Close(Message, frozen=True):
    """No new rows will come."""


class AskStatistics(Message, frozen=True):
    """What is in the queue?"""


class Cancel(Message, frozen=True):
    """Give up the request of that number. No answer to this; the request is answered or released."""

    request_id: int


class Ping(Message, frozen=True):
    """Are you there?"""


class Call(Message, frozen=True):
    """What the application asks beside the queue; see :attr:`TransferQueueServer.answer_call`."""

    payload: bytes


class Goodbye(Message, frozen=True):
    """The client ends. No answer."""


# --------------------------------------------------------------------------- server → client
class Welcome(Message, frozen=True):
    """What a client must know.

    Attributes:
        fields: the schema.
        lease_timeout_s: how long a lease lasts.
        units: the storage units.
        local_address: abstract Unix socket of the server, for clients on its host.
        local_token: what the first frame there must begin with.
        session_timeout_s: after so long without a word, nothing is written any more where a client may write.
        boot: of this server; requests name it.
        queue_id: by which the queue is known when another server serves it; empty if that cannot be.
    """

    fields: tuple[FieldSpec, ...]
    lease_timeout_s: float
    units: tuple[UnitSpec, ...]
    local_address: str
    local_token: bytes
    session_timeout_s: float
    boot: bytes
    queue_id: str


class ExtentGranted(Message, frozen=True):
    """Room to write."""

    place: int
    size_bytes: int


class Stored(Message, frozen=True):
    """The rows that were written."""

    rows: bytes


class Leased(Message, frozen=True):
    """A lease and where its rows lie."""

    lease_id: int
    rows: bytes
    located: tuple[LocatedSpec, ...]


class Done(Message, frozen=True):
    """It is done."""


class StatisticsAre(Message, frozen=True):
    """What is in the queue, as :class:`QueueStatistics` in JSON."""

    json: bytes


class Called(Message, frozen=True):
    """What the application answers."""

    payload: bytes


class Failed(Message, frozen=True):
    """An error of ours, to be raised at the client."""

    name: str
    args: list[Any]


class Pong(Message, frozen=True):
    """I am here."""


class Again(Message, frozen=True):
    """You were silent for so long that your request was given up; ask again if you still want it."""


class Moved(Message, frozen=True):
    """The request is for a server that is gone; say hello, and ask again."""


Request: TypeAlias = (
    Hello
    | GrantExtent
    | SealExtent
    | Put
    | TakeLease
    | EndLease
    | Renew
    | Clear
    | Close
    | AskStatistics
    | Cancel
    | Call
    | Ping
    | Goodbye
)
Answer: TypeAlias = (
    Welcome | ExtentGranted | Stored | Leased | Done | StatisticsAre | Called | Failed | Pong | Again | Moved
)

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


# --------------------------------------------------------------------------- to and from our own values
def numbers(data: bytes) -> Rows:
    """Return the int64 array whose bytes these are.

    Raises:
        ValueError: they are not.
    """
    return np.frombuffer(data, np.int64).copy()


def pack_written(written: Sequence[Written]) -> tuple[WrittenSpec, ...]:
    """Make a message of what was written where."""
    return tuple(
        WrittenSpec(
            column.field,
            int(column.places[0]),
            column.lengths.tobytes(),
            None if column.tags is None else column.tags.tobytes(),
        )
        for column in written
    )


def unpack_written(specs: Sequence[WrittenSpec], schema: Schema) -> list[Written]:
    """Return what a client says it wrote.

    Raises:
        ValueError: it cannot be.
        KeyError: a field that the schema does not have.
    """
    written = []
    for spec in specs:
        field = schema[spec.field]
        lengths = np.frombuffer(spec.lengths, np.int64)
        tags: npt.NDArray[Any] | None = None
        if field.is_tag:
            tags = np.frombuffer(spec.tags or b"", field.tag_dtype)
        if tags is not None and len(tags) != len(lengths):
            raise ValueError("arrays of different lengths")
        if len(lengths) and (lengths.min() < 0 or lengths.max() > (_MAX_LENGTH if field.is_ragged else 1)):
            raise ValueError("lengths that no row has")
        sizes = lengths * field.entry_bytes
        written.append(Written(spec.field, np.cumsum(sizes) - sizes + spec.place, lengths, tags))
    return written


def pack_located(located: Sequence[Written]) -> tuple[LocatedSpec, ...]:
    """Make a message of where rows lie."""
    return tuple(LocatedSpec(column.field, column.places.tobytes(), column.lengths.tobytes()) for column in located)


def unpack_located(specs: Sequence[LocatedSpec]) -> list[Written]:
    """Return where rows lie."""
    return [Written(spec.field, numbers(spec.places), numbers(spec.lengths)) for spec in specs]


_MAX_LENGTH = 1 << 40
"""Longer rows than any unit holds; with this bound sizes in bytes do not overflow."""
_PYTHON_TYPES = {kind.__name__: kind for kind in (int, float, bool, str, bytes)}


def pack_schema(schema: Schema) -> tuple[FieldSpec, ...]:
    """Make a message of a schema."""
    return tuple(
        FieldSpec(
            name,
            str(field.dtype) if isinstance(field.dtype, torch.dtype) else field.dtype.__name__,
            field.shape,
            field.allow_nan,
        )
        for name, field in schema.items()
    )


def unpack_schema(specs: Sequence[FieldSpec]) -> Schema:
    """Return the schema that a server has."""
    return Schema(
        {
            spec.name: Field(
                _PYTHON_TYPES[spec.dtype] if spec.dtype in _PYTHON_TYPES else getattr(torch, spec.dtype.split(".")[1]),
                spec.shape,
                spec.allow_nan,
            )
            for spec in specs
        }
    )


def pack_error(error: FlashRLError) -> Failed:
    """Make a message of an error."""
    return Failed(type(error).__name__, list(error.args))


def unpack_error(failed: Failed) -> FlashRLError:
    """Return the error that a server met. Only classes of :mod:`lightning_flashrl.errors` are made."""
    cls = getattr(errors, failed.name, None)
    if not (isinstance(cls, type) and issubclass(cls, FlashRLError)):
        return FlashRLError(f"{failed.name}{tuple(failed.args)}")
    return cls(*(tuple(value) if isinstance(value, list) else value for value in failed.args))
