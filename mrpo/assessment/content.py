"""What an evaluation found, as the content of eval.json (see the package's docstring)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from mrpo.assessment.assessed import Assessed
from mrpo.assessment.metrics import LEVEL, SEED, tabulate
from mrpo.assessment.paired import compare
from mrpo.assessment.questions import AVERAGE, ModelCompletions
from mrpo.config import JUDGE_TRANSPORT, Config


def settings_of(config: Config, resamples: int) -> dict[str, Any]:
    """All settings that an evaluation depends on."""
    return {
        "judge": config.judge.model_dump(mode="json", exclude=JUDGE_TRANSPORT),
        "reward": config.reward.model_dump(mode="json"),
        "advantage": {"tau": config.advantage.tau},
        "resamples": resamples,
        "level": LEVEL,
        "seed": SEED,
    }


def build_content(
    models: Sequence[ModelCompletions], assessed: Mapping[str, Sequence[Assessed]], judge: str, config: Config,
    resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """The content of eval.json. `assessed`: of each model by its name; all models are of the same questions."""
    tables = {model.name: tabulate(assessed[model.name], model.samples) for model in models}
    datasets: dict[str, dict[str, Any]] = {model.name: {} for model in models}
    tests: list[dict[str, Any]] = []
    for dataset in (*models[0].datasets, AVERAGE):
        parts = {name: table if dataset == AVERAGE else table.of(dataset) for name, table in tables.items()}
        draws = {name: part.draw(resamples) for name, part in parts.items()}
        for name, part in parts.items():
            datasets[name][dataset] = part.summarize(draws[name])
        for first, second in combinations(parts, 2):
            found = compare(parts[first], parts[second], draws[first], draws[second])
            tests += [{"dataset": dataset, "first": first, "second": second, **test} for test in found]
    return {
        "models": {
            model.name: {
                "file": str(model.file.absolute()),
                "model": model.questions[0].model,
                "think_tag": model.questions[0].think_tag,
                "questions": len(model.questions),
                "samples": model.samples,
                "datasets": datasets[model.name],
            }
            for model in models
        },
        "tests": tests,
        "metrics": {
            metric.key: {"name": metric.name, "over": metric.over, "percent": metric.percent}
            for table in tables.values()
            for metric in table.metrics
        },
        "judge": judge,
        "settings": settings_of(config, resamples),
    }
