"""The figures of the suite `update`: seconds of every way, and how much faster ours is over the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_plots import Figures, color_of, draw_bars
from plotting import WIDE, draw_sweeps, panels
from results import Result

_PANELS = ("completion tokens/s", "peak GiB")


def draw(results: Sequence[Result], figures: Figures, out: Path) -> list[Path]:
    """Writes the figures whose cases are there."""
    updates = [result for result in results if result.measured and result.settings["kind"] == "update"]
    drawn = [
        _bars([result for result in updates if not result.settings["sweep"]], figures, out / "update-ways.png"),
        draw_sweeps(updates, _PANELS, figures, out / "update-sweeps.png"),
    ]
    return [path for path in drawn if path is not None]


def _bars(results: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    if not results:
        return None
    with panels(path, 1, len(results), WIDE) as (_, axes):
        for axis, result in zip(axes[0], results, strict=True):
            found = {name: mine for name, mine in figures(result).items() if "completion tokens/s" in mine}
            names = list(found)
            spreads = [
                tuple(value or 0.0 for value in (result[n].low, result[n].seconds, result[n].high)) for n in names
            ]
            draw_bars(axis, names, spreads, [color_of(name, names) for name in names])
            axis.set(title=result.name, xlabel="s, forward and backward")
    return path
