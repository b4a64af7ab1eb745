"""The page's figures: training curves, the paper's figures of failure cascades beside its numbers, step times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mrpo.metrics import STAGES
from mrpo.quantities import Judged
from mrpo.report import failures
from mrpo.report.curves import Series, curves_figure, smooth
from mrpo.report.page.paper import CASCADE_BACKBONE, EARLIEST_FAR, SOURCE, STAGE_SHARES
from mrpo.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, RED, TIME_COLORS, figure_style, title_with_legend

_RUN_COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#9aa1ad")
_LINE_STYLES = ("-", "--", ":", "-.")
_PAPER_COLORS = {"base": "#9aa1ad", "GRPO": BLUE, "GDPO": GREEN, "MRPO": ORANGE}
_PAPER_TITLE = f"The paper's, {CASCADE_BACKBONE}"
_LONGEST_NAME = 34
# What runs are compared by: metric, title, whether it is a share.
_COMPARED = (
    ("reward", "Reward", False),
    ("reward/answer", "Answer reward", False),
    ("reward/process", "Process reward", False),
    ("answer/correct", "Right answers", True),
    ("failures/early", "Early failures", True),
    ("far", "Failure accumulation rate", True),
    ("valid_steps", "Valid steps", True),
    ("num_steps", "Reasoning steps", False),
    ("completion/tokens", "Tokens of a completion", False),
    ("loss", "Loss", False),
    ("grad_norm", "Gradient norm", False),
    ("entropy", "Entropy", False),
)


def label(name: str) -> str:
    """A name as matplotlib shows it: no mathematics, not hidden for its first letter, and not too long."""
    if len(name) > _LONGEST_NAME:
        half = _LONGEST_NAME // 2
        name = f"{name[:half]}…{name[-half:]}"
    name = name.replace("\n", " ").replace("$", r"\$")
    return f"\u2009{name}" if name.startswith("_") else name


def training_curves(runs: Mapping[str, Series]) -> Figure | None:
    """The panels of one run, or several runs over each other with a panel for each metric; None without metrics."""
    runs = {name: series for name, series in runs.items() if series}
    if len(runs) < 2:
        return curves_figure(next(iter(runs.values()))) if runs else None
    panels = [panel for panel in _COMPARED if any(panel[0] in series for series in runs.values())]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure_style():
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.5), layout=layout)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for (metric, title, share), panel in zip(panels, axes, strict=False):
            _overlay(panel, metric, title, runs)
            if share:
                panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        for empty in axes[len(panels) :]:
            empty.remove()
        handles = figure.axes[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
        figure.supxlabel("global step", fontsize=9.0, color=MUTED)
    return figure


def _overlay(axes: Axes, metric: str, title: str, runs: Mapping[str, Series]) -> None:
    for place, (name, series) in enumerate(runs.items()):
        steps, values = series.get(metric, (np.empty(0), np.empty(0)))
        turn, color = divmod(place, len(_RUN_COLORS))
        style: dict[str, Any] = {"color": _RUN_COLORS[color], "linestyle": _LINE_STYLES[turn % len(_LINE_STYLES)]}
        axes.plot(steps, values, alpha=0.2, linewidth=0.9, **style)
        shown = smooth(values) if len(values) else values
        axes.plot(steps, shown, linewidth=1.8, marker="o" if len(steps) == 1 else "", label=label(name), **style)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)


def failure_stages(evaluations: failures.Evaluations, *, seed: int, resamples: int) -> Figure | None:
    """Where chains first fail: of all completions, of those that fail, and the paper's; None without verdicts."""
    judged = _labelled(evaluations)
    if not judged:
        return None
    estimate = partial(failures.estimate_each, seed=seed, resamples=resamples)
    with figure_style():
        figure, (of_all, of_failures, paper) = _panels((1.25, 1.0, 1.0))
        failures.draw_stages_of_all(of_all, judged, estimate)
        failures.draw_stages_of_failures(of_failures, judged, estimate)
        width = 0.8 / len(STAGE_SHARES)
        for place, (method, shares) in enumerate(STAGE_SHARES.items()):
            left = np.arange(len(STAGES)) + (place - (len(STAGE_SHARES) - 1) / 2) * width
            bars = paper.bar(left, shares, 0.92 * width, color=_PAPER_COLORS[method], hatch="//", label=method)
            _paper_bars(paper, bars)
        paper.set_ylim(0.0, 75.0)
        paper.set_xticks(range(len(STAGES)), STAGES)
        _paper_axis(paper, "stage of the first failure")
        _legend_above(figure, of_failures, of_all)
    return figure


