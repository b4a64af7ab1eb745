"""The page's tables; each is written as CSV, Markdown and LaTeX too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrpo.estimates import Estimate
from mrpo.metrics import NUM_BINS, STAGES
from mrpo.quantities import Judged, is_in_stage_of_failures, rate_in_bin
from mrpo.report.export import Column, Row
from mrpo.report.failures import estimate_each
from mrpo.report.page import paper
from mrpo.report.page.collect import EvaluatedModel, Evaluation, Run
from mrpo.report.style import TIME_COLORS
from mrpo.report.table import BeforeAfter, row_style

AVERAGE = "average"
_HIGHLIGHTS = (
    "algorithm",
    "model.path",
    "data.name",
    "judge.kind",
    "seed",
    "optim.steps",
    "optim.batch_size",
    "optim.lr",
    "rollout.group_size",
    "rollout.max_tokens",
    "loss.beta",
)
# No settings of the method, and different in any two runs.
_PRIVATE = ("output_dir", "log.", "checkpoint.")
_SHOWN_METRICS = ("accuracy", "exact", "lexical", "early_of_failures", "far", "valid_steps", "num_steps", "format")


@dataclass(frozen=True)
class PageTable:
    """`stem` names its files; `styles`: (row, key of the column) -> "better" or "worse"; `from_paper`: its rows."""

    stem: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""
    styles: Mapping[tuple[int, str], str] = field(default_factory=dict)
    from_paper: frozenset[int] = frozenset()


def _text(key: str, title: str | None = None) -> Column:
    return Column(key, title or key, is_text=True)


def _estimate(figure: Mapping[str, Any] | None, scale: float = 1.0) -> Estimate:
    """An entry of eval.json; what is missing or not a number is undefined."""
    values = [(figure or {}).get(key) for key in ("value", "low", "high")]
    value, low, high = (scale * float(v) if isinstance(v, int | float) else None for v in values)
    return Estimate(value, low, high)


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    return _estimate({"value": estimate.value, "low": estimate.low, "high": estimate.high}, scale)


def before_after(run: Run, table: BeforeAfter, stem: str) -> PageTable:
    """The table that ended the run."""
    rows: list[Row] = []
    styles = {}
    for place, row in enumerate(table.rows):
        scale = 100.0 if row.percent else 1.0
        figures = {name: _scaled(getattr(row, name), scale) for name in ("before", "after", "difference")}
        rows.append({"metric": f"{row.name} (%)" if row.percent else row.name, "over": row.over, **figures})
        styles[place, "difference"] = {"green": "better", "red": "worse"}.get(row_style(row), "")
    columns = (
        _text("metric"),
        _text("over"),
        Column("before", "before", digits=2),
        Column("after", "after", digits=2),
        Column("difference", "difference", digits=2, signed=True),
    )
    return PageTable(
        stem, f"Before and after training: {run.name}", columns, tuple(rows), f"{table.caption}.", styles=styles
    )


def settings(runs: Sequence[Run]) -> PageTable | None:
    """What a reader looks for first, and every setting in which the runs differ."""
    known = [run for run in runs if run.config]
    keys = {key for run in known for key in run.config if not key.startswith(_PRIVATE)}
    differing = [key for key in keys - set(_HIGHLIGHTS) if len({str(run.config.get(key)) for run in known}) > 1]
    shown = [key for key in _HIGHLIGHTS if key in keys] + sorted(differing)
    rows = [{"setting": key, **{run.name: _setting(run.config.get(key)) for run in known}} for key in shown]
    if not rows:
        return None
    columns = (_text("setting"), *(_text(run.name) for run in known))
    return PageTable("settings", "Settings", columns, tuple(rows))


def _setting(value: Any) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def evaluation_metrics(evaluation: Evaluation, stem: str) -> PageTable:
    """Models by metrics, over all data sets."""
    averages = {model.name: _average(model) for model in evaluation.models}
    present = {key for figures in averages.values() for key in figures}
    shown = [key for key in (*_SHOWN_METRICS, *sorted(key for key in present if "@" in key)) if key in present]
    rows: list[Row] = [
        {
            "model": name,
            "questions": _num_questions(figures),
            **{key: _estimate(figures.get(key)) for key in shown},
        }
        for name, figures in averages.items()
    ]
    columns = [_text("model"), Column("questions", "questions")]
    columns += [Column(key, evaluation.metric_name(key), percent=evaluation.is_percent(key)) for key in shown]
    note = f"All data sets together, weighted by their items; 95 % bootstrap intervals. Judge: {evaluation.judge}."
    return PageTable(stem, f"Evaluation: {evaluation.name}", tuple(columns), tuple(rows), note)


def _num_questions(figures: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Every question has an exact match; an accuracy, as older evaluations have it alone, only one that was judged."""
    return next((figures[key].get("n") for key in ("exact", "accuracy") if figures.get(key)), None)


def _average(model: EvaluatedModel) -> Mapping[str, Mapping[str, Any]]:
    """The figures over all data sets; those of the first where there is no average."""
    return model.datasets.get(AVERAGE) or next(iter(model.datasets.values()), {})


