"""`mrpo eval` from the command line, with the embedded judges and with a real endpoint on this machine."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from completion_rows import completion_row, question_row, write_rows
from judge_server import Answer, JudgeServer, running_server, usual_answer

from mrpo.assessment.judging import ROUNDS
from mrpo.cli import main

FAST = ("--resamples", "50")
STEPS = ["A CT of the chest.", "It shows gold."]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as judge_server:
        yield judge_server


def completions(path: Path, right: str, **changes: Any) -> Path:
    """A question a letter: 1 answered rightly, 0 wrongly; the first half in one data set, the others in another."""
    rows = [
        question_row(f"{i}", [completion_row("gold" if letter == "1" else "silver", STEPS)], **changes)
        | {"dataset": "rad" if 2 * i < len(right) else "slake", "rationale": "A CT of the chest shows gold."}
        for i, letter in enumerate(right)
    ]
    return write_rows(path, rows)


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments), *FAST])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


def test_a_folder_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, mrpo = completions(tmp_path / "base.jsonl", "11010100"), completions(tmp_path / "mrpo.jsonl", "11111101")
    out = tmp_path / "out"
    assert run(base, mrpo, "--out", out) == 0
    printed = capsys.readouterr()
    assert "judging base" in printed.err
    assert "Accuracy" in printed.out
    assert "judging" not in printed.out
    content = json.loads((out / "eval.json").read_text())
    accuracy = {
        (name, dataset): metrics["accuracy"]["value"]
        for name, model in content["models"].items()
        for dataset, metrics in model["datasets"].items()
    }
    assert accuracy == {
        ("base", "rad"): 3 / 4,
        ("base", "slake"): 1 / 4,
        ("base", "average"): 4 / 8,
        ("mrpo", "rad"): 1.0,
        ("mrpo", "slake"): 3 / 4,
        ("mrpo", "average"): 7 / 8,
    }
    assert content["judge"] == "steps: lexical; answers: lexical"
    test = next(t for t in content["tests"] if (t["dataset"], t["metric"]) == ("average", "accuracy"))
    assert (test["first"], test["second"]) == ("base", "mrpo")
    assert test["difference"]["value"] == pytest.approx(3 / 8)
    assert test["mcnemar"] == {"first_only": 0, "second_only": 3, "p": 0.25}
    tables = sorted(path.name for path in (out / "tables").iterdir())
    names = ("accuracy", "failures", "reasoning", "tests")
    assert tables == [f"{name}.{suffix}" for name in names for suffix in ("csv", "md", "tex")]
    rows = list(csv.DictReader((out / "tables" / "accuracy.csv").open()))
    assert {(row["model"], row["dataset"]): float(row["accuracy"]) for row in rows} == accuracy
    traces = [json.loads(line) for line in (out / "mrpo.traces.jsonl").read_text().splitlines()]
    assert [trace["id"] for trace in traces] == [str(i) for i in range(8)]
    assert {trace["model"] for trace in traces} == {"mrpo"}
    assert [trace["correct"] for trace in traces] == [letter == "1" for letter in "11111101"]
    assert traces[0]["steps"][1]["valid"] is True


def test_json_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = completions(tmp_path / "base.jsonl", "10")
    assert run("--json", base, "--out", tmp_path / "out", "--name", "one") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "out" / "eval.json").read_text())
    assert list(json.loads(printed)["models"]) == ["one"]


def test_files_get_plain_lines_even_where_colour_is_forced(tmp_path: Path) -> None:
    base = completions(tmp_path / "base.jsonl", "10")
    command = [sys.executable, "-m", "mrpo.cli", "eval", str(base), "--out", str(tmp_path / "out"), *FAST]
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    assert "judging base  2/2" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


def test_a_model_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = completions(tmp_path / "base.jsonl", "110100")
    assert run("--json", base, base, "--name", "a", "--name", "b", "--out", tmp_path / "out") == 0
    for test in json.loads(capsys.readouterr().out)["tests"]:
        assert test["difference"]["value"] in (0.0, None)
        assert test["p"] == (None if test["difference"]["value"] is None else 1.0)


def test_another_evaluation_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other, out = (
        completions(tmp_path / "base.jsonl", "10"),
        completions(tmp_path / "x.jsonl", "11"),
        tmp_path / "o",
    )
    assert run(base, "--out", out) == 0
    before = (out / "eval.json").read_text()
    assert run(base, "--out", out) == 0  # the same again
    assert run(base, "--out", out, "judge.concurrency=3") == 0  # which changes no verdict
    capsys.readouterr()
    assert "advantage.tau=0.6, not 0.5; replace it with --overwrite" in error_of(
        capsys, base, "--out", out, "advantage.tau=0.5"
    )
    assert "holds an evaluation of base (" in error_of(capsys, other, "--out", out)
    assert (out / "eval.json").read_text() == before
    assert run(other, "--out", out, "--overwrite", "advantage.tau=0.5") == 0
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["x.traces.jsonl"]
    (out / "eval.json").write_text("[]")
    assert "not what mrpo eval wrote" in error_of(capsys, other, "--out", out)


@pytest.mark.parametrize("last", ["write_traces", "write_tables", "write_content"])
def test_a_folder_with_a_summary_is_complete_whenever_the_program_dies(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [completions(tmp_path / name, right) for name, right in (("a.jsonl", "10"), ("b.jsonl", "11"))]
    out = tmp_path / "out"
    assert run(*files, "--out", out) == 0
    (out / "cache").mkdir()
    (out / "cache" / "verdicts").touch()
    module = "mrpo.report.eval_tables" if last == "write_tables" else "mrpo.assessment.folder"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(f"{module}.{last}", die)
        assert run(files[1], "--name", "c", "--out", out, "--overwrite") == 130
    assert {path.name for path in out.iterdir()} <= {"cache", "tables", "c.traces.jsonl"}
    assert (out / "cache" / "verdicts").is_file()
    assert run(files[1], "--name", "c", "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"cache", "tables", "c.traces.jsonl", "eval.json"}


def test_an_evaluation_stays_until_another_is_judged(
    tmp_path: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = completions(tmp_path / "base.jsonl", "10"), tmp_path / "out"
    other = completions(tmp_path / "other.jsonl", "10", question="Broken?")
    server.script = {"Broken?": lambda record, attempt: (400, {}, "{}")}
    assert run(base, "--out", out) == 0
    before = {path: path.read_bytes() for path in out.glob("*.json*")}
    judge = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=judge-1", "judge.max_unjudged=0.2")
    assert "unjudged" in error_of(capsys, other, "--out", out, "--overwrite", *judge)
    assert {path: path.read_bytes() for path in out.glob("*.json*")} == before


def test_a_summary_that_cannot_be_read_is_told_before_anything_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = completions(tmp_path / "base.jsonl", "10"), tmp_path / "out"
    out.mkdir()
    (out / "eval.json").write_text("[]")
    assert run(base, "--out", out, "--overwrite") == 2
    printed = capsys.readouterr().err
    assert "not what mrpo eval wrote" in printed
    assert "judging" not in printed


def test_bad_input_is_told_before_anything_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = completions(tmp_path / "base.jsonl", "1010"), tmp_path / "out"
    fewer = completions(tmp_path / "fewer.jsonl", "10")
    assert "4 questions differ between base" in error_of(capsys, base, fewer, "--out", out)
    assert "optim.lr=1: mrpo eval takes judge.*" in error_of(capsys, base, "--out", out, "optim.lr=1")
    assert "judge.kind" in error_of(capsys, base, "--out", out, "judge.kind=human")
    assert "reward.x" in error_of(capsys, base, "--out", out, "reward.x=" + 300 * "1")  # too long for a file's name
    assert "no such file" in error_of(capsys, tmp_path / "none.jsonl", "--out", out).lower()
    assert "at least one file" in error_of(capsys, "judge.kind=embedded", "--out", out)
    assert "cannot be written" in error_of(capsys, base, "--out", base / "inner")
    assert not out.exists()


def test_an_endpoint_judges_steps_and_answers(
    tmp_path: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = {"Question 1?": lambda record, attempt: (400, {}, '{"error": {"message": "refused"}}')}
    base = completions(tmp_path / "base.jsonl", "1110")
    judge = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=judge-1")
    assert run("--json", base, "--out", tmp_path / "out", *judge) == 0
    content = json.loads(capsys.readouterr().out)
    average = content["models"]["base"]["datasets"]["average"]
    assert average["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (average["accuracy"]["n"], average["unjudged_answers"]["value"]) == (3, 0.25)
    assert average["valid_steps"]["value"] == pytest.approx(0.5)  # the server lets odd steps pass
    assert content["judge"] == "steps: openai (judge-1); answers: openai (judge-1)"
    traces = [json.loads(line) for line in (tmp_path / "out" / "base.traces.jsonl").read_text().splitlines()]
    assert "refused" in traces[1]["unjudged"]
    assert [trace["correct"] for trace in traces] == [True, None, True, False]
    # The same again, and another folder with the same cache: only what was refused is asked for.
    asked = server.asked.total()
    assert run(base, "--out", tmp_path / "out", *judge) == 0
    assert run(base, "--out", tmp_path / "out2", "--cache", tmp_path / "out" / "cache", *judge) == 0
    assert server.asked.total() == asked + 4
    assert run(base, "--out", tmp_path / "out", "--overwrite", *judge[:2], "judge.model=judge-2") == 0
    assert server.asked.total() == 2 * asked + 4


def test_verdicts_survive_a_crash(tmp_path: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]) -> None:
    count = 2 * ROUNDS
    base = completions(tmp_path / "base.jsonl", "1" * count)

    def fail(record: dict[str, Any], attempt: int) -> Answer:
        return 400, {}, '{"error": {"message": "out of credit"}}'

    server.script = {f"Question {i}?": fail for i in range(ROUNDS, count)}
    judge = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.concurrency=1", "judge.max_unjudged=0.2")
    message = error_of(capsys, base, "--out", tmp_path / "out", *judge)
    assert f"left {ROUNDS} of {count} completions unjudged" in message
    assert "out of credit" in message
    assert not (tmp_path / "out" / "eval.json").exists()
    server.asked.clear()
    server.script = {f"Question {i}?": lambda record, attempt: usual_answer(record) for i in range(count)}
    assert run(base, "--out", tmp_path / "out", *judge) == 0
    assert server.asked == {f"Question {i}?": 2 for i in range(ROUNDS, count)}
