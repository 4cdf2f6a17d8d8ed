"""What the demo shows while a job runs: a live picture on a terminal, a line per event elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lightning_flashrl.report import Recovery, Step
from lightning_flashrl.report.records import STAGES

STAGE_STYLES = dict(zip(STAGES, ("red", "dark_orange", "yellow", "green", "blue"), strict=True))
_BAR_CELLS = 46
_NUM_EVENTS = 7
_QUIET_LINE_S = 10.0


class RankLine:
    """What is known of one rank."""

    def __init__(self) -> None:
        self.pid = 0
        self.incarnation = 0
        self.state = "starting"
        self.style = "dim"

    def set(self, state: str, style: str) -> None:
        """Change the state."""
        self.state, self.style = state, style


class View:
    """The display of one job. Draws when told to, from the caller's thread.

    Args:
        console: where to.
        heading: above everything.
        num_ranks: of the job.
        num_steps: of the job.
    """

    def __init__(self, console: Console, heading: str, num_ranks: int, num_steps: int) -> None:
        self.ranks = [RankLine() for _ in range(num_ranks)]
        self.recoveries: Sequence[Recovery] = ()
        self.note = ""
        self._console = console
        self._heading = heading
        self._num_steps = num_steps
        self._events: list[Text] = []
        self._steps: Sequence[Step] = ()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._next_line_s = 0.0

    def __enter__(self) -> View:
        if self._live is None:
            self._console.print(Text(self._heading, style="bold"))
        else:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add_event(self, at_s: float, text: str, style: str = "") -> None:
        """Show an event.

        Args:
            at_s: seconds since the job was started.
            text: what happened.
            style: rich style of the text.
        """
        if self._live is not None:
            text = text.partition(" [ms:")[0]  # a bar shows them
        line = Text.assemble((f"{at_s:6.1f} s  ", "dim"), (text, style))
        self._events.append(line)
        if self._live is None:
            self._console.print(line, soft_wrap=True)

    def update(self, at_s: float, steps: Sequence[Step]) -> None:
        """Draw anew.

        Args:
            at_s: seconds since the job was started.
            steps: done so far.
        """
        self._steps = steps
        if self._live is not None:
            self._live.update(self._draw(at_s), refresh=True)
        elif steps and at_s >= self._next_line_s:
            self._next_line_s = at_s + _QUIET_LINE_S
            self._console.print(Text(f"{at_s:6.1f} s  {self._progress_text()}", style="dim"), soft_wrap=True)

    # ------------------------------------------------------------------ parts
    def _progress_text(self) -> str:
        if not self._steps:
            return "starting: the ranks import torch and Lightning"
        last = self._steps[-1]
        text = f"step {last.step}/{self._num_steps}  loss {last.loss:.3f}"
        recent = self._steps[-21:]
        if len(recent) > 1 and recent[-1].wall_s > recent[0].wall_s:
            text += f"  {(len(recent) - 1) / (recent[-1].wall_s - recent[0].wall_s):.1f} steps/s"
        return f"{text}  {self.note}" if self.note else text

    def _draw(self, at_s: float) -> RenderableType:
        parts: list[RenderableType] = [Text(self._heading, style="bold"), Text()]
        bar = Table.grid(padding=(0, 2))
        done = self._steps[-1].step if self._steps else 0
        bar.add_row(
            ProgressBar(total=self._num_steps, completed=done, width=40), self._progress_text(), f"{at_s:.0f} s"
        )
        parts += [bar, Text(), self._draw_ranks()]
        if self.recoveries:
            parts += [Text(), draw_stages(self.recoveries)]
        parts += [Text(), *self._events[-_NUM_EVENTS:]]
        return Group(*parts)

    def _draw_ranks(self) -> Table:
        table = Table.grid(padding=(0, 3))
        for rank, line in enumerate(self.ranks):
            process = f"process {line.incarnation + 1} of this rank, pid {line.pid}" if line.pid else ""
            table.add_row(f"rank {rank}", Text(f"● {line.state}", style=line.style), Text(process, style="dim"))
        return table


def draw_stages(recoveries: Sequence[Recovery]) -> Table:
    """One bar per recovery: who, from whom, and where the milliseconds went."""
    shown = [recovery for recovery in recoveries if recovery.is_complete]
    longest_ms = max((recovery.duration_ms for recovery in shown), default=1.0)
    table = Table.grid(padding=(0, 2))
    for recovery in shown:
        stages = recovery.stages_ms()
        bar = Text()
        for stage, duration_ms in stages.items():
            bar.append("█" * round(_BAR_CELLS * duration_ms / longest_ms), style=STAGE_STYLES[stage])
        who = "rank " + ", ".join(map(str, recovery.lost))
        donors = ", ".join(map(str, sorted(set(recovery.donors.values()))))
        table.add_row(
            Text(f"{who} {recovery.cause}"),
            Text(f"{recovery.duration_ms:.0f} ms", style="bold"),
            Text(f"state of rank {donors}" if donors else "no state needed"),
            bar,
        )
    legend = Text()
    for stage in STAGES:
        legend.append("█ ", style=STAGE_STYLES[stage])
        legend.append(f"{stage}   ", style="dim")
    table.add_row("", "", "", legend)
    return table
