"""A run's picture as one HTML file that opens without a network."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_flashrl.asyncrl.history import read_history, read_kills

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c1c28; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; text-align: right; } td.what { color: #666; }
svg { max-width: 100%; height: auto; }
"""
_Plot = tuple[str, str, Sequence[tuple[str, str]]]
_PLOTS: Sequence[_Plot] = (
    ("Reward of trained rows", "reward", [("reward", "reward")]),
    (
        "Staleness of trained rows",
        "policy versions",
        [
            ("staleness/max", "oldest row"),
            ("staleness/oldest", "mean of oldest tokens"),
            ("staleness/newest", "newest"),
        ],
    ),
    ("Idle shares", "share", [("idle_share/trainer", "trainer"), ("idle_share/rollout", "rollout workers")]),
    ("Queue depth", "rows", [("queue/prompts", "prompts without completion"), ("queue/ready", "ready to be trained")]),
    ("Throughput", "tokens/s", [("tokens_per_s", "trained tokens")]),
    (
        "Lengths of completions",
        "tokens",
        [("trained_length", "trained"), ("generated_length", "generated, since the start")],
    ),
    ("Trainer against rollout", "nats per token", [("mismatch/kl_k3", "KL(rollout ‖ trainer), k3")]),
    (
        "Importance ratios",
        "",
        [("mismatch/ess", "effective sample share"), ("mismatch/clip_fraction", "clipped share")],
    ),
)


def write_run_report(output_dir: Path, descriptions: Mapping[str, str] | None = None) -> Path:
    """Draw a run's folder.

    Args:
        output_dir: holds ``history.jsonl`` and, if the run has ended well, ``summary.json``.
        descriptions: what the summary's keys mean.

    Returns:
        The file, ``report.html``.

    Raises:
        FileNotFoundError: there is no history.
    """
    steps, validations = read_history(output_dir)
    kills = read_kills(output_dir)
    path = output_dir / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(output_dir.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(str(output_dir))}</h1>",
        _table(summary, descriptions or {}) if summary else "<p>The run has not ended, or was cut off.</p>",
    ]
    if validations:
        parts.append("<h2>Held-out accuracy</h2>" + _draw_accuracy(validations, kills))
    for title, unit, lines in _PLOTS:
        present = [(name, label) for name, label in lines if any(name in step for step in steps)]
        if present:
            parts.append(f"<h2>{html.escape(title)}</h2>" + _draw(steps, unit, present, kills))
    if kills:
        parts.append("<h2>Kills</h2>" + _kill_table(kills))
    parts.append("</body></html>")
    report = output_dir / "report.html"
    report.write_text("\n".join(parts))
    return report


def _table(summary: Mapping[str, Any], descriptions: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class='number'>{html.escape(_shown(value))}</td>"
        f"<td class='what'>{html.escape(descriptions.get(name, ''))}</td></tr>"
        for name, value in summary.items()
    )
    return f"<table>{rows}</table>"


def _kill_table(kills: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td class='number'>{kill['step']}</td><td>{html.escape(_who(kill))}</td>"
        f"<td class='what'>{_fate(kill)}, process {kill['pid']}</td></tr>"
        for kill in kills
    )
    return f"<table><tr><td>after step</td><td>who</td><td></td></tr>{rows}</table>"


def _who(kill: Mapping[str, Any]) -> str:
    return f"{kill['role']} {kill['rank']}" if kill["rank"] >= 0 else str(kill["role"])


def _fate(kill: Mapping[str, Any]) -> str:
    return "stopped" if kill.get("signal") == "SIGSTOP" else "killed"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {', '.join(map(_shown, some))}" for name, some in value.items() if some) or "–"
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)[:16] if isinstance(value, str) else f"{value:,}"


def _figure(unit: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _mark(axes: Any, kills: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line where somebody was killed or stopped, in a colour for each role."""
    fates = [f"{kill['role']} {_fate(kill)}" for kill in kills]
    for index, fate in enumerate(dict.fromkeys(fates)):
        for number, kill in enumerate(kill for kill, its in zip(kills, fates, strict=True) if its == fate):
            label = fate if not number else None
            axes.axvline(kill["step"] + 0.5, color=f"C{3 + index}", linewidth=0.8, linestyle=":", label=label)


def _draw(
    steps: Sequence[Mapping[str, Any]],
    unit: str,
    lines: Sequence[tuple[str, str]],
    kills: Sequence[Mapping[str, Any]],
) -> str:
    figure, axes = _figure(unit)
    _mark(axes, kills)
    for name, label in lines:
        some = [step for step in steps if name in step]
        axes.plot([step["step"] for step in some], [step[name] for step in some], label=label, linewidth=1.4)
    axes.legend(frameon=False)
    return _svg(figure)


def _draw_accuracy(validations: Sequence[Mapping[str, Any]], kills: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = _figure("share right")
    _mark(axes, kills)
    for how in ("greedy", "sampled"):
        name = f"val/accuracy_{how}"
        some = [line for line in validations if name in line]
        axes.plot([line["step"] for line in some], [line[name] for line in some], marker="o", label=how)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return _svg(figure)
