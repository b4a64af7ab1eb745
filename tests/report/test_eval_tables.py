from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from assessed_items import item
from completion_rows import completion_row, question_row, write_rows
from rich.console import Console

from mrpo.assessment import read_models
from mrpo.assessment.content import build_content
from mrpo.config import Config
from mrpo.report.eval_tables import paired_table, summary_table, write_tables


def content(tmp_path: Path, datasets: tuple[str, ...], samples: int = 1, validity: str | None = "xv") -> dict[str, Any]:
    """Two models on two questions of each data set; the second is right wherever the first is, and once more."""
    rows = [
        question_row(id, [completion_row("a")] * samples, dataset=dataset) for dataset in datasets for id in ("1", "2")
    ]
    models = read_models([write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("a_b", "c")], [])
    assessed = {
        model.name: [
            item(id, validity, dataset=dataset, sample=sample, correct=id == "1" or model.name == "c")
            for dataset in datasets
            for id in ("1", "2")
            for sample in range(samples)
        ]
        for model in models
    }
    return build_content(models, assessed, "steps: someone; answers: someone", Config(), 20)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def shown(table: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()


def test_one_data_set_needs_no_average(tmp_path: Path) -> None:
    write_tables(content(tmp_path, ("rad",)), tmp_path)
    for name in ("accuracy", "reasoning", "failures", "tests"):
        assert {row["dataset"] for row in rows_of(tmp_path / f"{name}.csv")} == {"rad"}
    write_tables(content(tmp_path, ("rad", "slake")), tmp_path)
    for name in ("accuracy", "reasoning", "failures", "tests"):
        assert {row["dataset"] for row in rows_of(tmp_path / f"{name}.csv")} == {"rad", "slake", "average"}


def test_numbers(tmp_path: Path) -> None:
    write_tables(content(tmp_path, ("rad", "slake")), tmp_path)
    accuracy = {(row["model"], row["dataset"]): row for row in rows_of(tmp_path / "accuracy.csv")}
    assert float(accuracy["a_b", "average"]["accuracy"]) == 0.5
    assert accuracy["a_b", "average"]["n"] == "4"
    assert accuracy["c", "rad"]["accuracy"] == "1.0"
    failures = {row["metric"]: row for row in rows_of(tmp_path / "failures.csv") if row["dataset"] == "rad"}
    assert float(failures["first failure point"]["value"]) == 0.5
    assert float(failures["failure accumulation rate"]["value"]) == 0.0
    assert failures["incorrect answers, FFP 0.0-0.2"]["value"] == ""
    test = next(row for row in rows_of(tmp_path / "tests.csv") if row["dataset"] == "average")
    assert (test["metric"], test["first"], test["second"]) == ("accuracy", "a_b", "c")
    assert (float(test["difference"]), test["first_only"], test["second_only"]) == (0.5, "0", "2")
    assert float(test["mcnemar_p"]) == 0.5
    assert r"a\_b & rad & 2 & 50.0 [" in (tmp_path / "accuracy.tex").read_text()
    assert "| a\\_b | rad | 2 | 50.0 " in (tmp_path / "accuracy.md").read_text()


def test_samples_get_columns(tmp_path: Path) -> None:
    found = content(tmp_path, ("rad",), samples=3)
    write_tables(found, tmp_path)
    row = rows_of(tmp_path / "accuracy.csv")[0]
    assert (float(row["mean@3"]), float(row["pass@3"])) == (0.5, 0.5)
    assert "pass@3" in shown(summary_table(found))


def test_the_terminal_names_unjudged_steps_only_where_there_are_some(tmp_path: Path) -> None:
    judged = shown(summary_table(content(tmp_path, ("rad",))))
    assert "unjudged" not in judged
    assert "95 % bootstrap intervals over questions; steps: someone; answers: someone" in judged
    unjudged = content(tmp_path, ("rad",), validity=None)
    assert "unjudged" in shown(summary_table(unjudged))
    assert "+50.0" in shown(paired_table(unjudged))
