"""Where the time of every step went, drawn from a run's metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from mrpo.errors import UserError
from mrpo.report.curves import Series, collect_series
from mrpo.report.style import INK, ORANGE, TIME_COLORS, figure_style, save_png, title_with_legend
from mrpo.telemetry.jsonl import read_json_lines

Floats = NDArray[np.float64]

_MOST_BARS = 80  # steps; those of longer runs touch each other
_FEWEST_PLACES = 8  # steps that there is room for, so that a bar is never as broad as the figure
# Of the judge's time: what the trainer did not wait for, in two readings.
_JUDGE_SHARES = {"judge/hidden": ("hidden behind the step", ORANGE), "judge/overlapped": ("hidden or concurrent", INK)}


def draw_timeline(metrics_path: Path, out_png: Path) -> None:
    """Draw each step as a bar of its stages, in seconds, and under it the share of the judge's time that was hidden.

    Raises:
        UserError: `metrics_path` is missing, broken or without the time of a step.
    """
    series = collect_series(read_json_lines(metrics_path))
    if "time/step" not in series:
        raise UserError(f"{metrics_path}: holds no time/step; a run writes one line per step")
    with figure_style():
        save_png(timeline_figure(series), out_png)


def timeline_figure(series: Series) -> Figure:
    """The bars, and a second panel where the judge's times are known."""
    shares = {name: look for name, look in _JUDGE_SHARES.items() if name in series}
    with figure_style():
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06, hspace=0.04)
        figure = Figure(figsize=(9.6, 5.4 if shares else 3.8), layout=layout)
        heights = [2.2, 1.0] if shares else [1.0]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _draw_stages(panels[0], series)
        if shares:
            _draw_shares(panels[1], series, shares)
        panels[-1].set_xlabel("global step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
        first, last = series["time/step"][0][[0, -1]].tolist()
        panels[-1].set_xlim(first - 0.7, max(last, first + _FEWEST_PLACES - 1) + 0.7)
    return figure


def stage_seconds(series: Series) -> tuple[Floats, dict[str, Floats]]:
    """(N,) steps and for each stage with any time the seconds (N,) it took of them; "other" is what no stage took.

    A stage missing at a step took none of it.
    """
    steps, whole = series["time/step"]
    stages: dict[str, Floats] = {}
    for name in TIME_COLORS:
        if f"time/{name}" in series:
            known = dict(zip(*(values.tolist() for values in series[f"time/{name}"]), strict=True))
            stages[name] = np.array([known.get(step, 0.0) for step in steps.tolist()])
    measured = np.sum(list(stages.values()), axis=0) if stages else np.zeros_like(whole)
    stages["other"] = np.maximum(whole - measured, 0.0)
    return steps, {name: seconds for name, seconds in stages.items() if seconds.any()}


def _draw_stages(axes: Axes, series: Series) -> None:
    steps, stages = stage_seconds(series)
    base = np.zeros_like(steps)
    for name, seconds in stages.items():
        label = f"{name.replace('_', ' ')} {seconds.mean():.3g} s"
        if len(steps) <= _MOST_BARS:
            axes.bar(steps, seconds, 0.82, base, color=TIME_COLORS[name], linewidth=0.0, label=label)
        else:
            axes.fill_between(
                steps, base, base + seconds, step="mid", color=TIME_COLORS[name], linewidth=0.0, label=label
            )
        base += seconds
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0.0)
    axes.grid(axis="x", visible=False)
    title_with_legend(axes, f"Where a step's time goes: {base.mean():.3g} s on average", columns=6)


def _draw_shares(axes: Axes, series: Series, shares: dict[str, tuple[str, str]]) -> None:
    for name, (label, color) in shares.items():
        steps, values = series[name]
        axes.plot(
            steps, values, color=color, linewidth=1.6, marker="o", markersize=2.5, label=f"{label} {values.mean():.0%}"
        )
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    title_with_legend(axes, "Judge's time that nobody waited for")
