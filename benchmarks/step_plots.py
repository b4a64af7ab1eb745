"""The figures of the suite `step`: where the time of a step goes, and how the ways compare over the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_plots import Figures
from plotting import WIDE, draw_sweeps, legend_above, panels
from results import Result


def draw(results: Sequence[Result], figures: Figures, stages: Sequence[str], out: Path) -> list[Path]:
    """Writes the figures whose cases are there."""
    steps = [result for result in results if result.measured and result.settings["kind"] == "step"]
    drawn = [
        _stages([result for result in steps if not result.settings["sweep"]], figures, stages, out / "step-stages.png"),
        draw_sweeps(steps, ("completion tokens/s",), figures, out / "step-sweeps.png"),
    ]
    return [path for path in drawn if path is not None]


def _stages(results: Sequence[Result], figures: Figures, stages: Sequence[str], path: Path) -> Path | None:
    if not results:
        return None
    with panels(path, 1, len(results), WIDE) as (figure, axes):
        for axis, result in zip(axes[0], results, strict=True):
            found = figures(result)
            names = list(found)[::-1]
            left = [0.0] * len(names)
            for stage in stages:
                widths = [found[name].get(f"{stage} s", 0.0) for name in names]
                axis.barh(names, widths, left=left, label=stage)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axis.set(title=result.name, xlabel="s a step")
        legend_above(figure, axes, len(stages))
    return path
