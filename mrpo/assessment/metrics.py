"""What is measured of a model's completions, and its means with bootstrap intervals over questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mrpo.assessment.assessed import Assessed
from mrpo.estimates import (
    Floats,
    mean,
    question_ids,
    resampled_means,
    sum_by_question,
    summarize_draws,
    with_exact_ends,
)
from mrpo.metrics import NUM_BINS, STAGES, first_failure_point
from mrpo.quantities import far, fully_valid, incorrect_in_bin, is_in_stage, is_in_stage_of_failures, rate_in_bin
from mrpo.records import Unjudged

LEVEL = 0.95
SEED = 0  # of the resampling; the same for all models, so that differences are paired


@dataclass(frozen=True)
class Metric:
    """A metric: its key, its name, the completions it is taken over, and what it asks of one.

    `is_tested` says that models are tested for a difference in it: of the bins there are too many.
    """

    key: str
    name: str
    over: str
    percent: bool
    quantity: Callable[[Assessed], float | None]
    is_tested: bool = True


def _of_first(quantity: Callable[[Assessed], float | None]) -> Callable[[Assessed], float | None]:
    return lambda item: quantity(item) if item.sample == 0 else None


def _correct(item: Assessed) -> float | None:
    return None if item.correct is None else float(item.correct)


def _failed(item: Assessed) -> float | None:
    return None if item.validity is None else float(not all(item.validity))


def _ffp(item: Assessed) -> float | None:
    return first_failure_point(item.validity or ())


def _valid_steps(item: Assessed) -> float | None:
    return sum(item.validity) / len(item.validity) if item.validity else None


def bin_label(index: int) -> str:
    """The bounds of a bin of first failure points, as 0.2-0.4; the upper one belongs to it."""
    return f"{index / NUM_BINS:.1f}-{(index + 1) / NUM_BINS:.1f}"


def _bins() -> list[Metric]:
    bins = []
    for index in range(NUM_BINS):
        label, number = f"FFP {bin_label(index)}", index + 1
        for correct, word in ((True, "correct"), (False, "incorrect")):
            name, over = f"failure accumulation rate, {label}", f"failed in the bin, {word}"
            bins.append(Metric(f"far_{word}_bin{number}", name, over, True, rate_in_bin(index, correct=correct), False))
        over, quantity = "failed in the bin", incorrect_in_bin(index)
        bins.append(Metric(f"incorrect_bin{number}", f"incorrect answers, {label}", over, True, quantity, False))
    return sorted(bins, key=lambda metric: metric.key.rpartition("_")[0])


METRICS: tuple[Metric, ...] = (
    Metric("accuracy", "accuracy", "first", True, _of_first(_correct)),
    Metric("exact", "exact match", "first", True, _of_first(lambda item: float(item.exact))),
    Metric("lexical", "lexical score", "first", True, _of_first(lambda item: item.lexical)),
    *(Metric(f"{s}_of_failures", f"{s} failures", "failed", True, is_in_stage_of_failures(s)) for s in STAGES),
    *(Metric(f"{s}_of_all", f"{s} failures", "judged", True, is_in_stage(s)) for s in STAGES),
    Metric("failed", "completions with an invalid step", "judged", True, _failed),
    Metric("ffp", "first failure point", "failed", True, _ffp),
    Metric("far", "failure accumulation rate", "failed before the last step", True, far),
    *_bins(),
    Metric("valid_steps", "valid steps", "judged, with steps", True, _valid_steps),
    Metric("fully_valid", "fully valid chains", "judged", True, fully_valid),
    Metric("num_steps", "steps", "all", False, lambda item: float(len(item.scored.steps))),
    Metric("num_tokens", "tokens", "all", False, lambda item: float(len(item.scored.completion.token_ids))),
    Metric("truncated", "truncated", "all", True, lambda i: float(i.scored.completion.finish_reason == "length")),
    Metric("format", "follows the format", "all", True, lambda item: float(item.well_formed)),
    Metric("unjudged_steps", "steps unjudged", "all", True, lambda i: float(isinstance(i.scored.verdict, Unjudged))),
    Metric("unjudged_answers", "answer unjudged", "all", True, lambda item: float(item.correct is None)),
)


@dataclass(frozen=True)
class MetricTable:
    """Of each of Q questions and M metrics the sum of its values and their number: two (Q, M) float64."""

    metrics: tuple[Metric, ...]
    questions: tuple[str, ...]
    datasets: tuple[str, ...]
    sums: Floats
    counts: Floats

    def of(self, dataset: str) -> MetricTable:
        """The rows of one data set."""
        rows = [place for place, name in enumerate(self.datasets) if name == dataset]
        questions, datasets = (tuple(names[row] for row in rows) for names in (self.questions, self.datasets))
        return MetricTable(self.metrics, questions, datasets, self.sums[rows], self.counts[rows])

    def draw(self, resamples: int) -> Floats:
        """The metrics of `resamples` draws of the questions, (resamples, M); the same draws for equal questions."""
        return resampled_means(self.sums, self.counts, seed=SEED, resamples=resamples)

    def summarize(self, draws: Floats) -> dict[str, dict[str, Any]]:
        """`{key: {"value", "low", "high", "n"}}` with the intervals of `draws`, as eval.json has it."""
        values, numbers = mean(self.sums, self.counts), self.counts.sum(axis=0)
        questions = (self.counts > 0).sum(axis=0)
        figures = {}
        for m, metric in enumerate(self.metrics):
            estimate = summarize_draws(values[m], draws[:, m], LEVEL)
            if metric.percent:
                estimate = with_exact_ends(estimate, int(questions[m]), LEVEL)
            figures[metric.key] = asdict(estimate) | {"n": int(numbers[m])}
        return figures


def tabulate(assessed: Sequence[Assessed], samples: int) -> MetricTable:
    """The table of a model's completions, `samples` of each question."""
    questions = question_ids(assessed)
    dataset_of = {item.question_id: item.dataset for item in assessed}
    metrics = METRICS if samples == 1 else METRICS + _of_samples(assessed, samples)
    columns = [sum_by_question(assessed, questions, metric.quantity) for metric in metrics]
    sums, counts = np.array(columns).transpose(1, 2, 0)
    return MetricTable(metrics, tuple(questions), tuple(dataset_of[q] for q in questions), sums, counts)


def _of_samples(assessed: Sequence[Assessed], k: int) -> tuple[Metric, ...]:
    """Accuracy over all k completions of a question, and whether any is right; undefined where none is known to be and
    one was not judged."""
    verdicts: dict[str, set[bool | None]] = {}
    for item in assessed:
        verdicts.setdefault(item.question_id, set()).add(item.correct)

    def passed(item: Assessed) -> float | None:
        found = verdicts[item.question_id]
        return None if None in found and True not in found else float(True in found)

    return (
        Metric(f"mean@{k}", f"mean@{k}", "all", True, _correct),
        Metric(f"pass@{k}", f"pass@{k}", "questions", True, _of_first(passed)),
    )
