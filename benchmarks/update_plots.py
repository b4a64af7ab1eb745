"""The figures of the suite `update`: seconds of every way, and how much faster ours is over the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_plots import Figures, color_of, draw_bars, lines_over
from matplotlib import pyplot as plt
from results import Result

from mrpo.report.style import figure_style, save_png

_SWEEPS = (("group", "completions a prompt, G"), ("image_tokens", "image tokens"), ("length", "tokens a completion"))
_PANELS = ("completion tokens/s", "peak GiB")


def draw(results: Sequence[Result], figures: Figures, out: Path) -> list[Path]:
    """Writes the figures whose cases are there."""
    updates = [result for result in results if result.measured and result.settings["kind"] == "update"]
    drawn = [
        _bars([result for result in updates if not result.settings["sweep"]], figures, out / "update-ways.png"),
        _sweeps(updates, figures, out / "update-sweeps.png"),
    ]
    return [path for path in drawn if path is not None]


def _bars(results: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    if not results:
        return None
    with figure_style():
        size = (5.2 * len(results), 2.6)
        figure, axes = plt.subplots(1, len(results), figsize=size, layout="constrained", squeeze=False)
        for axis, result in zip(axes[0], results, strict=True):
            found = {name: mine for name, mine in figures(result).items() if "completion tokens/s" in mine}
            names = list(found)
            spreads = [
                tuple(value or 0.0 for value in (result[n].low, result[n].seconds, result[n].high)) for n in names
            ]
            draw_bars(axis, names, spreads, [color_of(name, names) for name in names])
            axis.set(title=result.name, xlabel="s, forward and backward")
        save_png(figure, path)
        plt.close(figure)
    return path


def _sweeps(updates: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    swept = [(key, label) for key, label in _SWEEPS if sum(r.settings["sweep"] == key for r in updates) > 1]
    if not swept:
        return None
    with figure_style():
        size = (4.4 * len(swept), 6.4)
        figure, axes = plt.subplots(len(_PANELS), len(swept), figsize=size, layout="constrained", squeeze=False)
        for column, (key, label) in enumerate(swept):
            chosen = [result for result in updates if result.settings["sweep"] == key]
            for axis, panel in zip(axes[:, column], _PANELS, strict=True):
                lines_over(axis, chosen, key, panel, figures)
                axis.set_xlabel(label)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=4)
        save_png(figure, path)
        plt.close(figure)
    return path