def accuracy(runs: Mapping[str, tuple[str, Estimate]], models: Sequence[EvaluatedModel]) -> PageTable | None:
    """Answer accuracy by data set. `runs`: name -> data set and accuracy of an evaluation of a run."""
    rows: list[Row] = [{"evaluation": name, dataset: estimate} for name, (dataset, estimate) in runs.items()]
    for model in models:
        of_datasets = {name: _estimate(figures.get("accuracy")) for name, figures in model.datasets.items()}
        rows.append({"evaluation": model.name, **of_datasets})
    if not rows:
        return None
    datasets = list(dict.fromkeys(key for row in rows for key in row if key not in ("evaluation", AVERAGE)))
    if any(len(model.datasets.keys() - {AVERAGE}) > 1 for model in models):
        datasets.append(AVERAGE)
    columns = (_text("evaluation"), *(Column(dataset, dataset, percent=True) for dataset in datasets))
    note = "With 95 % bootstrap intervals over questions. The average is weighted by items."
    return PageTable("accuracy", "Answer accuracy", columns, tuple(rows), note)


def paper_accuracy() -> PageTable:
    """The paper's accuracy table."""
    rows: list[Row] = [
        {"backbone": backbone, **{m: value / 100 for m, value in zip(paper.METHODS, values, strict=True)}}
        for backbone, values in paper.ACCURACY.items()
    ]
    columns = (_text("backbone"), *(Column(method, method, digits=2, percent=True) for method in paper.METHODS))
    note = f"The paper's numbers, not ours: {paper.SOURCE}, average accuracy over its eight data sets."
    from_paper = frozenset(range(len(rows)))
    return PageTable(
        "paper_accuracy", "Answer accuracy in the paper", columns, tuple(rows), note, from_paper=from_paper
    )


def cascades(judged: Mapping[str, Sequence[Judged]], *, seed: int, resamples: int) -> PageTable:
    """Shares of the stages among failures and the rate in the earliest bin; the paper's rows beneath ours."""
    keys = (*STAGES, "far_wrong", "far_right")
    quantities = [is_in_stage_of_failures(stage) for stage in STAGES]
    quantities += [rate_in_bin(0, correct=False), rate_in_bin(0, correct=True)]
    rows: list[Row] = []
    for name, samples in judged.items():
        estimates = estimate_each(samples, quantities, seed=seed, resamples=resamples)
        failed = sum(not all(sample.validity or ()) for sample in samples)
        rows.append(
            {"evaluation": name, "judged": len(samples), "failed": failed, **dict(zip(keys, estimates, strict=True))}
        )
    from_paper = frozenset(range(len(rows), len(rows) + len(paper.STAGE_SHARES)))
    for method, shares in paper.STAGE_SHARES.items():
        of_stages: dict[str, float] = {stage: share / 100 for stage, share in zip(STAGES, shares, strict=True)}
        name = f"paper: {method}, {paper.CASCADE_BACKBONE}"
        rows.append({"evaluation": name, **of_stages, "far_all": paper.EARLIEST_FAR[method] / 100})
    earliest = f"FAR, FFP up to {1 / NUM_BINS:g}"
    columns = (
        _text("evaluation"),
        Column("judged", "judged"),
        Column("failed", "failed"),
        *(Column(stage, stage, percent=True) for stage in STAGES),
        Column("far_wrong", f"{earliest}, wrong answer", percent=True),
        Column("far_right", f"{earliest}, right answer", percent=True),
        Column("far_all", f"{earliest}, as the paper gives it", percent=True),
    )
    note = (
        "Stages: share of completions whose first invalid step lies in that third, of those that have one. FAR: share "
        f"of invalid steps after the first one, where that stands in the earliest fifth. Rows in grey: {paper.SOURCE}."
    )
    title = "Where failures begin, and the earliest bin"
    return PageTable("failures", title, columns, tuple(rows), note, from_paper=from_paper)


def paired_tests(evaluation: Evaluation, stem: str) -> PageTable | None:
    """The evaluation's tests between two models over all data sets, of the metrics that the page shows."""
    rows: list[Row] = []
    for test in evaluation.tests:
        key = str(test.get("metric"))
        is_percent = evaluation.is_percent(key)
        if test.get("dataset", AVERAGE) == AVERAGE and (key in _SHOWN_METRICS or "@" in key):
            rows.append(
                {
                    "models": f"{test.get('second')} − {test.get('first')}",  # noqa: RUF001
                    "metric": evaluation.metric_name(key) + (" (%)" if is_percent else ""),
                    "difference": _estimate(test.get("difference"), 100.0 if is_percent else 1.0),
                    "p": test.get("p"),
                    "p_mcnemar": (test.get("mcnemar") or {}).get("p"),
                }
            )
    if not rows:
        return None
    columns = (
        _text("models"),
        _text("metric"),
        Column("difference", "difference", digits=2, signed=True),
        Column("p", "p, bootstrap", digits=4),
        Column("p_mcnemar", "p, McNemar", digits=4),
    )
    note = "Paired over the questions of all data sets; the difference of shares is in points."
    return PageTable(stem, f"Differences between models: {evaluation.name}", columns, tuple(rows), note)


def step_times(times: Mapping[str, Mapping[str, float]]) -> PageTable:
    """Mean seconds of a step and the share of each part."""
    rows: list[Row] = []
    for name, parts in times.items():
        total = sum(parts.values())
        shares = {f"{part}_share": parts[part] / total if total > 0 else None for part in TIME_COLORS}
        rows.append({"run": name, **parts, "step": total, **shares})
    columns = [
        _text("run"),
        *(Column(part, f"{part.replace('_', ' ')}, s", digits=3) for part in (*TIME_COLORS, "step")),
    ]
    columns += [Column(f"{part}_share", part.replace("_", " "), percent=True) for part in TIME_COLORS]
    note = "Means over the steps that have all times. Other: what a step spends outside the parts named."
    return PageTable("step_times", "Mean step time", tuple(columns), tuple(rows), note)
