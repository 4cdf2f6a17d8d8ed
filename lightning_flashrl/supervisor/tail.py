"""Shows what ranks write to their log files on the terminal, line by line, each line with its rank."""

from __future__ import annotations

import os
from collections.abc import Callable

from lightning_flashrl.recovery.slot import RankSlot, Word

_CHUNK_BYTES = 1 << 18


class LogTail:
    """Reads what was added to a file since the last time.

    Args:
        path: the file; it need not exist yet.
        prefix: put before each line.
        show: takes a block of whole lines.
        slot: where is kept how much was shown, for an agent that goes on with it.
    """

    def __init__(self, path: str, prefix: str, show: Callable[[str], None], slot: RankSlot) -> None:
        self._path = path
        self._prefix = prefix
        self._show = show
        self._slot = slot
        self._fd = -1
        self._rest = b""

    def pump(self) -> None:
        """Show all complete new lines."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDONLY)
                os.lseek(self._fd, self._slot[Word.LOG_SHOWN], os.SEEK_SET)
            except FileNotFoundError:
                return
        while data := os.read(self._fd, _CHUNK_BYTES):
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                self._show("".join(f"{self._prefix}{line.decode(errors='replace')}\n" for line in lines))
                self._slot[Word.LOG_SHOWN] += sum(map(len, lines)) + len(lines)

    def close(self) -> None:
        """Show what is left, also an incomplete last line."""
        self.pump()
        if self._rest:
            self._show(f"{self._prefix}{self._rest.decode(errors='replace')}\n")
            self._slot[Word.LOG_SHOWN] += len(self._rest)
            self._rest = b""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
