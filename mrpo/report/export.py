"""One table as CSV (full numbers), Markdown and LaTeX (booktabs), and for the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from mrpo.estimates import Estimate
from mrpo.telemetry.text import UNDEFINED, clean_text

Cell = str | int | float | Estimate | None
Row = Mapping[str, Cell]

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&#])")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    UNDEFINED: "--",
}
_LATEX_SPECIAL = re.compile("[" + re.escape("".join(_LATEX)) + "]")


@dataclass(frozen=True)
class Column:
    """A column: its key in the rows and in CSV, its title elsewhere, and how its numbers are shown there.

    `percent` numbers are shares in [0, 1], shown times 100 with the sign in the title; `signed` ones are differences.
    """

    key: str
    title: str
    digits: int = 1
    percent: bool = False
    signed: bool = False
    is_text: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} (%)" if self.percent else self.title


def write_table(rows: Sequence[Row], columns: Sequence[Column], path_stem: Path) -> None:
    """Writes PATH_STEM.csv, .md and .tex. A cell that a row lacks is undefined.

    Raises:
        OSError: a file cannot be written.
    """
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".csv", to_csv), (".md", to_markdown), (".tex", to_latex)):
        path_stem.with_name(path_stem.name + suffix).write_text(text(rows, columns), encoding="utf-8")


def to_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Numbers in full; an estimate takes three columns: KEY, KEY_low and KEY_high. Undefined cells are empty."""
    ranged = {c.key for c in columns if any(isinstance(row.get(c.key), Estimate) for row in rows)}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        key for c in columns for key in ((c.key, f"{c.key}_low", f"{c.key}_high") if c.key in ranged else (c.key,))
    )
    for row in rows:
        cells: list[str | int | float | None] = []
        for column in columns:
            cell = row.get(column.key)
            if isinstance(cell, Estimate):
                cells += [cell.value, cell.low, cell.high]
            else:
                plain = show(cell, column) if isinstance(cell, str) else cell
                cells += [plain, *([None, None] if column.key in ranged else [])]
        writer.writerow(cells)
    return file.getvalue()


def to_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A GitHub-flavoured table; an estimate as `value [low, high]`."""
    lines = [[_markdown(column.heading) for column in columns]]
    lines.append(["---" if column.is_text else "---:" for column in columns])
    lines += [[_markdown(show(row.get(column.key), column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A tabular with the rules of booktabs, to be put into a table environment."""
    alignment = "".join("l" if column.is_text else "r" for column in columns)
    head = " & ".join(_latex(column.heading) for column in columns)
    body = [" & ".join(_latex_cell(row.get(column.key), column) for column in columns) for row in rows]
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{alignment}}}", "\\toprule", f"{head} \\\\", "\\midrule"]
    # LaTeX would take a bracket or a star at the start of a line for an argument of the line break before it.
    lines += [*(f"{'{}' if line.startswith(('[', '*')) else ''}{line} \\\\" for line in body), "\\bottomrule"]
    lines.append("\\end{tabular}")
    return "\n".join(lines) + "\n"


def to_rich(rows: Sequence[Row], columns: Sequence[Column], *, title: str, caption: str) -> Table:
    """For the terminal; an interval stands dim under its value."""
    table = Table(
        title=Text(clean_text(title)), caption=Text(clean_text(caption)), title_style="bold", caption_style="dim",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", caption_justify="left",
    )  # fmt: skip
    for column in columns:
        table.add_column(Text(column.heading), justify="left" if column.is_text else "right")
    for row in rows:
        table.add_row(*(_two_lines(row.get(column.key), column) for column in columns))
    return table


def _two_lines(cell: Cell, column: Column) -> Text:
    if not isinstance(cell, Estimate):
        return Text(show(cell, column))
    value, space, interval = show(cell, column).partition(" ")
    return Text.assemble(value, ("\n" if space else ""), (interval, "dim"))


def show(cell: Cell, column: Column) -> str:
    """A cell as plain text on one line."""
    if isinstance(cell, Estimate):
        if cell.value is None:
            return UNDEFINED
        value = _number(cell.value, column)
        if cell.low is None or cell.high is None:
            return value
        return f"{value} [{_number(cell.low, column)}, {_number(cell.high, column)}]"
    if isinstance(cell, str):
        return " ".join(clean_text(cell).split())
    return f"{cell:,}" if isinstance(cell, int) else _number(cell, column)


def _number(value: float | None, column: Column) -> str:
    if value is None:
        return UNDEFINED
    text = f"{value * (100 if column.percent else 1):{'+' if column.signed else ''}.{column.digits}f}"
    return text if float(text) else text.lstrip("+-")


def _markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text)


def _latex(text: str) -> str:
    return _LATEX_SPECIAL.sub(lambda found: _LATEX[found.group()], text)


def _latex_cell(cell: Cell, column: Column) -> str:
    text = _latex(show(cell, column))
    return text if isinstance(cell, str) else re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)