def failure_accumulation(evaluations: failures.Evaluations, *, seed: int, resamples: int) -> Figure | None:
    """The failure accumulation rate over bins of the first failure point, and the paper's in the earliest bin."""
    judged = _labelled(evaluations)
    if not judged:
        return None
    with figure_style():
        figure, (ours, paper) = _panels((2.1, 1.0))
        failures.draw_accumulation(ours, judged, partial(failures.estimate_each, seed=seed, resamples=resamples))
        for place, (method, rate) in enumerate(EARLIEST_FAR.items()):
            _paper_bars(paper, paper.bar([place], [rate], 0.7, color=_PAPER_COLORS[method], hatch="//"))
        paper.set_xticks(range(len(EARLIEST_FAR)), list(EARLIEST_FAR))
        _paper_axis(paper, "rate in the earliest bin")
        paper.set_ylim(-2, 102)
        _legend_above(figure, ours)
    return figure


def incorrect_answers(evaluations: failures.Evaluations, *, seed: int, resamples: int) -> Figure | None:
    """The share of wrong answers over bins of the first failure point."""
    judged = _labelled(evaluations)
    if not judged:
        return None
    with figure_style():
        figure, (axes,) = _panels((1.0,), width=7.2)
        failures.draw_incorrect(axes, judged, partial(failures.estimate_each, seed=seed, resamples=resamples))
        _legend_above(figure, axes)
    return figure


def step_times(runs: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """One bar a run: the mean seconds of a step by stage."""
    if not runs:
        return None
    with figure_style():
        figure, (axes,) = _panels((1.0,), height=1.3 + 0.45 * len(runs))
        left = np.zeros(len(runs))
        for part, color in TIME_COLORS.items():
            seconds = np.array([times[part] for times in runs.values()])
            name = part.replace("_", " ")
            axes.barh(range(len(runs)), seconds, 0.6, left=left, color=color, label=name, edgecolor="white")
            left += seconds
        for row, total in enumerate(left):
            axes.annotate(f"{total:.2f} s", (total, row), (4, 0), textcoords="offset points", va="center", color=MUTED)
        axes.set_yticks(range(len(runs)), [label(name) for name in runs])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlabel("mean seconds per step")
        title_with_legend(axes, "Where a step's time goes")
    return figure


def _labelled(evaluations: failures.Evaluations) -> failures.Evaluations:
    """The judged completions of each evaluation, by its label; a number tells shortened names apart."""
    labelled: dict[str, Sequence[Judged]] = {}
    for number, (name, samples) in enumerate(failures.only_judged(evaluations).items(), start=1):
        shown = label(name)
        labelled[shown if shown not in labelled else f"{shown} ({number})"] = samples
    return labelled


def _panels(widths: Sequence[float], *, width: float = 11.0, height: float = 4.1) -> tuple[Figure, Sequence[Axes]]:
    """Panels in a row; sizes in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout)
    return figure, list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)


def _legend_above(figure: Figure, *panels: Axes) -> None:
    """One legend over the figure in place of the panels' own, which many or long names would squeeze to nothing."""
    for axes in panels:
        legend = axes.get_legend()
        axes.set_title(axes.get_title(loc="left"), pad=8.0)
        if legend is not None:
            legend.remove()
    if legend is not None:
        width, height = figure.get_size_inches()
        columns = max(1, int(width / 2.7))
        handles = [handle for handle in legend.legend_handles if handle is not None]
        figure.set_size_inches(width, height + 0.2 * math.ceil(len(handles) / columns))
        labels = [text.get_text() for text in legend.get_texts()]
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _paper_bars(axes: Axes, bars: object) -> None:
    for bar in bars:  # type: ignore[attr-defined]
        bar.set_edgecolor("white")
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7.5, color=MUTED)  # type: ignore[arg-type]


def _paper_axis(axes: Axes, name: str) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(100.0, decimals=0))
    axes.set_xlabel(f"{name} ({SOURCE})")
    axes.grid(axis="x", visible=False)
    title_with_legend(axes, _PAPER_TITLE)
