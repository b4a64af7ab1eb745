"""The table that ends a run: the policy before and after training on the same held-out questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from mrpo.estimates import (
    Estimate,
    Floats,
    estimate_difference,
    estimate_mean,
    estimate_share,
    question_ids,
    sum_by_question,
)
from mrpo.metrics import first_failure_stage
from mrpo.quantities import far, fully_valid
from mrpo.records import EvaluatedSample
from mrpo.telemetry.text import UNDEFINED


@dataclass(frozen=True)
class Row:
    """One figure of the table. `over` says which completions it is taken over."""

    key: str
    name: str
    over: str
    percent: bool
    higher_is_better: bool
    before: Estimate
    after: Estimate
    difference: Estimate


@dataclass(frozen=True)
class NumJudged:
    """Of how many questions a completion was judged: before, after, and both times."""

    before: int
    after: int
    both: int


@dataclass(frozen=True)
class BeforeAfter:
    """The rows and what they rest on; rendered for the terminal, as Markdown and as JSON."""

    rows: tuple[Row, ...]
    num_questions: int
    num_judged: NumJudged
    level: float

    @property
    def caption(self) -> str:
        judged = self.num_judged
        told = f"{self.num_questions:,} held-out questions"
        if judged.both < self.num_questions:
            told += (
                f", of which {judged.before:,} were judged before, {judged.after:,} after and {judged.both:,} both "
                f"times; differences of judged figures are over these {judged.both:,}"
            )
        level = f"{100 * self.level:g} %"
        return f"{told}; {level} bootstrap intervals over questions, exact ones where all agree"

    def to_rich(self) -> Table:
        """For the terminal: a difference whose interval excludes zero is green (better) or red (worse)."""
        table = Table(
            title="Before and after training", caption=self.caption, title_style="bold", caption_style="dim",
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", caption_justify="left",
        )  # fmt: skip
        table.add_column("", no_wrap=True)
        for name in ("before", "after", "difference"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            styles = ("", "bold", f"bold {row_style(row)}")
            cells = [_two_lines(*cell, style=style) for cell, style in zip(_cells(row), styles, strict=True)]
            table.add_row(_two_lines(row.name, row.over, style=""), *cells)
        return table

    def to_markdown(self) -> str:
        lines = ["| | over | before | after | difference |", "|---|---|---:|---:|---:|"]
        for row in self.rows:
            cells = " | ".join(f"{value} {interval}".strip() for value, interval in _cells(row))
            lines.append(f"| {row.name} | {row.over} | {cells} |")
        return "\n".join([*lines, "", f"{self.caption}.", ""])

    def to_json(self) -> dict[str, Any]:
        """`{key: {before, after, difference}}` of `{value, low, high}`: shares in [0, 1], undefined figures null."""
        figures = {
            row.key: {"before": asdict(row.before), "after": asdict(row.after), "difference": asdict(row.difference)}
            for row in self.rows
        }
        counts = {"num_questions": self.num_questions, "num_judged": asdict(self.num_judged)}
        return {**counts, "level": self.level, **figures}

    def write(self, output_dir: Path) -> None:
        """Write OUTPUT_DIR/summary.md and summary.json."""
        (output_dir / "summary.md").write_text(self.to_markdown(), encoding="utf-8")
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")


def before_after_table(
    before: Sequence[EvaluatedSample],
    after: Sequence[EvaluatedSample],
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> BeforeAfter:
    """Compare two evaluations of the same questions.

    Intervals are percentile bootstrap intervals over questions, exact ones where a share is 0 or 1 in every question;
    that of the difference is paired. A figure without any completion that defines it (early share of failures when
    nothing failed) is undefined, as is its difference.
    Where the judge left questions out, it may have been hard ones: the difference of a figure that rests on verdicts is
    taken over the questions judged both times.

    Raises:
        ValueError: the two evaluations are empty or not of the same questions.
    """
    questions = question_ids(before)
    if not questions or questions != question_ids(after):
        differing = set(questions) ^ set(question_ids(after))
        raise ValueError(f"before and after must be of the same questions, at least one; {len(differing)} differ")
    how: dict[str, Any] = {"seed": seed, "level": level, "resamples": resamples}
    judged_before, judged_after = _judged(before, questions), _judged(after, questions)
    judged_twice = judged_before & judged_after
    rows = []
    for key, name, over, percent, higher_is_better, quantity in _FIGURES:
        sums_before = sum_by_question(before, questions, quantity)
        sums_after = sum_by_question(after, questions, quantity)
        compared = np.ones_like(judged_twice) if quantity is _accuracy else judged_twice
        estimate = estimate_share if percent else estimate_mean
        rows.append(
            Row(
                key,
                name,
                over,
                percent,
                higher_is_better,
                before=estimate(*sums_before, **how),
                after=estimate(*sums_after, **how),
                difference=estimate_difference(_only(compared, sums_before), _only(compared, sums_after), **how),
            )
        )
    num_judged = NumJudged(*(int(judged.sum()) for judged in (judged_before, judged_after, judged_twice)))
    return BeforeAfter(tuple(rows), len(questions), num_judged, level)


def _judged(samples: Sequence[EvaluatedSample], questions: Sequence[str]) -> NDArray[np.bool_]:
    """(Q,) whether a completion of the question was judged."""
    judged = {sample.question_id for sample in samples if sample.validity is not None}
    return np.array([question in judged for question in questions])


def _only(kept: NDArray[np.bool_], sums: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """The sums and counts of `sum_by_question`, nothing in those of the other questions."""
    return sums[0] * kept, sums[1] * kept


def _accuracy(sample: EvaluatedSample) -> float | None:
    return float(sample.correct) if sample.greedy else None


def _early_of_all(sample: EvaluatedSample) -> float | None:
    if not sample.greedy or sample.validity is None:
        return None
    return float(first_failure_stage(sample.validity) == "early")


def _early_of_failures(sample: EvaluatedSample) -> float | None:
    if not sample.greedy or sample.validity is None or first_failure_stage(sample.validity) is None:
        return None
    return float(first_failure_stage(sample.validity) == "early")


def _reward(sample: EvaluatedSample) -> float | None:
    # An unjudged completion lacks its process reward: its sum is not comparable with the others.
    return sample.reward if sample.greedy and sample.validity is not None else None


def _fully_valid(sample: EvaluatedSample) -> float | None:
    return fully_valid(sample) if sample.greedy else None


# Of one completion: its value, or None where the quantity is undefined for it and it does not count.
Quantity = Callable[[EvaluatedSample], float | None]

# (key, name, over, percent, higher is better, quantity). FAR is taken over sampled completions too, if there are any:
# it is defined only where a step before the last fails, which is rare after training.
_FIGURES: tuple[tuple[str, str, str, bool, bool, Quantity], ...] = (
    ("accuracy", "answer accuracy", "all", True, True, _accuracy),
    ("early_of_all", "early-stage failures", "judged", True, False, _early_of_all),
    ("early_of_failures", "early share of failures", "failed", True, False, _early_of_failures),
    ("far", "failure accumulation rate", "failed before the last step", True, False, far),
    ("reward", "mean reward", "judged", False, True, _reward),
    ("fully_valid", "fully valid chains", "judged", True, True, _fully_valid),
)


def _cells(row: Row) -> list[tuple[str, str]]:
    """Value and interval of before, after and difference."""
    return [
        _cell(row.before, percent=row.percent, sign=""),
        _cell(row.after, percent=row.percent, sign=""),
        _cell(row.difference, percent=row.percent, sign="+"),
    ]


def _cell(estimate: Estimate, *, percent: bool, sign: str) -> tuple[str, str]:
    if estimate.value is None:
        return UNDEFINED, ""
    scale, digits = (100.0, 1) if percent else (1.0, 2)
    unit = (" points" if sign else " %") if percent else ""
    value = f"{scale * estimate.value:{sign}.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return value, ""
    low, high = (f"{scale * end:{sign}.{digits}f}" for end in (estimate.low, estimate.high))
    return value, f"[{low}, {high}]"


def _two_lines(value: str, note: str, *, style: str) -> Text:
    return Text.assemble((value, style), "\n", (note, "dim"))


def row_style(row: Row) -> str:
    """Green for a difference that is better for sure, red for a worse one, "" where its interval holds zero."""
    if row.difference.low is None or row.difference.high is None or row.difference.low <= 0.0 <= row.difference.high:
        return ""
    return "green" if (row.difference.low > 0.0) == row.higher_is_better else "red"
