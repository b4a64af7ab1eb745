"""Tests of a difference between two models on the same questions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from mrpo.assessment.metrics import LEVEL, MetricTable
from mrpo.estimates import Floats, mean, summarize_draws, two_sided_p


def compare(first: MetricTable, second: MetricTable, first_draws: Floats, second_draws: Floats) -> list[dict[str, Any]]:
    """The second minus the first in each tested metric that both have, with interval and p-value; McNemar for accuracy.

    Args:
        first_draws, second_draws: from `MetricTable.draw`, which draws the same questions for both.

    Raises:
        ValueError: the tables are not of the same questions.
    """
    if first.questions != second.questions:
        raise ValueError("a paired test needs the same questions in both tables")
    places = {metric.key: place for place, metric in enumerate(second.metrics)}
    values = mean(first.sums, first.counts), mean(second.sums, second.counts)
    results = []
    for a, metric in enumerate(first.metrics):
        if not metric.is_tested or metric.key not in places:
            continue
        b = places[metric.key]
        draws = second_draws[:, b] - first_draws[:, a]
        both = (first.counts[:, a] > 0) & (second.counts[:, b] > 0)
        difference = summarize_draws(values[1][b] - values[0][a], draws, LEVEL)
        results.append(
            {
                "metric": metric.key,
                "difference": asdict(difference) | {"n": int(both.sum())},
                "p": None if difference.value is None else two_sided_p(draws),
                "mcnemar": _mcnemar(first.sums[both, a], second.sums[both, b]) if metric.key == "accuracy" else None,
            }
        )
    return results


def _mcnemar(first: Floats, second: Floats) -> dict[str, Any] | None:
    """The test on right (1) and wrong (0) answers to the same questions, (Q,) each; None without any question."""
    if not len(first):
        return None
    first_only, second_only = int(np.sum(first > second)), int(np.sum(second > first))
    return {"first_only": first_only, "second_only": second_only, "p": mcnemar_exact(first_only, second_only)}


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """The two-sided exact p-value of McNemar's test: under no difference each discordant question is a fair coin.

    1 when there is no discordant question. McNemar, Psychometrika 12 (1947).
    """
    discordant, fewer = first_only + second_only, min(first_only, second_only)
    term, tail = 1, 1  # the binomial coefficients C(discordant, i) and their sum, as whole numbers
    for i in range(fewer):
        term = term * (discordant - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**discordant)
