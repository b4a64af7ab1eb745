from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mrpo.estimates import Estimate
from mrpo.report.export import Column, to_csv, to_latex, to_markdown, to_rich, write_table

NAME = Column("name", "Name", is_text=True)
SHARE = Column("share", "Share", percent=True)
GAIN = Column("gain", "Gain", digits=2, signed=True)
ROWS = [
    {"name": "base", "share": Estimate(0.4567, 0.4, 0.5), "gain": -0.004},
    {"name": "none", "share": Estimate(None, None, None), "gain": None},
    {"name": "more"},
    {"name": "mrpo", "share": 0.5, "gain": -1.5},
]


def test_csv_holds_full_numbers() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(ROWS, [NAME, SHARE, GAIN]))))
    assert rows == [
        ["name", "share", "share_low", "share_high", "gain"],
        ["base", "0.4567", "0.4", "0.5", "-0.004"],
        ["none", "", "", "", ""],
        ["more", "", "", "", ""],
        ["mrpo", "0.5", "", "", "-1.5"],
    ]


def test_markdown() -> None:
    assert to_markdown(ROWS, [NAME, SHARE, GAIN]).splitlines() == [
        "| Name | Share (%) | Gain |",
        "| --- | ---: | ---: |",
        r"| base | 45.7 \[40.0, 50.0\] | 0.00 |",
        "| none | – | – |",  # noqa: RUF001
        "| more | – | – |",  # noqa: RUF001
        "| mrpo | 50.0 | -1.50 |",
    ]


def test_latex() -> None:
    assert to_latex(ROWS, [NAME, SHARE, GAIN]).splitlines() == [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"Name & Share (\%) & Gain \\",
        r"\midrule",
        r"base & 45.7 [40.0, 50.0] & 0.00 \\",
        r"none & -- & -- \\",
        r"more & -- & -- \\",
        r"mrpo & 50.0 & $-$1.50 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_keeps_hyphens_of_text_and_turns_those_of_numbers() -> None:
    table = to_latex([{"name": "x-1", "gain": Estimate(-1.0, -2.0, 3.0)}], [NAME, GAIN])
    assert r"x-1 & $-$1.00 [$-$2.00, +3.00] \\" in table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50% of $5 & more_less #1", r"50\% of \$5 \& more\_less \#1"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("a~b^c <d> |e|", r"a\textasciitilde{}b\textasciicircum{}c \textless{}d\textgreater{} \textbar{}e\textbar{}"),
        ("two\nlines\t", "two lines"),
        ("[x]", "{}[x]"),
        ("*", "{}*"),
    ],
)
def test_latex_escapes(text: str, expected: str) -> None:
    assert to_latex([{"name": text}], [NAME]).splitlines()[5] == rf"{expected} \\"


def test_a_value_without_an_interval_stands_alone() -> None:
    rows = [{"name": "rare", "share": Estimate(0.5, None, None)}]
    assert to_csv(rows, [NAME, SHARE]).splitlines()[1] == "rare,0.5,,"
    assert to_markdown(rows, [NAME, SHARE]).splitlines()[2] == "| rare | 50.0 |"
    assert r"rare & 50.0 \\" in to_latex(rows, [NAME, SHARE])


@given(st.text())
def test_any_text_leaves_the_tables_whole(text: str) -> None:
    rows = [{"name": text, "gain": 1}, {"name": "last", "gain": 2}]
    markdown = to_markdown(rows, [NAME, GAIN]).split("\n")
    assert len(markdown) == 5
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in markdown[:-1])
    latex = to_latex(rows, [NAME, GAIN]).split("\n")
    assert len(latex) == 10
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*&", line)) == 1 for line in latex[5:7])
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex[5]):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert len(list(csv.reader(io.StringIO(to_csv(rows, [NAME, GAIN]))))) == 3


@pytest.mark.parametrize("character", list("\\`*_[]<>|~$&#"))
def test_markdown_escapes(character: str) -> None:
    assert f"| a\\{character}b |" in to_markdown([{"name": f"a{character}b"}], [NAME])


def test_the_terminal_shows_text_as_it_is() -> None:
    out = io.StringIO()
    rows = [{"name": "[red]x[/] [1]\x1b[2J", "share": Estimate(0.5, 0.25, 0.75)}]
    Console(file=out, width=80).print(to_rich(rows, [NAME, SHARE], title="t", caption="[bold]c"))
    assert "[red]x[/] [1] " in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "[25.0, 75.0]" in out.getvalue()
    assert "[bold]c" in out.getvalue()


def test_files(tmp_path: Path) -> None:
    write_table(ROWS, [NAME, SHARE], tmp_path / "new" / "acc.v1")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["acc.v1.csv", "acc.v1.md", "acc.v1.tex"]
    assert (tmp_path / "new" / "acc.v1.md").read_text(encoding="utf-8") == to_markdown(ROWS, [NAME, SHARE])
