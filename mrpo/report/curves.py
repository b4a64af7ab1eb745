"""The curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from mrpo.errors import UserError
from mrpo.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    STAGE_COLORS,
    TIME_COLORS,
    figure_style,
    save_png,
    title_with_legend,
)
from mrpo.telemetry.jsonl import read_json_lines

Floats = NDArray[np.float64]
# Of one metric: the steps that have it, and its values there; both (N,).
Series = Mapping[str, tuple[Floats, Floats]]


@dataclass(frozen=True)
class _Curve:
    metric: str
    label: str
    color: str


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: tuple[_Curve, ...]
    draw: Callable[[Figure, SubplotSpec, str, Sequence[_Curve], Series], None]


def draw_curves(metrics_path: Path, out_png: Path) -> None:
    """Draw a run's metrics over its steps: faint as measured, strong smoothed. Panels without data are left out.

    Raises:
        UserError: `metrics_path` is missing, broken or without a metric that is drawn.
    """
    figure = curves_figure(collect_series(read_json_lines(metrics_path)))
    if figure is None:
        raise UserError(f"{metrics_path}: holds no metric to draw; a run writes one line per step")
    with figure_style():
        save_png(figure, out_png)


def curves_figure(series: Series) -> Figure | None:
    """The panels of one run; None when `series` holds no metric that is drawn."""
    panels = [(panel, [curve for curve in panel.curves if curve.metric in series]) for panel in _PANELS]
    panels = [(panel, curves) for panel, curves in panels if curves]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure_style():
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.05, hspace=0.06)
        figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout=layout)
        grid = figure.add_gridspec(rows, columns)
        for place, (panel, curves) in enumerate(panels):
            panel.draw(figure, grid[place // columns, place % columns], panel.title, curves, series)
        figure.supxlabel("global step", fontsize=9.0, color=MUTED)
    return figure


def collect_series(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    """Every metric's steps and values, without the steps where it is missing, null or not finite."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, []).append((float(record["step"]), float(value)))
    return {name: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for name, pairs in points.items()}


def smooth(values: Floats) -> Floats:
    """The centred moving average of `values` (N,) over about N/12 points; at the ends over the half that is there."""
    reach = min(12, len(values) // 24)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    start, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _marker(steps: Floats) -> str:
    return "o" if len(steps) == 1 else ""


def _draw_lines(figure: Figure, place: SubplotSpec, title: str, curves: Sequence[_Curve], series: Series) -> None:
    axes = figure.add_subplot(place)
    for curve in curves:
        steps, values = series[curve.metric]
        axes.plot(steps, values, color=curve.color, alpha=0.22, linewidth=1.0)
        axes.plot(steps, smooth(values), color=curve.color, linewidth=1.9, marker=_marker(steps), label=curve.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.01)
    title_with_legend(axes, title)


def _draw_shares(figure: Figure, place: SubplotSpec, title: str, curves: Sequence[_Curve], series: Series) -> None:
    _draw_lines(figure, place, title, curves, series)
    axes = figure.axes[-1]
    axes.set_ylim(-0.01, 1.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_stack(figure: Figure, place: SubplotSpec, title: str, curves: Sequence[_Curve], series: Series) -> None:
    axes = figure.add_subplot(place)
    steps = np.unique(np.concatenate([series[curve.metric][0] for curve in curves]))
    heights = [np.interp(steps, series[curve.metric][0], smooth(series[curve.metric][1])) for curve in curves]
    axes.stackplot(
        steps, heights, labels=[curve.label for curve in curves], colors=[curve.color for curve in curves],
        edgecolor="white", linewidth=0.8,
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0.0)
    title_with_legend(axes, title)


def _draw_share_stack(figure: Figure, place: SubplotSpec, title: str, curves: Sequence[_Curve], series: Series) -> None:
    _draw_stack(figure, place, title, curves, series)
    axes = figure.axes[-1]
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_strips(figure: Figure, place: SubplotSpec, title: str, curves: Sequence[_Curve], series: Series) -> None:
    """One flat plot per curve, over each other: quantities whose scales have nothing in common."""
    grid = place.subgridspec(len(curves), 1, hspace=0.12)
    for row, curve in enumerate(curves):
        axes = figure.add_subplot(grid[row])
        steps, values = series[curve.metric]
        axes.plot(steps, values, color=curve.color, alpha=0.22, linewidth=1.0)
        axes.plot(steps, smooth(values), color=curve.color, linewidth=1.9, marker=_marker(steps))
        axes.set_title(curve.label, loc="right", fontsize=8.5, fontweight="normal", color=curve.color, pad=3.0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.margins(x=0.01, y=0.15)
        if row == 0:
            axes.set_title(title, pad=8.0)
        if row < len(curves) - 1:
            axes.tick_params(labelbottom=False)


_PANELS = (
    _Panel(
        "Reward and its parts",
        (
            _Curve("reward", "sum", INK),
            _Curve("reward/answer", "answer", BLUE),
            _Curve("reward/process", "process", GREEN),
            _Curve("reward/length", "length", ORANGE),
        ),
        _draw_lines,
    ),
    _Panel(
        "Where judged completions first fail",
        tuple(_Curve(f"failures/{stage}", stage, STAGE_COLORS[stage]) for stage in ("early", "mid", "late")),
        _draw_share_stack,
    ),
    _Panel(
        "Accuracy, valid steps, failure accumulation",
        (
            _Curve("answer/correct", "answer reward > tau", BLUE),
            _Curve("valid_steps", "valid steps", GREEN),
            _Curve("far", "accumulation rate", RED),
        ),
        _draw_shares,
    ),
    _Panel(
        "Optimization",
        (_Curve("loss", "loss", INK), _Curve("grad_norm", "gradient norm", BLUE), _Curve("kl", "KL", PURPLE)),
        _draw_strips,
    ),
    _Panel(
        "Completions",
        (
            _Curve("completion/tokens", "tokens", INK),
            _Curve("num_steps", "reasoning steps", BLUE),
            _Curve("completion/truncated", "share cut at the limit", RED),
        ),
        _draw_strips,
    ),
    _Panel(
        "Seconds per step",
        (
            *(
                _Curve(f"time/{stage}", stage.replace("_", " "), color)
                for stage, color in TIME_COLORS.items()
                if stage != "other"
            ),
        ),
        _draw_stack,
    ),
)
