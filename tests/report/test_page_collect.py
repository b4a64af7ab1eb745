from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_folders import trace, write_evaluation, write_run

from mrpo.errors import UserError
from mrpo.report.page.collect import distinct_names, read_sources


def test_runs_and_evaluations_are_told_apart(tmp_path: Path) -> None:
    run, evaluation = write_run(tmp_path / "run"), write_evaluation(tmp_path / "eval", {"m": [trace(0)]})
    sources = read_sources([evaluation, run, run / "."])
    assert [r.name for r in sources.runs] == ["run"]
    assert [e.name for e in sources.evaluations] == ["eval"]
    assert sources.runs[0].config["optim.lr"] == 1e-4
    assert sources.runs[0].missing == sources.evaluations[0].missing == ()
    assert list(sources.judged()) == ["run, before", "run, after", "m"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder; expected a training run"),
        (lambda folder: folder.write_text(""), "is a file"),
        (lambda folder: folder.mkdir(), "neither a run nor an evaluation"),
        (lambda folder: write_run(folder / "inner"), "it holds inner: name one of them"),
    ],
)
def test_what_is_no_source_is_refused_by_name(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "odd")
    with pytest.raises(UserError, match=message) as caught:
        read_sources([tmp_path / "odd"])
    assert str(tmp_path / "odd") in str(caught.value)


def test_a_run_in_progress_says_what_is_not_there_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation-after.json").unlink()
    (run / "samples.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    read = read_sources([run]).runs[0]
    assert len(read.metrics) == 3
    assert read.traces is None
    assert [line.partition(":")[0] for line in read.missing] == ["evaluation-after.json", "samples.jsonl"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "evaluation-before.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text('{"a": [}\n{}\n')
    with pytest.raises(UserError, match=name):
        read_sources([run])


@pytest.mark.parametrize("content", ["[]", "{}", '{"models": [1]}', '{"models": {"m": {}}}', "not JSON"])
def test_a_broken_summary_is_named(tmp_path: Path, content: str) -> None:
    folder = write_evaluation(tmp_path / "eval", {"m": [trace(0)]})
    (folder / "eval.json").write_text(content)
    with pytest.raises(UserError, match=r"eval\.json"):
        read_sources([folder])


def test_models_without_traces_are_named(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval", {"m": [trace(0)], "n": []})
    evaluation = read_sources([folder]).evaluations[0]
    assert [model.traces is None for model in evaluation.models] == [False, True]
    assert "traces of n" in evaluation.missing[0]


def test_one_name_in_two_evaluations_is_told_apart(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / name, {"m": [trace(0)], name: []}) for name in ("x", "y")]
    models = read_sources(folders).models
    assert [model.name for model in models] == ["m (x)", "x", "m (y)", "y"]
    assert models[0].traces is not None
    assert models[0].traces.label == "m (x)"


def test_traces_are_found_by_the_model_they_name(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval", {"org/model": [trace(0)]})
    (model,) = read_sources([folder]).models
    assert model.traces is not None
    assert json.loads(model.traces.path.read_text())["model"] == "org/model"


def test_names_are_the_shortest_that_differ() -> None:
    paths = [Path("/a/x/run"), Path("/b/x/run"), Path("/b/other")]
    assert list(distinct_names(paths).values()) == ["a/x/run", "b/x/run", "other"]
