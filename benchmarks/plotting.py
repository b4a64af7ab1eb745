"""What the figures of several suites share: panels written to a file, and lines over the settings that were swept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernel_plots import Figures, lines_over
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from results import Result

from mrpo.report.style import figure_style, save_png

WIDE, SQUARE = (5.2, 2.6), (4.4, 3.2)
SWEEPS = (
    ("group", "completions a prompt, G"),
    ("image_tokens", "image tokens"),
    ("length", "tokens a completion"),
    ("processes", "processes"),
)


@contextmanager
def panels(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Figure, Any]]:
    """A figure and its (rows, columns) axes, each panel of this size in inches; written to `path` at the end."""
    with figure_style():
        whole = (size[0] * columns, size[1] * rows)
        figure, axes = plt.subplots(rows, columns, figsize=whole, layout="constrained", squeeze=False)
        yield figure, axes
        save_png(figure, path)
        plt.close(figure)


def legend_above(figure: Figure, axes: Any, columns: int = 4) -> None:
    """One legend for all panels, from the first of them."""
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def draw_sweeps(results: Sequence[Result], names: Sequence[str], figures: Figures, path: Path) -> Path | None:
    """A column for every setting that was swept, a row for each of these figures, a line for each candidate."""
    swept = [(key, label) for key, label in SWEEPS if sum(r.settings["sweep"] == key for r in results) > 1]
    if not swept:
        return None
    with panels(path, len(names), len(swept), SQUARE) as (figure, axes):
        for column, (key, label) in enumerate(swept):
            chosen = [result for result in results if result.settings["sweep"] == key]
            for axis, name in zip(axes[:, column], names, strict=True):
                lines_over(axis, chosen, key, name, figures)
                axis.set_xlabel(label)
        legend_above(figure, axes)
    return path
