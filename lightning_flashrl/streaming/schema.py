"""What a row is: named fields with dtype and shape, how they are checked on the way in and look on the way out.

Inside the queue every field is bytes: the values of all rows one after the other, and a length per row where the first
dimension varies. Nothing is padded, and nothing but the schema says what the bytes mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_flashrl.errors import ConfigurationError, SchemaMismatchError, UnknownFieldError

MAX_FIELDS = 62
"""A row's readiness is one 64-bit word."""
Scalar: TypeAlias = "int | float | bool | str | bytes"
Lengths: TypeAlias = npt.NDArray[np.int64]
_STORED_AS: dict[type, torch.dtype] = {
    int: torch.int64,
    float: torch.float64,
    bool: torch.bool,
    str: torch.uint8,
    bytes: torch.uint8,
}
_SEEN_AS: dict[torch.dtype | type, npt.DTypeLike] = {int: np.int64, float: np.float64, bool: np.bool_}


@dataclass(frozen=True, slots=True)
class Field:
    """One column: what each row holds under a name.

    Attributes:
        dtype: a torch dtype, or one of ``int``, ``float``, ``bool``, ``str``, ``bytes`` for a Python scalar per row.
        shape: of one row. ``None`` as the first dimension says that it differs from row to row.
        allow_nan: whether NaN is data. If not, a write that contains one is refused.

    Raises:
        ConfigurationError: the dtype is none of these, or the shape cannot be stored.

    >>> Field(torch.int64, (None,)).is_ragged, Field(torch.float32).is_ragged
    (True, False)
    """

    dtype: torch.dtype | type
    shape: tuple[int | None, ...] = ()
    allow_nan: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) and self.dtype not in _STORED_AS:
            raise ConfigurationError(
                f"Field(dtype={self.dtype!r}) cannot be stored; use a torch dtype or int, float, bool, str or bytes"
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.is_python and self.shape:
            raise ConfigurationError(
                f"Field({self.dtype.__name__}, shape={self.shape}): a Python scalar has no shape; use a torch dtype"  # type: ignore[union-attr]
            )
        for position, size in enumerate(self.shape):
            if size is None and position > 0:
                raise ConfigurationError(
                    f"Field(shape={self.shape}): only the first dimension may vary (None); move it to the front"
                )
            if size is not None and (type(size) is not int or size < 0):
                raise ConfigurationError(f"Field(shape={self.shape}): sizes are numbers from 0 on, or None in front")

    @property
    def is_python(self) -> bool:
        """Whether each row holds a Python scalar."""
        return not isinstance(self.dtype, torch.dtype)

    @property
    def is_tag(self) -> bool:
        """Whether a sampler may look at it: one number per row."""
        return self.dtype in _SEEN_AS

    @property
    def tag_dtype(self) -> npt.DTypeLike:
        """The dtype in which samplers see it; only for tags."""
        return _SEEN_AS[self.dtype]

    @property
    def is_ragged(self) -> bool:
        """Whether rows may differ in length."""
        return self.dtype in (str, bytes) or (bool(self.shape) and self.shape[0] is None)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else _STORED_AS[self.dtype]

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Shape of one entry of a ragged row, or of a whole row of fixed shape."""
        return tuple(size for size in self.shape if size is not None)

    @property
    def entry_bytes(self) -> int:
        """Size of one entry of a ragged row, or of a whole row of fixed shape."""
        return math.prod(self.inner_shape) * self.stored_dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rows of different lengths: values one after the other, and how many belong to each row.

    Attributes:
        values: ``[total, ...]``, the rows' entries.
        lengths: ``[N]`` int64, entries of each row; they sum to ``total``.

    >>> rows = Ragged.of([torch.tensor([1, 2, 3]), torch.tensor([4])])
    >>> len(rows), rows[1], rows.padded(0)
    (2, tensor([4]), tensor([[1, 2, 3],
                             [4, 0, 0]]))
    """

    values: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> Ragged:
        """Concatenate tensors ``[n_i, ...]`` of one dtype."""
        return cls(torch.cat(list(rows)), torch.tensor([len(row) for row in rows], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        return self.unbind()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind())

    def unbind(self) -> tuple[Tensor, ...]:
        """Return each row as a view of ``values``."""
        return torch.split(self.values, self.lengths.tolist())

    @property
    def offsets(self) -> Tensor:
        """``[N + 1]`` int64: where each row begins in ``values``, and the end."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))

    def padded(self, value: float) -> Tensor:
        """Return ``[N, longest, ...]``, shorter rows filled up at the end."""
        return torch.nn.utils.rnn.pad_sequence(list(self.unbind()), batch_first=True, padding_value=value)

    def mask(self) -> Tensor:
        """Return ``[N, longest]`` bool: where :meth:`padded` holds data."""
        longest = int(self.lengths.max()) if len(self) else 0
        return torch.arange(longest) < self.lengths[:, None]

    def to(self, device: torch.device | str) -> Ragged:
        """Return the same rows on another device."""
        return Ragged(self.values.to(device), self.lengths.to(device))


ColumnData: TypeAlias = "Tensor | Ragged | list[Any]"
"""A column of a batch: ``[N, ...]``, ragged rows, or a list of Python scalars."""


class Batch(Mapping[str, Any]):
    """The columns of some rows, by field name; a dot in a name is a level of nesting.

    >>> batch = Batch({"response.tokens": torch.arange(3), "reward": torch.ones(3)})
    >>> sorted(batch), sorted(batch["response"]), batch["response.tokens"]
    (['response', 'reward'], ['tokens'], tensor([0, 1, 2]))
    """

    def __init__(self, columns: Mapping[str, ColumnData]) -> None:
        self.columns = dict(columns)

    def __getitem__(self, name: str) -> Any:
        if name in self.columns:
            return self.columns[name]
        below = {key[len(name) + 1 :]: column for key, column in self.columns.items() if key.startswith(f"{name}.")}
        if not below:
            raise KeyError(name)
        return Batch(below)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.split(".", 1)[0] for key in self.columns))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"Batch({', '.join(self.columns)})"


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A checked column on its way into the queue.

    Attributes:
        field: its name.
        parts: CPU tensors of one dtype whose concatenation along the first dimension is the column's values.
        lengths: ``[N]`` entries of each row; all 1 for rows of fixed shape.
        entry_bytes: size of one entry.
        tags: ``[N]`` the values, where a sampler may look at them.
    """

    field: str
    parts: list[Tensor]
    lengths: Lengths
    entry_bytes: int
    tags: npt.NDArray[Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all values."""
        return int(self.lengths.sum()) * self.entry_bytes


class Schema(Mapping[str, Field]):
    """The fields of a queue's rows.

    Args:
        fields: a :class:`Field` by name, or a mapping of such for nested fields.

    Raises:
        ConfigurationError: no fields, too many, or a name that cannot be one.

    >>> schema = Schema({"response": {"tokens": Field(torch.int64, (None,))}, "reward": Field(float)})
    >>> list(schema), schema.select(["response"])
    (['response.tokens', 'reward'], ('response.tokens',))
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields: dict[str, Field] = dict(_flat(fields, ""))
        if not self._fields or len(self._fields) > MAX_FIELDS:
            raise ConfigurationError(f"a schema of {len(self._fields)} fields; use 1 to {MAX_FIELDS}")
        for name in self._fields:
            if any(other.startswith(f"{name}.") for other in self._fields):
                raise ConfigurationError(f"field {name!r} is both a value and a level of nesting; rename one of them")
        self._bits = {name: 1 << index for index, name in enumerate(self._fields)}

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and list(self._fields.items()) == list(other._fields.items())

    def __hash__(self) -> int:
        return hash(tuple(self._fields.items()))

    def __repr__(self) -> str:
        return f"Schema({self._fields!r})"

    def select(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the full names of fields, in the schema's order. A level of nesting stands for all below it.

        Raises:
            UnknownFieldError: a name is neither.
        """
        if isinstance(names, str):
            names = (names,)
        chosen: set[str] = set()
        for name in names:
            below = [key for key in self._fields if key == name or key.startswith(f"{name}.")]
            if not below:
                raise UnknownFieldError(name, tuple(self._fields))
            chosen.update(below)
        return tuple(name for name in self._fields if name in chosen)

    def bits(self, names: Iterable[str]) -> int:
        """Return the mask of fields in a row's readiness word."""
        mask = 0
        for name in names:
            mask |= self._bits[name]
        return mask

    def names(self, bits: int) -> tuple[str, ...]:
        """Return the fields in a mask."""
        return tuple(name for name, bit in self._bits.items() if bits & bit)

    # ------------------------------------------------------------------ in
    def check(self, data: Mapping[str, Any], num_rows: int | None = None) -> list[Column]:
        """Check columns before they are stored.

        Args:
            data: column by field name, nested or with dots: a tensor ``[N, ...]``, an array, a sequence with one
                entry per row, a :class:`Ragged` or a jagged nested tensor.
            num_rows: how many rows they must have; ``None`` takes it from the first.

        Returns:
            The columns, none of them copied that did not have to be.

        Raises:
            UnknownFieldError: a name that the schema does not have.
            SchemaMismatchError: dtype, shape or length do not fit, or NaN where it is forbidden.
        """
        flat = dict(_flat_data(data, "", self._fields))
        if not flat:
            raise SchemaMismatchError("", "no fields were given", f"write one or more of {', '.join(self._fields)}")
        columns = []
        for name, values in flat.items():
            column = _check_column(name, self._fields[name], values)
            if num_rows is None:
                num_rows = len(column.lengths)
            if len(column.lengths) != num_rows:
                raise SchemaMismatchError(
                    name, f"has {len(column.lengths)} row(s), the call has {num_rows}", "give one entry per row"
                )
            columns.append(column)
        return columns

    def refuse_nan(self, name: str, values: Tensor) -> None:
        """Look for NaN in the stored values of a field that forbids it.

        Args:
            name: of the field.
            values: of its stored dtype, any shape.

        Raises:
            SchemaMismatchError: there is one.
        """
        if self._fields[name].allow_nan or not values.is_floating_point():
            return
        wide = values if values.dtype.itemsize > 1 else values.float()
        # A sum is NaN if a value is, or if infinities of both signs meet: then the values are looked at.
        if math.isnan(wide.sum().item()) and bool(wide.isnan().any()):
            raise SchemaMismatchError(
                name,
                f"{int(wide.isnan().sum())} of {wide.numel()} values are NaN",
                "find where they come from, or set Field(allow_nan=True)",
            )

    # ------------------------------------------------------------------ out
    def restore(self, name: str, values: Tensor, lengths: Lengths) -> ColumnData:
        """Give bytes their meaning again.

        Args:
            name: of the field.
            values: ``[num_bytes]`` uint8, aligned; becomes the column's memory.
            lengths: ``[N]`` entries of each row.
        """
        field = self._fields[name]
        if field.dtype is str or field.dtype is bytes:
            raw = values.numpy().tobytes()
            ends = np.cumsum(lengths).tolist()
            rows = [raw[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
            return [row.decode("utf-8", "surrogatepass") for row in rows] if field.dtype is str else rows
        typed = values.view(field.stored_dtype)
        if field.is_python:
            return list(typed.tolist())
        if not field.is_ragged:
            return typed.view(len(lengths), *field.inner_shape)
        return Ragged(typed.view(int(lengths.sum()), *field.inner_shape), torch.from_numpy(lengths))


def _flat(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Field]]:
    for name, field in fields.items():
        if type(name) is not str or any(not part for part in name.split(".")):
            raise ConfigurationError(f"field name {name!r}; use a text without empty parts between its dots")
        if isinstance(field, Field):
            yield prefix + name, field
        elif isinstance(field, Mapping):
            yield from _flat(field, f"{prefix}{name}.")
        else:
            raise ConfigurationError(f"field {prefix + name!r} is {field!r}; give a Field or a mapping of fields")


def _flat_data(data: Mapping[str, Any], prefix: str, fields: Mapping[str, Field]) -> Iterator[tuple[str, Any]]:
    for name, values in data.items():
        full = f"{prefix}{name}"
        if full in fields:
            yield full, values
        elif isinstance(values, Mapping) and any(key.startswith(f"{full}.") for key in fields):
            yield from _flat_data(values, f"{full}.", fields)
        else:
            raise UnknownFieldError(full, tuple(fields))


def _check_column(name: str, field: Field, values: Any) -> Column:
    if field.is_python:
        column = _check_scalars(name, field, values)
    elif field.is_ragged:
        column = _check_ragged(name, field, values)
    else:
        column = _check_fixed(name, field, values)
    return column


def _check_scalars(name: str, field: Field, values: Any) -> Column:
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not _is_list(values):
        raise SchemaMismatchError(
            name,
            f"is a {type(values).__name__}",
            f"give a list with one {field.dtype.__name__} per row",  # type: ignore[union-attr]
        )
    accepted = (int, float) if field.dtype is float else field.dtype
    for index, value in enumerate(values):
        if not isinstance(value, accepted) or (isinstance(value, bool) and field.dtype is not bool):  # type: ignore[arg-type]
            raise SchemaMismatchError(
                name,
                f"row {index} is {value!r} of type {type(value).__name__}",
                f"the schema says {field.dtype.__name__}",  # type: ignore[union-attr]
            )
    if field.dtype is str or field.dtype is bytes:
        rows = [value.encode("utf-8", "surrogatepass") for value in values] if field.dtype is str else values
        joined = np.frombuffer(b"".join(rows), dtype=np.uint8)
        parts = [torch.from_numpy(joined.copy())] if len(joined) else []
        return Column(name, parts, np.array([len(row) for row in rows], dtype=np.int64), 1)
    try:
        tensor = torch.tensor(list(values), dtype=field.stored_dtype)
    except (OverflowError, ValueError, RuntimeError) as error:
        raise SchemaMismatchError(name, f"a value does not fit ({error})", "use whole numbers of 64 bits") from error
    return Column(name, [tensor], np.ones(len(values), dtype=np.int64), field.entry_bytes, tensor.numpy())


def _check_fixed(name: str, field: Field, values: Any) -> Column:
    if isinstance(values, Ragged):
        raise SchemaMismatchError(name, "is ragged", f"its rows all have the shape {list(field.shape)}")
    if isinstance(values, (Tensor, np.ndarray)) or not _is_rows_of_tensors(values):
        tensor = _as_tensor(name, field, values)
        if tensor.dim() == 0 or tuple(tensor.shape[1:]) != field.shape:
            raise SchemaMismatchError(
                name, f"has the shape {list(tensor.shape)}", f"the schema says [rows, {_joined(field.shape)}]"
            )
        return Column(name, [tensor], np.ones(len(tensor), dtype=np.int64), field.entry_bytes)
    rows = []
    for index, row in enumerate(values):
        tensor = _as_tensor(name, field, row)
        if tuple(tensor.shape) != field.shape:
            raise SchemaMismatchError(
                name, f"row {index} has the shape {list(tensor.shape)}", f"the schema says {list(field.shape)}"
            )
        rows.append(tensor.unsqueeze(0))
    return Column(name, rows, np.ones(len(rows), dtype=np.int64), field.entry_bytes)


def _check_ragged(name: str, field: Field, values: Any) -> Column:
    if isinstance(values, Tensor) and values.is_nested:
        values = Ragged(values.values(), values.offsets().diff())  # type: ignore[attr-defined]
    if isinstance(values, Ragged):
        return _check_values_and_lengths(name, field, values)
    inner = field.inner_shape
    if isinstance(values, (Tensor, np.ndarray)):
        tensor = _as_tensor(name, field, values)
        if tensor.dim() != 2 + len(inner) or tuple(tensor.shape[2:]) != inner:
            raise SchemaMismatchError(
                name, f"has the shape {list(tensor.shape)}", f"the schema says [rows, length, {_joined(inner)}]"
            )
        lengths = np.full(tensor.shape[0], tensor.shape[1], dtype=np.int64)
        return Column(name, [tensor.flatten(0, 1)], lengths, field.entry_bytes)
    if not _is_list(values):
        raise SchemaMismatchError(name, f"is a {type(values).__name__}", "give a list with one tensor per row")
    expected = field.stored_dtype
    rows = [
        row if type(row) is Tensor and row.dtype is expected and row.is_cpu else _as_tensor(name, field, row)
        for row in values
    ]
    shapes = [row.shape for row in rows]
    for index, shape in enumerate(shapes):
        if not shape or shape[1:] != inner:
            raise SchemaMismatchError(
                name, f"row {index} has the shape {list(shape)}", f"the schema says [length, {_joined(inner)}]"
            )
    return Column(name, rows, np.array([shape[0] for shape in shapes], dtype=np.int64), field.entry_bytes)


def _check_values_and_lengths(name: str, field: Field, ragged: Ragged) -> Column:
    values = _as_tensor(name, field, ragged.values)
    lengths = ragged.lengths.detach().cpu()
    if lengths.dim() != 1 or lengths.dtype.is_floating_point or (len(lengths) and int(lengths.min()) < 0):
        raise SchemaMismatchError(
            name, f"lengths are {list(lengths.shape)} of {lengths.dtype}", "give one whole number from 0 on per row"
        )
    if values.dim() != 1 + len(field.inner_shape) or tuple(values.shape[1:]) != field.inner_shape:
        raise SchemaMismatchError(
            name,
            f"values have the shape {list(values.shape)}",
            f"the schema says [total, {_joined(field.inner_shape)}]",
        )
    if int(lengths.sum()) != len(values):
        raise SchemaMismatchError(
            name, f"lengths sum to {int(lengths.sum())}, there are {len(values)} values", "make them equal"
        )
    return Column(name, [values], lengths.to(torch.int64, copy=True).numpy(), field.entry_bytes)


def _as_tensor(name: str, field: Field, value: Any) -> Tensor:
    """Return a CPU tensor of the field's dtype. Tensors and arrays must have it, lists of numbers are converted."""
    expected = field.stored_dtype
    tensor: Tensor
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(value if value.flags.writeable else value.copy())
        except TypeError as error:
            raise SchemaMismatchError(name, f"is an array of {value.dtype}", f"the schema says {expected}") from error
    if isinstance(value, Tensor):
        if value.dtype != expected:
            raise SchemaMismatchError(
                name, f"is {value.dtype}", f"the schema says {expected}; convert with .to({expected})"
            )
        tensor = value.detach() if value.requires_grad else value
        return tensor if tensor.is_cpu else tensor.cpu()
    try:
        natural: Tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SchemaMismatchError(
            name, f"is no tensor ({error})", "give tensors, arrays or lists of numbers"
        ) from error
    if expected in (torch.float64, torch.complex128) and (natural.is_floating_point() or natural.is_complex()):
        natural = torch.as_tensor(value, dtype=expected)  # torch's default would have rounded them
    if natural.numel() == 0 or torch.can_cast(natural.dtype, expected):
        converted: Tensor = natural.to(expected)
        if natural.is_floating_point() or converted.is_floating_point() or converted.equal(natural):
            return converted
    raise SchemaMismatchError(name, f"holds {natural.dtype} numbers", f"the schema says {expected}")


def _is_list(values: object) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes))


def _is_rows_of_tensors(values: Any) -> bool:
    return isinstance(values, Sequence) and any(isinstance(row, (Tensor, np.ndarray)) for row in values)


def _joined(shape: Sequence[int | None]) -> str:
    return ", ".join(map(str, shape)) or "nothing more"
