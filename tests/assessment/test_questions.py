from __future__ import annotations

from pathlib import Path

import pytest
from completion_rows import completion_row, question_row, write_rows

from mrpo.assessment import check_same_questions, read_models
from mrpo.errors import UserError

ONE = [completion_row("a")]
ROWS = [question_row("1", ONE), question_row("2", ONE), question_row("1", ONE, dataset="other")]


def test_names_come_from_files_or_from_the_command_line(tmp_path: Path) -> None:
    base, mrpo = (write_rows(tmp_path / name, ROWS) for name in ("base.jsonl", "mrpo.v2.jsonl"))
    assert [model.name for model in read_models([base, mrpo], [])] == ["base", "mrpo.v2"]
    first, second = read_models([base, base], ["before", "after"])
    assert (first.name, second.name) == ("before", "after")
    assert first.datasets == ("set", "other")
    assert first.samples == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "--name is given 1 times for 2 files"),
        (["a", "A"], "two files have the name A"),
        (["a", "../b"], r"'\.\./b' cannot name"),
        (["a", ".b"], r"'\.b' cannot name"),
        (["a", "b\n"], "cannot name"),
        ([], "two files have the name base"),
    ],
)
def test_bad_names(tmp_path: Path, names: list[str], message: str) -> None:
    file = write_rows(tmp_path / "base.jsonl", ROWS)
    with pytest.raises(UserError, match=message):
        read_models([file, file], names)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, question_row("2", ONE)], "question 2 of set stands twice"),
        ([*ROWS, question_row("3", ONE * 2)], "question 3 of set has 2 completions and the first question 1"),
        ([question_row("1", [])], "question 1 of set has 0 completions"),
        ([question_row("1", ONE, dataset="average")], 'cannot be called "average"'),
    ],
)
def test_bad_questions(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_models([write_rows(tmp_path / "base.jsonl", rows)], [])
    assert "base.jsonl" in str(error.value)


def check(tmp_path: Path, *files: list) -> None:
    paths = [write_rows(tmp_path / f"m{index}.jsonl", rows) for index, rows in enumerate(files)]
    check_same_questions(read_models(paths, []))


def test_the_same_questions_in_another_order_are_the_same(tmp_path: Path) -> None:
    check(tmp_path, ROWS, ROWS[::-1], [row | {"completions": ONE * 3} for row in ROWS])


def test_differing_questions_are_counted(tmp_path: Path) -> None:
    other = [question_row("1", ONE, answer="silver"), ROWS[1], question_row("4", ONE), question_row("5", ONE)]
    with pytest.raises(UserError) as error:
        check(tmp_path, ROWS, ROWS, other)
    message = str(error.value)
    assert "4 questions differ between m0 " in message
    assert "1 only in the first, 2 only in the second, 1 with another question, gold answer or gold" in message
    assert "such as 1 of other" in message


@pytest.mark.parametrize(
    "change", [{"question": "Why?"}, {"answer": "silver"}, {"rationale": "so"}, {"rationale": None}]
)
def test_all_that_decides_a_verdict_is_compared(tmp_path: Path, change: dict) -> None:
    with pytest.raises(UserError, match="1 with another question, gold answer or gold rationale, such as 1 of set"):
        check(tmp_path, ROWS, [ROWS[0] | change, *ROWS[1:]])
