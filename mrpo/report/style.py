"""The look that the figures share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2430"
MUTED = "#6f7685"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fb0", "#e08a1e", "#2f9270", "#c23b31", "#8a5aa8"
STAGE_COLORS = {"early": "#c23b31", "mid": "#eb9c4b", "late": "#f5d9a2", "none": "#8fbfa6"}
# Stages of a step: time/NAME in the metrics; what is left of a step, time/rewards among it, is "other".
TIME_COLORS = {
    "rollout": BLUE, "logprobs": PURPLE, "judge_wait": ORANGE, "update": GREEN, "sync": RED, "other": "#9aa1ad"
}  # fmt: skip
# For named evaluations, in their order; the start of a run is grey, as what the others are seen against.
EVALUATION_COLORS = ("#9aa1ad", BLUE, ORANGE, GREEN, PURPLE, RED)

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": "#c5c9d1",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef2",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The project's settings of matplotlib, for the block alone. Figures are drawn by Agg, without a display."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def title_with_legend(axes: Axes, title: str, *, handles: Sequence[Artist] | None = None, columns: int = 4) -> None:
    """`title` at the top left with the legend in rows under it, so that no line is hidden by a key."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else handles
    rows = math.ceil(len(shown) / columns)
    axes.set_title(title, pad=8.0 + 16.0 * rows)
    if shown:
        axes.legend(handles=shown, loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns, borderaxespad=0.2)


def save_png(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15)
