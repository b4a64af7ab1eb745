"""Reads run and evaluation folders. What a folder lacks is named, so that the page can say it; nothing else fails."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mrpo import yaml12
from mrpo.errors import UserError
from mrpo.evaluated import read_evaluated
from mrpo.records import EvaluatedSample
from mrpo.report.page.traces import JudgedTrace, TraceFile
from mrpo.telemetry.jsonl import read_json_lines, read_objects

_EVALUATIONS = ("before", "after")


@dataclass(frozen=True)
class Run:
    """A training run. `config` is flat (`optim.lr`), `evaluations` are those of "before" and "after" that exist."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Sequence[EvaluatedSample]]
    traces: TraceFile | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class EvaluatedModel:
    """One model of an evaluation folder. `datasets`: data set, or "average" -> metric -> {value, low, high, n}."""

    name: str
    evaluation: str
    datasets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    traces: TraceFile | None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation folder. `metrics`: metric -> {name, over, percent}."""

    name: str
    folder: Path
    judge: str
    models: tuple[EvaluatedModel, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    tests: Sequence[Mapping[str, Any]]
    missing: tuple[str, ...]

    def metric_name(self, key: str) -> str:
        return str(self.metrics.get(key, {}).get("name", key))

    def is_percent(self, key: str) -> bool:
        return bool(self.metrics.get(key, {}).get("percent", False))


@dataclass(frozen=True)
class Sources:
    """What a report is made of, in the order of the command line."""

    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def models(self) -> list[EvaluatedModel]:
        return [model for evaluation in self.evaluations for model in evaluation.models]

    @property
    def trace_files(self) -> list[TraceFile]:
        traces = [*(run.traces for run in self.runs), *(model.traces for model in self.models)]
        return [file for file in traces if file is not None]

    def judged(self) -> dict[str, Sequence[EvaluatedSample] | Sequence[JudgedTrace]]:
        """Name -> completions, of every evaluation: the two of each run, and one of each evaluated model."""
        alone = len(self.runs) == 1 and not self.models
        named: dict[str, Sequence[EvaluatedSample] | Sequence[JudgedTrace]] = {}
        for run in self.runs:
            for when, samples in run.evaluations.items():
                named[when if alone else f"{run.name}, {when}"] = samples
        for model in self.models:
            if model.traces is not None:
                named[model.name] = model.traces.judged()
        return named


def read_sources(folders: Sequence[Path]) -> Sources:
    """Reads each folder once, as what it is.

    Raises:
        UserError: a folder is neither a run nor an evaluation, or a file in it is broken before its last line.
    """
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    kinds = {folder: _kind(folder) for folder in distinct}
    names = distinct_names(distinct)
    runs = tuple(_read_run(folder, names[folder]) for folder in distinct if kinds[folder] == "run")
    read = [_read_evaluation(folder, names[folder]) for folder in distinct if kinds[folder] == "evaluation"]
    return Sources(runs, tuple(_with_distinct_models(read, {run.name for run in runs})))


def distinct_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that tell them apart; the last part alone where that is enough."""

    def end(folder: Path, count: int) -> str:
        return "/".join(part for part in folder.parts[-count:] if part != "/") or "/"

    names = {}
    for folder in folders:
        count = 1
        while count < len(folder.parts) and any(
            end(other, count) == end(folder, count) for other in folders if other != folder
        ):
            count += 1
        names[folder] = end(folder, count)
    return names


def _kind(folder: Path) -> str:
    if (folder / "eval.json").is_file():
        return "evaluation"
    if (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file():
        return "run"
    expected = "expected a training run (config.yaml, metrics.jsonl) or an evaluation (eval.json)"
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; {expected}")
    inner = sorted({file.parent.name for name in ("config.yaml", "eval.json") for file in folder.glob(f"*/{name}")})
    hint = f"; it holds {', '.join(inner[:5])}: name one of them" if inner else ""
    raise UserError(f"{folder}: neither a run nor an evaluation; {expected}{hint}")


def _read_run(folder: Path, name: str) -> Run:
    missing = []
    config: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        config = _read_config(folder / "config.yaml")
    else:
        missing.append("config.yaml: no settings to show")
    metrics: list[dict[str, Any]] = []
    if (folder / "metrics.jsonl").is_file():
        metrics = read_json_lines(folder / "metrics.jsonl")
    if not metrics:
        missing.append("metrics.jsonl: no finished step, so no curves and no step times")
    evaluations = {}
    for when in _EVALUATIONS:
        file = folder / f"evaluation-{when}.json"
        if file.is_file():
            evaluations[when] = read_evaluated(file)
        else:
            missing.append(f"{file.name}: no evaluation {when} training")
    traces = _trace_file(folder / "samples.jsonl", name, str(config.get("data.name") or ""))
    if traces is None:
        missing.append("samples.jsonl: no traces")
    return Run(name, folder, config, metrics, evaluations, traces, tuple(missing))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml12.load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `section:` with indented `key: value` lines")
    return flatten(content)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _trace_file(path: Path, label: str, dataset: str) -> TraceFile | None:
    return TraceFile(path, label, dataset) if path.is_file() and path.stat().st_size > 0 else None


def _read_evaluation(folder: Path, name: str) -> Evaluation:
    path = folder / "eval.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        judge = str(content.get("judge", ""))
        metrics = {str(key): dict(entry) for key, entry in content.get("metrics", {}).items()}
        tests = [dict(test) for test in content.get("tests", [])]
        datasets = {str(model): dict(entry["datasets"]) for model, entry in content["models"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a summary that mrpo eval wrote (models, datasets): {error!r}") from None
    files = _traces_by_model(folder)
    models = [EvaluatedModel(model, name, figures, files.get(model)) for model, figures in datasets.items()]
    missing = [f"traces of {model.name}: none to read, and no failure figures" for model in models if not model.traces]
    return Evaluation(name, folder, judge, tuple(models), metrics, tests, tuple(missing))


def _traces_by_model(folder: Path) -> dict[str, TraceFile]:
    """The trace files by the model that their first record names: a model's name may not be fit for a file's."""
    files = {}
    for path in sorted(folder.glob("*.traces.jsonl")):
        for _, record in read_objects(path):
            model = str(record.get("model") or path.name.removesuffix(".traces.jsonl"))
            files[model] = TraceFile(path, model, "")
            break
    return files


def _with_distinct_models(evaluations: Sequence[Evaluation], taken: set[str]) -> list[Evaluation]:
    """A model name that two evaluations (or an evaluation and a run) have gets the evaluation's name behind it."""
    counts = Counter([*taken, *(model.name for evaluation in evaluations for model in evaluation.models)])

    def renamed(model: EvaluatedModel) -> EvaluatedModel:
        if counts[model.name] == 1:
            return model
        name = f"{model.name} ({model.evaluation})"
        return replace(model, name=name, traces=model.traces and replace(model.traces, label=name))

    return [replace(e, models=tuple(renamed(model) for model in e.models)) for e in evaluations]
