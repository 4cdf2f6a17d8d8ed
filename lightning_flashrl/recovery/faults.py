"""Faults on purpose: who, when and how, as values and as one readable line.

``kill rank=1 step=33 phase=backward`` and ``stop rank=0 step=4`` are such lines; ``flashrun --chaos`` takes them.
"""

from __future__ import annotations

import ctypes
import enum
import os
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_flashrl import clock
from lightning_flashrl.errors import ConfigurationError
from lightning_flashrl.types import Phase, StepTag


class How(enum.Enum):
    """What happens to the process."""

    KILL = "kill"
    """SIGKILL, as from the kernel's out-of-memory killer or a lost container."""
    STOP = "stop"
    """SIGSTOP: the process exists and does nothing."""
    SEGFAULT = "segfault"
    EXIT = "exit"
    """``os._exit(1)``: gone without a word."""
    HANG = "hang"
    """The program waits forever, the interpreter runs."""
    GIL = "gil"
    """The program waits forever and keeps the interpreter's lock."""

    def strike(self) -> None:
        """Do it to this process."""
        if self is How.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif self is How.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self is How.SEGFAULT:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self is How.EXIT:
            os._exit(1)
        elif self is How.GIL:
            ctypes.PyDLL(None).sleep(100_000)
        while True:
            clock.sleep(1.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        rank: global rank that it strikes.
        at: optimizer updates committed before it, and the phase.
        how: what happens.
        count: which passage through that phase within the step, from 1 (e.g. the second validation batch).

    Raises:
        ConfigurationError: a number is below the one its counting begins with.
    """

    rank: int
    at: StepTag
    how: How = How.KILL
    count: int = 1

    def __post_init__(self) -> None:
        for name, value, first in (("rank", self.rank, 0), ("step", self.at.global_step, 0), ("count", self.count, 1)):
            if value < first:
                raise ConfigurationError(f"fault '{self}' never strikes: {name} is {value}; count from {first}")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read a line such as ``kill rank=1 step=33 phase=backward count=2``.

        Raises:
            ConfigurationError: it cannot be read.

        >>> Fault.parse("stop rank=2 step=4 phase=validation")
        Fault(rank=2, at=StepTag(global_step=4, phase=<Phase.VALIDATION: 10>), how=<How.STOP: 'stop'>, count=1)
        """
        words = text.split()
        usage = (
            "write '<how> rank=R step=S [phase=P] [count=N]' with how one of "
            f"{', '.join(how.value for how in How)} and phase one of {', '.join(p.name.lower() for p in Phase)}"
        )
        try:
            how = How(words[0].lower())
            settings = dict(word.split("=", 1) for word in words[1:])
            unknown = set(settings) - {"rank", "step", "phase", "count"}
            if unknown:
                raise ConfigurationError(f"fault {text!r}: unknown setting {sorted(unknown)[0]!r}; {usage}")
            phase = Phase[settings.get("phase", "forward").upper()]
            return cls(
                int(settings["rank"]), StepTag(int(settings["step"]), phase), how, int(settings.get("count", "1"))
            )
        except (KeyError, IndexError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"fault {text!r} cannot be read; {usage}") from error

    def __str__(self) -> str:
        count = f" count={self.count}" if self.count != 1 else ""
        return f"{self.how.value} rank={self.rank} step={self.at.global_step} phase={self.at.phase.name.lower()}{count}"


class FaultTrigger:
    """Decides in one process whether a fault strikes now. Pure.

    A fault strikes once, in whichever process of its rank comes to its place first: a replacement that does the step
    again is spared by what struck its predecessors. A fault whose place is never passed keeps none of the others back.

    Args:
        faults: of all ranks. Two that are equal strike two processes.
        rank: of this process.
        struck: faults that struck earlier processes of the rank, as they were written down before they did.
    """

    def __init__(self, faults: Iterable[Fault], rank: int, struck: Iterable[Fault] = ()) -> None:
        spent = Counter(struck)
        self._left: list[Fault] = []
        for fault in faults:
            if fault.rank != rank:
                continue
            if spent[fault] > 0:
                spent[fault] -= 1
            else:
                self._left.append(fault)
        self._passages: Counter[StepTag] = Counter()

    @property
    def is_armed(self) -> bool:
        """Whether a fault may still strike."""
        return bool(self._left)

    def at(self, tag: StepTag) -> Fault | None:
        """Return the fault that strikes at this passage, if any."""
        here = [fault for fault in self._left if fault.at == tag]
        if not here:
            return None
        self._passages[tag] += 1
        fault = next((fault for fault in here if fault.count == self._passages[tag]), None)
        if fault is not None:
            self._left.remove(fault)
        return fault
