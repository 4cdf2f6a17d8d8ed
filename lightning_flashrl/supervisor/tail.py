"""Shows what ranks write to their log files on the terminal, line by line, each line with its rank."""

from __future__ import annotations

import os
from collections.abc import Callable

_CHUNK_BYTES = 1 << 18


class LogTail:
    """Reads what was added to a file since the last time.

    Args:
        path: the file; it need not exist yet.
        prefix: put before each line.
        show: takes a block of whole lines.
    """

    def __init__(self, path: str, prefix: str, show: Callable[[str], None]) -> None:
        self._path = path
        self._prefix = prefix
        self._show = show
        self._fd = -1
        self._rest = b""

    def pump(self) -> None:
        """Show all complete new lines."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDONLY)
            except FileNotFoundError:
                return
        while data := os.read(self._fd, _CHUNK_BYTES):
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                self._show("".join(f"{self._prefix}{line.decode(errors='replace')}\n" for line in lines))

    def close(self) -> None:
        """Show what is left, also an incomplete last line."""
        self.pump()
        if self._rest:
            self._show(f"{self._prefix}{self._rest.decode(errors='replace')}\n")
            self._rest = b""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
