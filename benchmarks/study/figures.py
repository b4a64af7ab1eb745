"""The paper's figures from the study, its own numbers beside ours. Bars and points carry 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from study.statistics import Difference

from mrpo.estimates import Estimate, Floats
from mrpo.metrics import NUM_BINS, STAGES
from mrpo.report.page.paper import ACCURACY, CASCADE_BACKBONE, EARLIEST_FAR, SOURCE, STAGE_SHARES
from mrpo.report.page.paper import METHODS as PAPER_METHODS
from mrpo.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, RED, figure_style, save_png

COLORS = {
    "base": "#9aa1ad",
    "SFT": PURPLE,
    "SFT, 16 a step": "#c3a6dc",
    "GRPO": BLUE,
    "GDPO": GREEN,
    "MRPO": ORANGE,
    "telescoped": RED,
}
_BIN_LABELS = [f"{i / NUM_BINS:.1f}-{(i + 1) / NUM_BINS:.1f}" for i in range(NUM_BINS)]
_FFP = "first failure point"
_AROUND = 5  # steps

# By arm, estimates by metric.
Estimates = Mapping[str, Mapping[str, Estimate]]


def draw_accuracy(test: Estimates, shifted: Estimates, path: Path) -> Path:
    """Accuracy of every arm on both test sets, and the paper's averages for its three backbones."""
    with figure_style():
        figure, axes = _panels((1.0, 1.0, 1.6))
        for panel, found, title in zip(axes, (test, shifted), ("Test questions", "Shifted test"), strict=False):
            for place, (arm, of_arm) in enumerate(found.items()):
                _bar(panel, place, of_arm["accuracy"], arm)
            panel.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
            _percent(panel, title)
            panel.set_ylim(0, 1)
        axes[0].set_ylabel("right answers")
        width = 0.8 / len(PAPER_METHODS)
        for place, method in enumerate(PAPER_METHODS):
            left = np.arange(len(ACCURACY)) + (place - (len(PAPER_METHODS) - 1) / 2) * width
            heights = [values[place] / 100 for values in ACCURACY.values()]
            axes[2].bar(left, heights, 0.92 * width, color=COLORS[method], hatch="//", edgecolor="white", label=method)
        axes[2].set_xticks(range(len(ACCURACY)), list(ACCURACY))
        axes[2].legend(ncols=5, loc="upper left")
        _percent(axes[2], f"The paper's ({SOURCE})")
        axes[2].set_ylim(0, 0.4)
        return _save(figure, path)


def draw_stages(found: Estimates, path: Path) -> Path:
    """Of the chains that fail, the share that first fails early, mid and late: ours and the paper's."""
    with figure_style():
        figure, (ours, paper) = _panels((1.2, 1.0))
        _grouped(ours, {a: [of[f"{s}_of_failures"] for s in STAGES] for a, of in found.items()})
        shares = {m: [Estimate(v / 100, None, None) for v in values] for m, values in STAGE_SHARES.items()}
        _grouped(paper, shares, hatch="//")
        for panel, title in ((ours, "First failures by stage"), (paper, f"The paper's, {CASCADE_BACKBONE}")):
            panel.set_xticks(range(len(STAGES)), STAGES)
            _percent(panel, title)
            panel.set_ylim(0, 0.95)
            panel.legend(ncols=4, loc="upper right")
        return _save(figure, path)


def draw_accumulation(correct: Estimates, incorrect: Estimates, earliest: Estimates, path: Path) -> Path:
    """FAR over bins of the first failure point, wrong and right answers apart; and the paper's earliest bin."""
    with figure_style():
        figure, (wrong, right, ours, paper) = _panels((1.3, 1.3, 0.8, 0.8))
        for panel, found, title in (
            (wrong, incorrect, "FAR, wrong answers"),
            (right, correct, "FAR, right answers"),
        ):
            _lines(panel, found)
            _percent(panel, title)
        for place, (arm, of_arm) in enumerate(earliest.items()):
            _bar(ours, place, of_arm["far_bin1"], arm)
        ours.set_xticks(range(len(earliest)), list(earliest), rotation=30, ha="right")
        _percent(ours, "Earliest bin")
        for place, (method, rate) in enumerate(EARLIEST_FAR.items()):
            paper.bar([place], [rate / 100], 0.7, color=COLORS[method], hatch="//", edgecolor="white")
        paper.set_xticks(range(len(EARLIEST_FAR)), list(EARLIEST_FAR), rotation=30, ha="right")
        _percent(paper, f"The paper's, {CASCADE_BACKBONE}")
        wrong.set_ylabel("invalid steps after the first failure")
        wrong.legend(ncols=2, loc="lower left")
        return _save(figure, path)


