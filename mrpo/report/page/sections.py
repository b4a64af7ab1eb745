"""What the page says of its sources: cards, and sections of figures and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from mrpo.estimates import Estimate
from mrpo.quantities import Judged
from mrpo.records import EvaluatedSample
from mrpo.report import failures
from mrpo.report.curves import collect_series
from mrpo.report.page import figures, paper, tables
from mrpo.report.page.collect import Evaluation, Run, Sources
from mrpo.report.page.tables import PageTable
from mrpo.report.style import TIME_COLORS
from mrpo.report.table import before_after_table
from mrpo.telemetry.text import UNDEFINED

_SEED = 0
_RESAMPLES = 1000
_NO_VERDICTS = "no judged completion in any source, so no failure figures"


@dataclass(frozen=True)
class PageFigure:
    stem: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    figures: tuple[PageFigure, ...] = ()
    tables: tuple[PageTable, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """A source at a glance."""

    kind: str
    name: str
    folder: str
    facts: Sequence[tuple[str, str]]
    missing: Sequence[str] = field(default_factory=tuple)


def cards(sources: Sources) -> list[Card]:
    """One card a source, in the order of the command line."""
    return [*map(_run_card, sources.runs), *map(_evaluation_card, sources.evaluations)]


def summary_tables(sources: Sources) -> list[PageTable]:
    """Before and after of each run, the metrics of each evaluation, and the settings of the runs."""
    shown = []
    for number, run in enumerate(sources.runs, start=1):
        before, after = run.evaluations.get("before"), run.evaluations.get("after")
        if before and after and {s.question_id for s in before} == {s.question_id for s in after}:
            shown.append(tables.before_after(run, before_after_table(before, after), f"before_after_{number}"))
    for number, evaluation in enumerate(sources.evaluations, start=1):
        shown.append(tables.evaluation_metrics(evaluation, f"evaluation_{number}"))
    settings = tables.settings(sources.runs)
    return [*shown, settings] if settings else shown


def sections(sources: Sources) -> list[Section]:
    """Everything between the summary and the traces."""
    judged: Mapping[str, Sequence[Judged]] = failures.only_judged(sources.judged())
    return [_curves(sources), _failures(judged), _accuracy(sources), _time(sources)]


def _run_card(run: Run) -> Card:
    get = run.config.get
    planned = get("optim.steps")
    done = max((int(record["step"]) for record in run.metrics), default=0)
    facts = [
        ("algorithm", str(get("algorithm", UNDEFINED))),
        ("model", str(get("model.path", UNDEFINED))),
        ("data", str(get("data.name", UNDEFINED))),
        ("steps", f"{done:,} of {planned:,}" if isinstance(planned, int) else f"{done:,}"),
    ]
    accuracies = {when: _accuracy_of(samples).value for when, samples in run.evaluations.items()}
    known = {when: f"{100 * value:.1f}" for when, value in accuracies.items() if value is not None}
    if known:
        facts.append((f"accuracy {', '.join(known)}", " → ".join(known.values()) + " %"))
    rewards = [record["reward"] for record in run.metrics if _is_number(record.get("reward"))]
    if rewards:
        facts.append(("mean reward", f"{rewards[0]:.2f} → {rewards[-1]:.2f}"))
    return Card("training run", run.name, str(run.folder), facts, run.missing)


def _evaluation_card(evaluation: Evaluation) -> Card:
    datasets = {name for model in evaluation.models for name in model.datasets if name != tables.AVERAGE}
    facts = [
        ("models", ", ".join(model.name for model in evaluation.models) or UNDEFINED),
        ("data sets", ", ".join(sorted(datasets)) or UNDEFINED),
        ("judge", evaluation.judge or UNDEFINED),
    ]
    return Card("evaluation", evaluation.name, str(evaluation.folder), facts, evaluation.missing)


def _curves(sources: Sources) -> Section:
    series = {run.name: collect_series(run.metrics) for run in sources.runs}
    figure = figures.training_curves(series)
    if figure is None:
        return Section("curves", "Training curves", missing=("no training run with metrics among the sources",))
    caption = "Over the steps of training: faint as measured, strong smoothed over about a twelfth of the run."
    return Section("curves", "Training curves", (PageFigure("curves", "Training curves", caption, figure),))


def _failures(judged: Mapping[str, Sequence[Judged]]) -> Section:
    how: dict[str, Any] = {"seed": _SEED, "resamples": _RESAMPLES}
    drawn = [
        _figure(
            "failure_stages",
            "Where completions first fail",
            "Stage of the first invalid step, the thirds of a chain, with 95 % bootstrap intervals over questions. "
            f"Hatched: the paper's numbers for {paper.CASCADE_BACKBONE}, of its failing samples ({paper.SOURCE}).",
            figures.failure_stages(judged, **how),
        ),
        _figure(
            "failure_accumulation",
            "Failure accumulation rate over the first failure point",
            "Share of invalid steps after the first one, by where that stands and by right and wrong answers. "
            f"Hatched: the paper's rate in its earliest bin, {paper.CASCADE_BACKBONE} ({paper.SOURCE}).",
            figures.failure_accumulation(judged, **how),
        ),
        _figure(
            "incorrect_answers",
            "Incorrect rate over the first failure point",
            "Share of wrong answers among the completions whose first invalid step stands there. The paper "
            f"({paper.SOURCE}) draws this figure without giving its numbers.",
            figures.incorrect_answers(judged, **how),
        ),
    ]
    present = tuple(figure for figure in drawn if figure is not None)
    missing = () if present else (_NO_VERDICTS,)
    return Section("failures", "Failure cascades", present, (tables.cascades(judged, **how),), missing)


def _figure(stem: str, title: str, caption: str, figure: Figure | None) -> PageFigure | None:
    return None if figure is None else PageFigure(stem, title, caption, figure)


def _accuracy(sources: Sources) -> Section:
    of_runs = {
        f"{run.name}, {when}": (str(run.config.get("data.name") or "held out"), _accuracy_of(samples))
        for run in sources.runs
        for when, samples in run.evaluations.items()
    }
    ours = tables.accuracy(of_runs, sources.models)
    tests = [tables.paired_tests(e, f"differences_{n}") for n, e in enumerate(sources.evaluations, start=1)]
    shown = [table for table in (ours, *tests, tables.paper_accuracy()) if table is not None]
    missing = () if ours else ("no evaluation among the sources, so no accuracy of ours",)
    return Section("accuracy", "Answer accuracy", (), tuple(shown), missing)


def _time(sources: Sources) -> Section:
    times = {run.name: mean_times(run.metrics) for run in sources.runs}
    known = {name: parts for name, parts in times.items() if parts is not None}
    figure = figures.step_times(known)
    if figure is None:
        return Section("time", "Step time", missing=("no training run with step times among the sources",))
    caption = (
        "Mean seconds of a training step: sampling completions, their log-probabilities, waiting for verdicts, "
        "updating the policy, bringing its weights to the rollout engine, and the rest."
    )
    return Section(
        "time",
        "Step time",
        (PageFigure("step_times", "Step time", caption, figure),),
        (tables.step_times(known),),
        tuple(f"{name}: no step times" for name in times if name not in known),
    )


def mean_times(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean seconds of each part of a step, over the steps that have a total; a part that is missing took none."""
    steps = [record for record in metrics if _is_number(record.get("time/step"))]
    if not steps:
        return None

    def seconds(record: Mapping[str, Any], part: str) -> float:
        value = record.get(f"time/{part}")
        return float(value) if value is not None and _is_number(value) else 0.0

    named = {part: fmean(seconds(record, part) for record in steps) for part in TIME_COLORS if part != "other"}
    whole = fmean(seconds(record, "step") for record in steps)
    return {**named, "other": max(0.0, whole - sum(named.values()))}


def _accuracy_of(samples: Sequence[EvaluatedSample]) -> Estimate:
    return failures.estimate_each(samples, [_greedy_correct], seed=_SEED, resamples=_RESAMPLES)[0]


def _greedy_correct(sample: Any) -> float | None:
    return float(sample.correct) if sample.greedy else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
