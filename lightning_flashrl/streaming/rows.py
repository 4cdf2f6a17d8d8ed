"""What is known of each row, in arrays that grow and shrink with the rows they are about."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
_SHIFT = 12
PAGE = 1 << _SHIFT
"""Rows of consecutive number whose values live and go together."""
_IN_PAGE = PAGE - 1


class PagedArray:
    """One number, or a fixed number of them, per row, for rows whose numbers only grow.

    Pages are made when first written and dropped as a whole; what was never written reads as zero.

    Args:
        dtype: of the numbers.
        width: numbers per row; 0 for one without a dimension of its own.

    >>> ready = PagedArray(np.int64)
    >>> ready[np.array([3, 70_000])] = 5
    >>> ready[np.array([70_000, 4])].tolist(), ready.num_pages
    ([5, 0], 2)
    """

    def __init__(self, dtype: npt.DTypeLike, width: int = 0) -> None:
        self._dtype = np.dtype(dtype)
        self._inner = (width,) if width else ()
        self._pages: dict[int, npt.NDArray[Any]] = {}

    @property
    def num_pages(self) -> int:
        """How many pages exist."""
        return len(self._pages)

    def __getitem__(self, rows: Rows) -> npt.NDArray[Any]:
        number = _one_page(rows)
        if number is not None:
            page = self._pages.get(number)
            return np.zeros((len(rows), *self._inner), self._dtype) if page is None else page[rows & _IN_PAGE]
        values = np.zeros((len(rows), *self._inner), self._dtype)
        numbers = rows >> _SHIFT
        for number in np.unique(numbers).tolist():
            page = self._pages.get(number)
            if page is not None:
                chosen = numbers == number
                values[chosen] = page[rows[chosen] & _IN_PAGE]
        return values

    def __setitem__(self, rows: Rows, values: Any) -> None:
        number = _one_page(rows)
        if number is not None:
            self._page(number)[rows & _IN_PAGE] = values
            return
        values = np.broadcast_to(np.asarray(values, self._dtype), (len(rows), *self._inner))
        numbers = rows >> _SHIFT
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            self._page(number)[rows[chosen] & _IN_PAGE] = values[chosen]

    def _page(self, number: int) -> npt.NDArray[Any]:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = np.zeros((PAGE, *self._inner), self._dtype)
        return page

    def drop_page(self, number: int) -> None:
        """Give a page back; its rows read as zero from now on."""
        self._pages.pop(number, None)


class RowTable:
    """Several :class:`PagedArray` over the same rows, and the rows that exist.

    A page is given back when its last row is gone, so memory follows the rows that are there.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.next_row = 0
        self._exists = PagedArray(np.bool_)
        self._num_in_page: dict[int, int] = {}
        self._arrays: list[PagedArray] = []

    def column(self, dtype: npt.DTypeLike, width: int = 0) -> PagedArray:
        """Return a new array about the rows; zero where nothing was written."""
        array = PagedArray(dtype, width)
        self._arrays.append(array)
        return array

    def upcoming(self, count: int) -> Rows:
        """Return the numbers that :meth:`append` will give."""
        return np.arange(self.next_row, self.next_row + count, dtype=np.int64)

    def append(self, count: int) -> Rows:
        """Return the numbers of new rows."""
        rows = self.upcoming(count)
        self.restore(rows)
        return rows

    def restore(self, rows: Rows) -> None:
        """Let rows of these numbers exist, which do not."""
        self.next_row = max(self.next_row, int(rows.max(initial=-1)) + 1)
        self.num_rows += len(rows)
        self._exists[rows] = True
        for page, number in _count_pages(rows):
            self._num_in_page[page] = self._num_in_page.get(page, 0) + number

    def missing(self, rows: Rows) -> Rows:
        """Return those of the rows that do not exist."""
        absent: Rows = rows[~self._exists[rows]]
        return absent

    def remove(self, rows: Rows) -> None:
        """Forget rows that exist."""
        self._exists[rows] = False
        self.num_rows -= len(rows)
        for page, number in _count_pages(rows):
            self._num_in_page[page] -= number
            is_full = self.next_row >= (page + 1) * PAGE
            if not self._num_in_page[page] and is_full:
                del self._num_in_page[page]
                for array in (self._exists, *self._arrays):
                    array.drop_page(page)

    def all_rows(self) -> Rows:
        """Return every row that exists, ascending."""
        found = [np.zeros(0, np.int64)]
        for page in sorted(self._num_in_page):
            rows = np.arange(page * PAGE, (page + 1) * PAGE, dtype=np.int64)
            found.append(rows[self._exists[rows]])
        return np.concatenate(found)


def _one_page(rows: Rows) -> int | None:
    """Return the page in which all rows lie, if it is one."""
    if not len(rows):
        return None
    number = int(rows[0]) >> _SHIFT
    if len(rows) == 1 or (int(rows[-1]) >> _SHIFT == number and bool(((rows >> _SHIFT) == number).all())):
        return number
    return None


def _count_pages(rows: Rows) -> list[tuple[int, int]]:
    number = _one_page(rows)
    if number is not None:
        return [(number, len(rows))]
    pages, counts = np.unique(rows >> _SHIFT, return_counts=True)
    return list(zip(pages.tolist(), counts.tolist(), strict=True))
