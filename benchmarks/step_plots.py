"""The figures of the suite `step`: where the time of a step goes, and how the ways compare over the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_plots import Figures, lines_over
from matplotlib import pyplot as plt
from results import Result

from mrpo.report.style import figure_style, save_png

_SWEEPS = (
    ("group", "completions a prompt, G"),
    ("image_tokens", "image tokens"),
    ("length", "tokens a completion"),
    ("processes", "processes"),
)


def draw(results: Sequence[Result], figures: Figures, stages: Sequence[str], out: Path) -> list[Path]:
    """Writes the figures whose cases are there."""
    steps = [result for result in results if result.measured and result.settings["kind"] == "step"]
    drawn = [_stages([r for r in steps if not r.settings["sweep"]], figures, stages, out / "step-stages.png")]
    return [path for path in (*drawn, _sweeps(steps, figures, out / "step-sweeps.png")) if path is not None]


def _stages(results: Sequence[Result], figures: Figures, stages: Sequence[str], path: Path) -> Path | None:
    if not results:
        return None
    with figure_style():
        size = (5.2 * len(results), 2.6)
        figure, axes = plt.subplots(1, len(results), figsize=size, layout="constrained", squeeze=False)
        for axis, result in zip(axes[0], results, strict=True):
            found = figures(result)
            names = list(found)[::-1]
            left = [0.0] * len(names)
            for stage in stages:
                widths = [found[name].get(f"{stage} s", 0.0) for name in names]
                axis.barh(names, widths, left=left, label=stage)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axis.set(title=result.name, xlabel="s a step")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(stages))
        save_png(figure, path)
        plt.close(figure)
    return path


def _sweeps(steps: Sequence[Result], figures: Figures, path: Path) -> Path | None:
    swept = [(key, label) for key, label in _SWEEPS if sum(r.settings["sweep"] == key for r in steps) > 1]
    if not swept:
        return None
    with figure_style():
        size = (4.4 * len(swept), 3.2)
        figure, axes = plt.subplots(1, len(swept), figsize=size, layout="constrained", squeeze=False)
        for axis, (key, label) in zip(axes[0], swept, strict=True):
            lines_over(axis, [r for r in steps if r.settings["sweep"] == key], key, "completion tokens/s", figures)
            axis.set_xlabel(label)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        save_png(figure, path)
        plt.close(figure)
    return path
