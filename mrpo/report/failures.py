"""The paper's figures of failure cascades, for one or more named evaluations (arXiv 2606.31825)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from mrpo.estimates import Estimate, estimate_share, question_ids, sum_by_question
from mrpo.metrics import NUM_BINS, STAGES
from mrpo.quantities import Judged, Quantity, incorrect_in_bin, is_in_stage, is_in_stage_of_failures, rate_in_bin
from mrpo.report.style import EVALUATION_COLORS, INK, MUTED, figure_style, save_png, title_with_legend

Evaluations = Mapping[str, Sequence[Judged]]
Estimator = Callable[[Sequence[Judged], Sequence[Quantity]], list[Estimate]]

_HOLLOW: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
_LEVEL = 0.95
_BIN_LABELS = tuple(f"{index / NUM_BINS:.1f}–{(index + 1) / NUM_BINS:.1f}" for index in range(NUM_BINS))  # noqa: RUF001
_FFP_LABEL = "first failure point (invalid step's place / number of steps)"


def draw_failures(evaluations: Evaluations, out_png: Path, *, seed: int = 0, resamples: int = 1000) -> None:
    """Draw where chains first fail and what follows, with 95 % intervals over questions.

    Four panels over all judged completions: the share per stage of all, the share per stage of
    those that fail (the paper's), the failure accumulation rate over five bins of the first failure point, split by
    correct and incorrect answers, and the share of incorrect answers over the same bins. A point without any
    completion is left out, as is an evaluation without judged completions.

    Args:
        evaluations: name -> completions, in the order of drawing; say "before" and "after".

    Raises:
        ValueError: there is no evaluation.
    """
    if not evaluations:
        raise ValueError("evaluations is empty; give at least one")
    judged = only_judged(evaluations)
    estimate = partial(estimate_each, seed=seed, resamples=resamples)
    with figure_style():
        figure = Figure(figsize=(10.4, 7.4), layout=ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.16))
        of_all, of_failures, rate, incorrect = figure.subplots(2, 2).flat
        draw_stages_of_all(of_all, judged, estimate)
        draw_stages_of_failures(of_failures, judged, estimate)
        draw_accumulation(rate, judged, estimate)
        draw_incorrect(incorrect, judged, estimate)
        if not judged:
            figure.suptitle("No completion was judged", color=MUTED)
        save_png(figure, out_png)


def only_judged(evaluations: Evaluations) -> dict[str, list[Judged]]:
    """The judged completions of each evaluation that has some."""
    judged = {name: [item for item in samples if item.validity is not None] for name, samples in evaluations.items()}
    return {name: samples for name, samples in judged.items() if samples}


def estimate_each(
    samples: Sequence[Judged], quantities: Sequence[Quantity], *, seed: int, resamples: int
) -> list[Estimate]:
    """The mean of each quantity, all of them in [0, 1], over `samples`, with its 95 % interval."""
    questions = question_ids(samples)
    return [
        estimate_share(*sum_by_question(samples, questions, quantity), seed=seed, level=_LEVEL, resamples=resamples)
        for quantity in quantities
    ]


def draw_stages_of_all(axes: Axes, judged: Evaluations, estimate: Estimator) -> None:
    """The share of judged completions that first fail in each stage, and of those that do not fail."""
    _draw_bars(axes, judged, [*STAGES, "none"], is_in_stage, estimate)
    axes.set_xticks(range(4), ["early", "mid", "late", "no failure"])
    axes.set_xlabel("stage of the first failure, of all judged completions")
    title_with_legend(axes, "How many fail, and where first")


def draw_stages_of_failures(axes: Axes, judged: Evaluations, estimate: Estimator) -> None:
    """The share of each stage among the completions that fail: the paper's figure."""
    _draw_bars(axes, judged, STAGES, is_in_stage_of_failures, estimate)
    axes.set_xticks(range(3), ["early", "mid", "late"])
    axes.set_xlabel("stage of the first failure, of completions that fail")
    title_with_legend(axes, "Where failures begin")


def _draw_bars(
    axes: Axes,
    judged: Evaluations,
    stages: Sequence[str],
    make_quantity: Callable[[str], Quantity],
    estimate: Estimator,
) -> None:
    width = 0.8 / max(1, len(judged))
    for place, (name, samples) in enumerate(judged.items()):
        estimates = estimate(samples, [make_quantity(stage) for stage in stages])
        left = np.arange(len(stages)) + (place - (len(judged) - 1) / 2) * width
        color = evaluation_color(place)
        values = [share.value or 0.0 for share in estimates]
        axes.bar(left, values, width * 0.92, color=color, label=name)
        for x, share in zip(left, estimates, strict=True):
            if share.value is not None and share.low is not None and share.high is not None:
                axes.plot([x, x], [share.low, share.high], color=INK, linewidth=1.1)
                axes.annotate(
                    f"{100 * share.value:.0f}", (x, share.high), (0, 3), textcoords="offset points",
                    ha="center", fontsize=8.0, color=MUTED,
                )  # fmt: skip
    axes.set_ylim(0.0, 1.1 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x", visible=False)


def draw_accumulation(axes: Axes, judged: Evaluations, estimate: Estimator) -> None:
    """The failure accumulation rate over bins of the first failure point, by right and wrong answers."""
    for place, (name, samples) in enumerate(judged.items()):
        for correct in (False, True):
            quantities = [rate_in_bin(index, correct=correct) for index in range(NUM_BINS)]
            shift = 0.05 * (2 * place + correct - len(judged) + 0.5)
            label = "" if correct else name
            _draw_points(axes, estimate(samples, quantities), shift, evaluation_color(place), label, hollow=correct)
    _bin_axis(axes)
    answers = [Line2D([], [], color=MUTED, marker="o", label="answer wrong")]
    answers.append(Line2D([], [], color=MUTED, marker="o", label="answer right", **_HOLLOW))
    evaluations = axes.get_legend_handles_labels()[0]
    title_with_legend(axes, "Failure accumulation rate", handles=[*evaluations, *answers], columns=6)


def draw_incorrect(axes: Axes, judged: Evaluations, estimate: Estimator) -> None:
    """The share of wrong answers over bins of the first failure point."""
    for place, (name, samples) in enumerate(judged.items()):
        estimates = estimate(samples, [incorrect_in_bin(index) for index in range(NUM_BINS)])
        shift = 0.06 * (place - (len(judged) - 1) / 2)
        _draw_points(axes, estimates, shift, evaluation_color(place), name, hollow=False)
    _bin_axis(axes)
    title_with_legend(axes, "Wrong answers")


def _draw_points(
    axes: Axes, estimates: Sequence[Estimate], shift: float, color: str, label: str, *, hollow: bool
) -> None:
    known = [(index + shift, e.value, e.low, e.high) for index, e in enumerate(estimates) if e.value is not None]
    x, value, low, high = np.array(known, dtype=np.float64).reshape(-1, 4).T
    axes.vlines(x, low, high, color=color, linewidth=1.2, alpha=0.6)
    style = _HOLLOW if hollow else {}
    axes.plot(x, value, marker="o", markersize=5.5, color=color, linewidth=1.6, label=label or "_", **style)


def _bin_axis(axes: Axes) -> None:
    axes.set_xticks(range(NUM_BINS), _BIN_LABELS)
    axes.set_xlim(-0.4, NUM_BINS - 0.6)
    axes.set_xlabel(_FFP_LABEL)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def evaluation_color(place: int) -> str:
    """The colour of the evaluation that is drawn in this place."""
    return EVALUATION_COLORS[place % len(EVALUATION_COLORS)]