def draw_incorrect(found: Estimates, path: Path) -> Path:
    """The share of wrong answers over bins of the first failure point."""
    with figure_style():
        figure, (axes,) = _panels((1.0,), width=6.4)
        _lines(axes, found)
        _percent(axes, "Wrong answers of the chains that first fail there")
        axes.set_ylabel("wrong answers")
        axes.legend(ncols=3, loc="lower left")
        return _save(figure, path)


def draw_learning(found: Mapping[str, Mapping[str, Floats]], path: Path) -> Path:
    """A panel for each metric, its values at every step by arm, as means of the steps around."""
    with figure_style():
        figure, panels = _panels([1.0] * len(found))
        for panel, (title, of_arms) in zip(panels, found.items(), strict=True):
            for arm, values in of_arms.items():
                around = np.ones(min(_AROUND, len(values)))
                smooth = np.convolve(values, around, "valid") / len(around)
                first = 1 + (len(around) - 1) / 2
                panel.plot(first + np.arange(len(smooth)), smooth, color=COLORS[arm], label=arm)
            panel.set_xlabel(f"step (means of {_AROUND})")
            _percent(panel, title)
        panels[0].legend(ncols=2)
        return _save(figure, path)


def draw_differences(found: Mapping[str, Mapping[str, Difference]], metrics: Mapping[str, str], path: Path) -> Path:
    """Paired differences of arms from MRPO, one row an arm and one panel a metric (its title as value)."""
    with figure_style():
        height = 1.0 + 0.28 * len(found)
        figure, panels = _panels([1.0] * len(metrics), width=3.4 * len(metrics) + 1.5, height=height)
        for place, (panel, (key, title)) in enumerate(zip(panels, metrics.items(), strict=True)):
            for row, of_arm in enumerate(found.values()):
                estimate = of_arm[key].estimate
                if estimate.value is not None and estimate.low is not None and estimate.high is not None:
                    panel.plot([estimate.low, estimate.high], [row, row], color=MUTED, linewidth=1.6)
                    panel.plot([estimate.value], [row], "o", color=ORANGE, markersize=5)
            panel.axvline(0.0, color=MUTED, linewidth=0.8)
            panel.set_yticks(range(len(found)), list(found) if place == 0 else [""] * len(found))
            panel.invert_yaxis()
            panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.0f}" if value else "0"))
            panel.set_xlabel("points, arm minus MRPO")
            panel.set_title(title)
        return _save(figure, path)


def _grouped(axes: Axes, found: Mapping[str, Sequence[Estimate]], hatch: str = "") -> None:
    width = 0.8 / len(found)
    for place, (arm, row) in enumerate(found.items()):
        left = np.arange(len(row)) + (place - (len(found) - 1) / 2) * width
        heights = [e.value if e.value is not None else np.nan for e in row]
        color = COLORS[arm]
        axes.bar(left, heights, 0.92 * width, color=color, hatch=hatch, edgecolor="white", label=arm)
        for x, estimate in zip(left, row, strict=True):
            _whisker(axes, float(x), estimate)


def _lines(axes: Axes, found: Estimates) -> None:
    offsets = np.linspace(-0.16, 0.16, len(found))
    for offset, (arm, of_arm) in zip(offsets, found.items(), strict=True):
        color = COLORS[arm]
        points = [(i + offset, e.value) for i, e in enumerate(of_arm.values()) if e.value is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, ms=4, label=arm)
        for i, estimate in enumerate(of_arm.values()):
            _whisker(axes, i + offset, estimate, color)
    axes.set_xticks(range(NUM_BINS), _BIN_LABELS)
    axes.set_xlim(-0.5, NUM_BINS - 0.5)
    axes.set_xlabel(_FFP)
    axes.set_ylim(-0.02, 1.05)


def _bar(axes: Axes, place: int, estimate: Estimate, arm: str) -> None:
    if estimate.value is not None:
        axes.bar([place], [estimate.value], 0.7, color=COLORS[arm], edgecolor="white")
        _whisker(axes, place, estimate)


def _whisker(axes: Axes, x: float, estimate: Estimate, color: str = MUTED) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([x, x], [estimate.low, estimate.high], color=color, linewidth=1.0)


def _percent(axes: Axes, title: str) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x", visible=False)
    axes.set_title(title)


def _panels(widths: Sequence[float], *, width: float = 11.0, height: float = 3.8) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    return figure, list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)


def _save(figure: Figure, path: Path) -> Path:
    save_png(figure, path)
    return path
