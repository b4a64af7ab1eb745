"""The figures of the suite `rollout`: completion tokens a second of every way, and over the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_plots import Figures, color_of
from plotting import WIDE, draw_sweeps, panels
from results import Result

_SPEED = "completion tokens/s"


def draw(results: Sequence[Result], figures: Figures, out: Path) -> list[Path]:
    """Writes the figures whose cases are there."""
    rollouts = [result for result in results if result.measured and result.settings["kind"] == "rollout"]
    drawn = [
        _bars([result for result in rollouts if not result.settings["sweep"]], figures, out / "rollout-ways.png"),
        draw_sweeps(rollouts, (_SPEED,), figures, out / "rollout-sweeps.png"),
    ]
    return [path for path in drawn if path is not None]


def _bars(results: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    """On a logarithmic axis: the fastest way can be a hundred times faster than the slowest."""
    shown = [result for result in results if figures(result)]
    if not shown:
        return None
    with panels(path, 1, len(shown), WIDE) as (_, axes):
        for axis, result in zip(axes[0], shown, strict=True):
            speeds = {name: mine[_SPEED] for name, mine in figures(result).items()}
            names = list(speeds)
            bars = axis.barh(names, list(speeds.values()), color=[color_of(n, names) for n in names], height=0.65)
            axis.bar_label(bars, [f"{speed:,.0f}" for speed in speeds.values()], padding=3, fontsize=8)
            axis.set(title=result.name, xlabel=_SPEED, xscale="log")
            axis.set_xlim(min(speeds.values()) / 3, max(speeds.values()) * 3)
            axis.invert_yaxis()
            axis.grid(visible=False, axis="y")
    return path
