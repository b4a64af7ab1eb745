"""The tables of an evaluation, from the content of its eval.json (see `mrpo.assessment`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mrpo.estimates import Estimate
from mrpo.report.export import Cell, Column, Row, to_rich, write_table

_MODEL, _DATASET = Column("model", "Model", is_text=True), Column("dataset", "Data set", is_text=True)
_WHERE = (_MODEL, _DATASET, Column("n", "Questions"))

_UNJUDGED = Column("unjudged_steps", "Steps unjudged", percent=True)
_ACCURACY = (
    Column("accuracy", "Accuracy", percent=True),
    Column("exact", "Exact match", percent=True),
    Column("lexical", "Lexical score", percent=True),
)
_REASONING = (
    Column("valid_steps", "Valid steps", percent=True),
    Column("fully_valid", "Fully valid", percent=True),
    Column("num_steps", "Steps", digits=2),
    Column("num_tokens", "Tokens"),
    Column("truncated", "Truncated", percent=True),
    Column("format", "Follows the format", percent=True),
    _UNJUDGED,
    Column("unjudged_answers", "Answer unjudged", percent=True),
)
_FAILURES = (
    _MODEL,
    _DATASET,
    Column("metric", "Quantity", is_text=True),
    Column("over", "Over completions", is_text=True),
    Column("value", "Value", percent=True),
    Column("n", "Completions"),
)
_FAILURE_METRICS = ("early_", "mid_", "late_", "failed", "ffp", "far", "incorrect_")
_TESTS = (
    _DATASET,
    Column("metric", "Quantity", is_text=True),
    Column("first", "First", is_text=True),
    Column("second", "Second", is_text=True),
    Column("difference", "Second - first", digits=3, signed=True),
    Column("p", "p (bootstrap)", digits=4),
    Column("first_only", "Only first right"),
    Column("second_only", "Only second right"),
    Column("mcnemar_p", "p (McNemar)", digits=4),
    Column("n", "Questions"),
)


def write_tables(content: Mapping[str, Any], folder: Path) -> None:
    """Writes FOLDER/accuracy, reasoning, failures and tests, each as .csv, .md and .tex.

    Raises:
        OSError: a file cannot be written.
    """
    accuracy = [*_ACCURACY, *_sample_columns(content)]
    write_table(_by_dataset(content, accuracy), [*_WHERE, *accuracy], folder / "accuracy")
    write_table(_by_dataset(content, _REASONING), [*_WHERE, *_REASONING], folder / "reasoning")
    write_table(_failure_rows(content), _FAILURES, folder / "failures")
    write_table(_test_rows(content), _TESTS, folder / "tests")


def summary_table(content: Mapping[str, Any]) -> Table:
    """What the terminal shows: accuracy and the main figures of reasoning."""
    columns = [
        Column("accuracy", "Accuracy", percent=True),
        *_sample_columns(content),
        Column("valid_steps", "Valid steps", percent=True),
        Column("early_of_failures", "Early failures", percent=True),
        Column("far", "FAR", percent=True),
    ]
    rows = _by_dataset(content, [*columns, _UNJUDGED])
    if any(isinstance(share := row.get(_UNJUDGED.key), Estimate) and share.value for row in rows):
        columns.append(_UNJUDGED)
    caption = f"{100 * content['settings']['level']:g} % bootstrap intervals over questions; {content['judge']}"
    return to_rich(rows, [*_WHERE, *columns], title="Evaluation", caption=caption)


def paired_table(content: Mapping[str, Any]) -> Table:
    """Accuracy of every two models, tested on the same questions."""
    rows = [row for row in _test_rows(content) if row["key"] == "accuracy"]
    points = Column("difference", "Second - first", percent=True, signed=True)
    columns = [points if c.key == points.key else c for c in _TESTS if c.key != "metric"]
    return to_rich(rows, columns, title="Accuracy, paired", caption="")


def _sample_columns(content: Mapping[str, Any]) -> list[Column]:
    """mean@k and pass@k of the models that have several completions per question."""
    counts = sorted({model["samples"] for model in content["models"].values() if model["samples"] > 1})
    return [Column(f"{kind}@{k}", f"{kind}@{k}", percent=True) for k in counts for kind in ("mean", "pass")]


def _datasets(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data sets, and the average where it is one of several."""
    return dict(list(model["datasets"].items())[:1]) if len(model["datasets"]) == 2 else model["datasets"]


def _by_dataset(content: Mapping[str, Any], columns: Sequence[Column]) -> list[Row]:
    return [
        {"model": name, "dataset": dataset, "n": metrics["exact"]["n"]}
        | {column.key: _estimate(metrics[column.key]) for column in columns if column.key in metrics}
        for name, model in content["models"].items()
        for dataset, metrics in _datasets(model).items()
    ]


def _failure_rows(content: Mapping[str, Any]) -> list[Row]:
    described = {k: info for k, info in content["metrics"].items() if k.startswith(_FAILURE_METRICS)}
    return [
        {
            "model": name,
            "dataset": dataset,
            "metric": info["name"],
            "over": info["over"],
            "value": _estimate(metrics[key]),
            "n": metrics[key]["n"],
        }
        for name, model in content["models"].items()
        for dataset, metrics in _datasets(model).items()
        for key, info in described.items()
    ]


def _test_rows(content: Mapping[str, Any]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    shown = {dataset for model in content["models"].values() for dataset in _datasets(model)}
    for test in (test for test in content["tests"] if test["dataset"] in shown):
        info, mcnemar = content["metrics"][test["metric"]], test["mcnemar"] or {}
        name = info["name"] if info["over"] == "first" else f"{info['name']} ({info['over']})"
        rows.append(
            {
                "key": test["metric"],
                "dataset": test["dataset"],
                "metric": name,
                "first": test["first"],
                "second": test["second"],
                "difference": _estimate(test["difference"]),
                "p": test["p"],
                "first_only": mcnemar.get("first_only"),
                "second_only": mcnemar.get("second_only"),
                "mcnemar_p": mcnemar.get("p"),
                "n": test["difference"]["n"],
            }
        )
    return rows


def _estimate(figure: Mapping[str, Any]) -> Estimate:
    return Estimate(figure["value"], figure["low"], figure["high"])
