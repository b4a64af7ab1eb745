"""The figures of the suite `kernels`: times beside their ceilings, and sweeps over tokens and completion length."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from results import Result

from mrpo.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, figure_style, save_png

Figures = Callable[[Result], dict[str, dict[str, float]]]

LABELS = {"cuda": "ours, CUDA", "triton": "ours, Triton", "cpp": "ours, C++", "reference": "eager PyTorch"}

DASHED = (0, (4, 3))
_LIGHT_BLUE = "#7fa9d6"
_OWN = ("cuda", "triton", "cpp")
_OTHERS = (ORANGE, GREEN, PURPLE, RED, "#3a9bb0", "#8a6d3b", "#b0567c", MUTED)
_CEILINGS = ("product: logits", "product: dhidden", "product: dweight", "products in one go", "copy")


def draw(results: Sequence[Result], figures: Figures, out: Path) -> list[Path]:
    """Writes the figures whose cases are there."""
    measured = [result for result in results if result.measured]
    heads = [result for result in measured if result.settings["kind"] == "head"]
    drawn = [
        _bars([result for result in heads if not result.settings["sweep"]], figures, out / "kernels-heads.png"),
        _bars(
            [result for result in heads if result.settings["sweep"] == "variants"], figures, out / "kernels-ours.png"
        ),
        _bars([result for result in measured if result.settings["kind"] == "rows"], figures, out / "kernels-rows.png"),
        _sweeps(heads, figures, out / "kernels-sweeps.png"),
    ]
    return [path for path in drawn if path is not None]


def _bars(results: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    """Milliseconds of every candidate, and a line where the ceiling of the case lies."""
    if not results:
        return None
    most = max(len(result.measured) for result in results)
    columns = min(len(results), 2)
    rows = -(-len(results) // columns)
    with figure_style():
        size = (5.2 * columns, rows * (1.1 + 0.3 * most))
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for axis in axes.flat[len(results) :]:
            axis.remove()
        for axis, result in zip(axes.flat, results, strict=False):
            _bars_of_case(axis, result, figures(result))
        save_png(figure, path)
        plt.close(figure)
    return path


def _bars_of_case(axis: Axes, result: Result, found: dict[str, dict[str, float]]) -> None:
    shown = [one for one in result.measured if one.name in found and one.name not in _CEILINGS]
    names = [one.name for one in shown]
    spreads = [tuple(1e3 * (value or 0.0) for value in (one.low, one.seconds, one.high)) for one in shown]
    labels = [LABELS.get(name, name) for name in names]
    draw_bars(axis, labels, spreads, [color_of(name, names) for name in names])
    ceiling = next((one.seconds * found[one.name].get("share of ceiling", 0.0) for one in shown if one.seconds), 0.0)
    label = "ms, forward and backward"
    if ceiling:
        axis.axvline(1e3 * ceiling, color=INK, linestyle=DASHED, linewidth=1)
        label += "; dashed: " + ("copy" if result.settings["kind"] == "rows" else "bare products")
    axis.set(title=result.name, xlabel=label)


def draw_bars(axis: Axes, labels: Sequence[str], spreads: Sequence[tuple[float, ...]], colors: Sequence[str]) -> None:
    """Bars from (fastest, median, slowest) with their numbers; those far longer than the others are cut off."""
    medians = [middle for _, middle, _ in spreads]
    longest = min(max((high for *_, high in spreads), default=1.0), 3.0 * statistics.median(medians or [1.0]))
    cut = [middle > longest for middle in medians]
    errors = [[0.0 if c else m - low for c, (low, m, _) in zip(cut, spreads, strict=True)]]
    errors.append([0.0 if c else high - m for c, (_, m, high) in zip(cut, spreads, strict=True)])
    lengths = [min(middle, 1.14 * longest) for middle in medians]
    axis.barh(labels, lengths, xerr=errors, color=colors, error_kw={"ecolor": INK, "elinewidth": 0.8}, height=0.65)
    for label, (_, middle, high), is_cut in zip(labels, spreads, cut, strict=True):
        text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
        where = (1.14 * longest, label) if is_cut else (min(high, 1.14 * longest), label)
        style: dict[str, Any] = {"ha": "right", "color": "white"} if is_cut else {"ha": "left", "color": INK}
        shown = f"{text} \u2192" if is_cut else text
        offset = (-4 if is_cut else 4, 0)
        axis.annotate(shown, where, offset, textcoords="offset points", va="center", fontsize=8, **style)
    axis.set_xlim(0, 1.14 * longest)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def _sweeps(heads: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    """Time as a multiple of the bare products, and peak memory, over the number of tokens and over their length."""
    kinds = [
        (sweep, key, label)
        for sweep, key, label in (("tokens", "N", "tokens"), ("length", "length", "tokens a completion"))
        if sum(result.settings["sweep"] == sweep for result in heads) > 1
    ]
    if not kinds:
        return None
    with figure_style():
        figure, axes = plt.subplots(2, len(kinds), figsize=(5.2 * len(kinds), 6.4), layout="constrained", squeeze=False)
        for column, (sweep, key, label) in enumerate(kinds):
            chosen = [result for result in heads if result.settings["sweep"] == sweep]
            for row, figure_name in enumerate(("times bare products", "peak GiB")):
                lines_over(axes[row, column], chosen, key, figure_name, figures)
                axes[row, column].set_xlabel(label)
            axes[0, column].axhline(1.0, color=INK, linestyle=DASHED, linewidth=1)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=4)
        save_png(figure, path)
        plt.close(figure)
    return path


def lines_over(axis: Axes, results: Sequence[Result], key: str, figure_name: str, figures: Figures) -> None:
    """One line a candidate: a figure over a setting, both on logarithmic axes; what is 0 has no place there."""
    names = list(dict.fromkeys(one.name for result in results for one in result.measured if one.name not in _CEILINGS))
    found = [(result.settings[key], figures(result)) for result in results]
    for name in names:
        points = [(x, value) for x, by in found if (value := by.get(name, {}).get(figure_name, 0.0)) > 0]
        if points:
            width = 2.2 if name.startswith("ours") else 1.3
            axis.plot(*zip(*points, strict=True), marker="o", ms=3.5, lw=width, color=color_of(name, names), label=name)
    axis.set(ylabel=figure_name, xscale="log", yscale="log")
    ticks = sorted({x for x, _ in found})
    axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")


def color_of(name: str, names: Sequence[str]) -> str:
    """Blue for ours; the peers in their order."""
    if name in _OWN or name.startswith("ours"):
        return BLUE if name in ("ours", "ours, vLLM", "cuda", "cpp") else _LIGHT_BLUE
    others = [other for other in names if other not in _OWN and not other.startswith("ours")]
    return _OTHERS[others.index(name) % len(_OTHERS)]
