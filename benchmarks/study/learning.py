"""How methods learn: what their training completions were like on the way, on the same prompts in the same order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from study.statistics import LEVEL, RESAMPLES, Difference, ratio, sign_flip_p, weights

from mrpo.estimates import Floats, summarize_draws

# Metrics of a training step, and what they are called.
CURVES = {
    "answer/symbolic": "accuracy",
    "failures/early": "early failures",
    "valid_steps": "valid steps",
    "far": "failure accumulation rate",
}
WINDOWS = 4


@dataclass(frozen=True)
class Window:
    """Steps `first` to `last`, counted from 1; the mean of each cell over them."""

    first: int
    last: int
    by_cell: Floats


def read_curve(metrics: Path, key: str) -> list[float]:
    """One value a step; NaN where it has none, as FAR without a failure."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return [float(value) if (value := json.loads(line).get(key)) is not None else np.nan for line in lines]


def mean_curve(curves: Mapping[str, Sequence[float]]) -> Floats:
    """(S,) means over the cells that have a value."""
    values = np.array(list(curves.values()))
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))


def windows(curves: Mapping[str, Sequence[float]], count: int = WINDOWS) -> list[Window]:
    """The curves by cell, cut into `count` parts of equal length as nearly as can be."""
    values = np.array(list(curves.values()))
    parts = np.array_split(np.arange(values.shape[1]), min(count, values.shape[1]))
    known = ~np.isnan(values)
    sums = np.where(known, values, 0.0)
    return [
        Window(int(part[0]) + 1, int(part[-1]) + 1, ratio(sums[:, part].sum(axis=1), known[:, part].sum(axis=1)))
        for part in parts
    ]


def learning_difference(first: Window, second: Window, *, seed: int = 0) -> Difference:
    """Second minus first, of the same cells, which are resampled."""
    of_cells = second.by_cell - first.by_cell
    drawn = weights(np.random.default_rng(seed), len(of_cells), max(1, len(of_cells) - 1), RESAMPLES)
    means = drawn @ of_cells / drawn.sum(axis=1)
    estimate = summarize_draws(of_cells.mean(), means, LEVEL)
    return Difference(estimate, sign_flip_p(of_cells), int((of_cells > 0).sum()), len(of_cells))
