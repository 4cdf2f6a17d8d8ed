"""What is known of each row, in arrays that grow and shrink with the rows they are about."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
PAGE = 4096
"""Rows of consecutive number whose values live and go together."""


class PagedArray:
    """One number per row, for rows whose numbers only grow. Pages are made when first written and dropped as a whole.

    >>> ready = PagedArray(np.uint64)
    >>> ready[np.array([3, 70_000])] = np.uint64(5)
    >>> ready[np.array([70_000, 4])].tolist(), ready.num_pages
    ([5, 0], 2)
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._pages: dict[int, npt.NDArray[Any]] = {}

    @property
    def num_pages(self) -> int:
        """How many pages exist."""
        return len(self._pages)

    def __getitem__(self, rows: Rows) -> npt.NDArray[Any]:
        numbers = rows >> 12
        if len(rows) and numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
            page = self._pages.get(int(numbers[0]))
            return np.zeros(len(rows), self._dtype) if page is None else page[rows & (PAGE - 1)]
        values = np.zeros(len(rows), self._dtype)
        for number in np.unique(numbers).tolist():
            page = self._pages.get(number)
            if page is not None:
                chosen = numbers == number
                values[chosen] = page[rows[chosen] & (PAGE - 1)]
        return values

    def __setitem__(self, rows: Rows, values: Any) -> None:
        numbers = rows >> 12
        if len(rows) and numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
            self._page(int(numbers[0]))[rows & (PAGE - 1)] = values
            return
        values = np.broadcast_to(np.asarray(values, self._dtype), rows.shape)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            self._page(number)[rows[chosen] & (PAGE - 1)] = values[chosen]

    def _page(self, number: int) -> npt.NDArray[Any]:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = np.zeros(PAGE, self._dtype)
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

    def column(self, dtype: npt.DTypeLike) -> PagedArray:
        """Return a new array about the rows; zero where nothing was written."""
        array = PagedArray(dtype)
        self._arrays.append(array)
        return array

    def append(self, count: int) -> Rows:
        """Return the numbers of new rows."""
        rows = np.arange(self.next_row, self.next_row + count, dtype=np.int64)
        self.next_row += count
        self.num_rows += count
        self._exists[rows] = True
        for page, number in _count_pages(rows):
            self._num_in_page[page] = self._num_in_page.get(page, 0) + number
        return rows

    def missing(self, rows: Rows) -> Rows:
        """Return those of the rows that do not exist."""
        absent: Rows = rows[(rows < 0) | ~self._exists[np.maximum(rows, 0)]]
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


def _count_pages(rows: Rows) -> list[tuple[int, int]]:
    numbers = rows >> 12
    if len(numbers) and (numbers == numbers[0]).all():
        return [(int(numbers[0]), len(numbers))]
    pages, counts = np.unique(numbers, return_counts=True)
    return list(zip(pages.tolist(), counts.tolist(), strict=True))
