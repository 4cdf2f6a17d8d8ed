"""The picture: drawn for every kind of run, with what matters in it."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_flashrl.report import Recovery, Step, draw_timeline

STEPS = [Step(step, 5.0 / step, 1000.0 + step) for step in range(1, 31)]


def recovery(at_s: float, *lost: int, is_complete: bool = True) -> Recovery:
    timings_ms = {"detect": 3.0, "report": 200.0, "rendezvous": 30.0, "transfer": 50.0, "total": 600.0}
    reasons = dict.fromkeys(lost, "killed by SIGKILL")
    return Recovery(1, lost, reasons, dict.fromkeys(lost, 0), "", timings_ms, is_complete, at_s)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *arguments: Any, **keywords: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def texts(figure: Figure) -> str:
    found = [text.get_text() for text in figure.texts]
    for ax in figure.axes:
        found += [text.get_text() for text in [*ax.texts, ax.xaxis.label, ax.yaxis.label, *ax.get_yticklabels()]]
        found.append(ax.get_title(loc="left"))
    return "\n".join(found)


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_recoveries_ranks_and_stages_are_in_the_picture(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "timeline.png"
    draw_timeline(
        path,
        STEPS,
        [recovery(1010.0, 1), recovery(1020.0, 2)],
        num_ranks=3,
        title="what",
        subtitle="more",
        reference=STEPS,
    )
    assert size(path)[0] == 1575
    [figure] = drawn
    loss, ranks, stages = figure.axes
    assert loss.get_xlim() == ranks.get_xlim()
    shown = texts(figure)
    for expected in ("what", "more", "rank 0", "rank 1 killed by SIGKILL\nback after 603 ms", "state from rank 0"):
        assert expected in shown
    assert "process 2" in shown
    assert [text.get_text() for text in stages.get_legend().get_texts()] == [
        "notice",
        "start",
        "connect",
        "set-up and state",
        "redo",
    ]


def test_a_run_without_faults_needs_no_bars(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(tmp_path / "timeline.png", STEPS, num_ranks=2)
    assert len(drawn[0].axes) == 2


def test_an_overtaken_recovery_is_marked_without_a_label(tmp_path: Path, drawn: list[Figure]) -> None:
    recoveries = [recovery(1010.0, 1, is_complete=False), recovery(1010.6, 1, 2)]
    draw_timeline(tmp_path / "timeline.png", STEPS, recoveries, num_ranks=3)
    shown = texts(drawn[0])
    assert shown.count("back after") == 1
    assert "rank 1, 2 killed" in shown


def test_labels_close_together_do_not_lie_on_each_other(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(tmp_path / "timeline.png", STEPS, [recovery(1010.0, 1), recovery(1011.0, 2)], num_ranks=3)
    figure = drawn[0]
    first, second = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not first.overlaps(second)


def test_a_label_near_the_end_stays_inside(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_timeline(tmp_path / "timeline.png", STEPS, [recovery(1029.9, 1)], num_ranks=2)
    figure = drawn[0]
    [label] = figure.axes[0].texts
    assert label.get_window_extent().x1 <= figure.bbox.x1


def test_many_recoveries_and_ranks_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    recoveries = [recovery(1002.0 + 2 * number, number % 16) for number in range(13)]
    draw_timeline(tmp_path / "timeline.png", STEPS, recoveries, num_ranks=16)
    assert size(tmp_path / "timeline.png")[1] > 1000
    assert "back after" not in texts(drawn[0])


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step to draw"):
        draw_timeline(tmp_path / "timeline.png", [], num_ranks=2)


def test_a_users_own_figures_are_left_alone(tmp_path: Path) -> None:
    draw_timeline(tmp_path / "timeline.png", STEPS[:1], num_ranks=1)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
