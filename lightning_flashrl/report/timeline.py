"""Draws a run: loss over time with the recoveries marked, the life of each rank, the stages of each recovery.

Uses matplotlib's Agg canvas directly: no window, no global state, safe beside a user's own figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_flashrl.report.records import STAGES, Recovery, Step, absences

_INK = "#22303c"
_FAINT = "#74818d"
_GRID = "#e6eaee"
_LOSS = "#1769aa"
_FAULT = "#c62828"
_RANKS = ("#3d7ea6", "#4f9272", "#8672bd", "#b97f3f", "#5f8596", "#99678a", "#75904a", "#90705b")
_STAGE_COLORS = ("#c62828", "#ef9a3d", "#f2cf5b", "#7fb77e", "#3d7ea6")
_MAX_BARS = 8

_WIDTH, _LEFT, _RIGHT = 10.5, 0.85, 0.25  # inches, as all lengths of the layout
_TOP, _BOTTOM, _LOSS_HEIGHT, _ROW_HEIGHT = 0.95, 0.55, 3.1, 0.4
_GAPS = (0.5, 0.95)
"""Below the loss, below the ranks."""


def draw_timeline(
    path: Path,
    steps: Sequence[Step],
    recoveries: Sequence[Recovery] = (),
    *,
    num_ranks: int,
    title: str = "",
    subtitle: str = "",
    reference: Sequence[Step] = (),
) -> None:
    """Write a PNG.

    Args:
        path: of the picture.
        steps: of the run.
        recoveries: of the run.
        num_ranks: of the job; each gets a lane.
        title: above the picture.
        subtitle: one more line, in small print.
        reference: steps of a run without faults, drawn from the same start.

    Raises:
        ValueError: there is no step to draw.
    """
    if not steps:
        raise ValueError("there is no step to draw; does the metrics file belong to a run that trained?")
    shown = [recovery for recovery in recoveries if recovery.is_complete][-_MAX_BARS:]
    heights = [_LOSS_HEIGHT, _ROW_HEIGHT * num_ranks, *([_ROW_HEIGHT * len(shown)] if shown else [])]
    gaps = _GAPS[: len(heights) - 1]
    height = _TOP + sum(heights) + sum(gaps) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(_LEFT / _WIDTH, 1 - 0.2 / height, title, va="top", fontsize=13, fontweight="bold", color=_INK)
    figure.text(_LEFT / _WIDTH, 1 - 0.5 / height, subtitle, va="top", fontsize=9.5, color=_FAINT)
    axes: list[Axes] = []
    top = height - _TOP
    for own, gap in zip(heights, [*gaps, 0.0], strict=True):
        top -= own
        place = (_LEFT / _WIDTH, top / height, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, own / height)
        axes.append(figure.add_axes(place))
        top -= gap
    zero_s = steps[0].wall_s
    end_s = max([steps[-1].wall_s, *(recovery.wall_s for recovery in recoveries)])
    _draw_loss(axes[0], steps, recoveries, reference, zero_s)
    _draw_ranks(axes[1], recoveries, num_ranks, zero_s, end_s)
    longest_s = max(end_s - zero_s, reference[-1].wall_s - reference[0].wall_s if reference else 0.0, 1e-3)
    for ax in axes[:2]:
        ax.set_xlim(0, longest_s * 1.005)
    if shown:
        _draw_stages(axes[2], shown)
    figure.savefig(path)


def _prepare(ax: Axes, heading: str) -> None:
    ax.set_title(heading, loc="left", fontsize=9.5, color=_FAINT, pad=7)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(_FAINT)
    ax.tick_params(colors=_FAINT, labelsize=8.5, length=0)
    ax.set_axisbelow(True)
    ax.set_facecolor("white")


def _draw_loss(
    ax: Axes, steps: Sequence[Step], recoveries: Sequence[Recovery], reference: Sequence[Step], zero_s: float
) -> None:
    _prepare(ax, "")
    ax.grid(axis="y", color=_GRID)
    if reference:
        began_s = reference[0].wall_s
        ax.plot(
            [step.wall_s - began_s for step in reference],
            [step.loss for step in reference],
            color=_FAINT,
            linewidth=1.0,
            alpha=0.75,
            label="left alone",
        )
    ax.plot(
        [step.wall_s - zero_s for step in steps],
        [step.loss for step in steps],
        color=_LOSS,
        linewidth=1.4,
        label="with faults",
    )
    highest = max(step.loss for step in [*steps, *reference])
    lowest = min(step.loss for step in [*steps, *reference])
    room = max(highest - lowest, 1e-6)
    ax.set_ylim(lowest - 0.05 * room, highest + 0.28 * room)
    for recovery in recoveries:
        ax.axvspan(recovery.began_s - zero_s, recovery.wall_s - zero_s, color=_FAULT, alpha=0.16, linewidth=0)
        ax.axvline(recovery.began_s - zero_s, color=_FAULT, linewidth=1.0)
    _label_recoveries(ax, [recovery for recovery in recoveries if recovery.is_complete], zero_s, steps[-1].wall_s)
    if reference:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8, labelcolor=_INK)
    ax.set_ylabel("loss", fontsize=9, color=_INK)
    ax.set_xticklabels([])


def _label_recoveries(ax: Axes, recoveries: Sequence[Recovery], zero_s: float, end_s: float) -> None:
    """Write who and how long beside each mark: lower where the label before is close, shorter when there are many."""
    width_s = max(end_s - zero_s, 1e-3)
    level, free_s = 0, zero_s
    for recovery in recoveries:
        text = "rank " + ", ".join(map(str, recovery.lost))
        if len(recoveries) <= _MAX_BARS:
            text += f" {recovery.cause}\nback after {_duration(recovery.duration_ms)}"
        is_late = recovery.began_s > zero_s + 0.83 * width_s
        level = (level + 1) % 3 if recovery.began_s < free_s else 0
        free_s = recovery.began_s + (0.0 if is_late else 0.02 * max(map(len, text.splitlines())) / 2.4 * width_s)
        ax.annotate(
            text,
            xy=(recovery.began_s - zero_s, 0.985 - 0.12 * level),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if is_late else 5, 0),
            textcoords="offset points",
            ha="right" if is_late else "left",
            va="top",
            fontsize=8.5,
            color=_FAULT,
            linespacing=1.35,
        )


def _draw_ranks(ax: Axes, recoveries: Sequence[Recovery], num_ranks: int, zero_s: float, end_s: float) -> None:
    _prepare(ax, "processes of each rank")
    for rank in range(num_ranks):
        color = _RANKS[rank % len(_RANKS)]
        began_s = zero_s
        gaps = absences(recoveries, rank)
        for number, (lost_s, back_s) in enumerate([*gaps, (end_s, end_s)]):
            ax.barh(
                rank,
                lost_s - began_s,
                left=began_s - zero_s,
                height=0.52,
                color=color,
                alpha=0.9 if number % 2 == 0 else 0.72,
            )
            if gaps and lost_s - began_s > 0.07 * (end_s - zero_s):
                ax.text(
                    (began_s + lost_s) / 2 - zero_s,
                    rank,
                    f"process {number + 1}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white",
                )
            began_s = back_s
        for lost_s, back_s in gaps:
            ax.barh(rank, back_s - lost_s, left=lost_s - zero_s, height=0.52, color=_FAULT, alpha=0.16)
            ax.plot(lost_s - zero_s, rank, marker="x", color=_FAULT, markersize=6, markeredgewidth=1.8)
    ax.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)], color=_INK)
    ax.set_ylim(num_ranks - 0.5, -0.5)
    ax.set_xlabel("seconds since the first step", fontsize=9, color=_INK)


def _draw_stages(ax: Axes, recoveries: Sequence[Recovery]) -> None:
    _prepare(ax, "where the milliseconds of each recovery went")
    longest = max(recovery.duration_ms for recovery in recoveries)
    for row, recovery in enumerate(recoveries):
        left = 0.0
        for stage, color in zip(STAGES, _STAGE_COLORS, strict=True):
            duration_ms = recovery.stages_ms()[stage]
            ax.barh(row, duration_ms, left=left, height=0.52, color=color, label=stage if row == 0 else None)
            if duration_ms > 0.045 * longest:
                ink = "white" if stage in (STAGES[0], STAGES[-1]) else _INK
                ax.text(
                    left + duration_ms / 2, row, f"{duration_ms:.0f}", ha="center", va="center", fontsize=7.5, color=ink
                )
            left += duration_ms
        donors = ", ".join(f"state from rank {donor}" for donor in sorted(set(recovery.donors.values())))
        ax.text(left + 0.008 * longest, row, donors, va="center", fontsize=7.5, color=_FAINT)
    ax.set_yticks(
        range(len(recoveries)), ["rank " + ", ".join(map(str, found.lost)) for found in recoveries], color=_INK
    )
    ax.set_ylim(len(recoveries) - 0.5, -0.5)
    ax.set_xlim(0, longest * 1.16)
    ax.set_xlabel("ms", fontsize=9, color=_INK)
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(STAGES),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        handlelength=1.0,
    )


def _duration(duration_ms: float) -> str:
    """Readable at a glance.

    >>> _duration(766.2), _duration(1349.0)
    ('766 ms', '1.3 s')
    """
    return f"{duration_ms:.0f} ms" if duration_ms < 1000 else f"{duration_ms / 1000:.1f} s"
