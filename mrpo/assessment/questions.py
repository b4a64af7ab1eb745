"""The files of completions that an evaluation compares: read, named, and checked before anything is judged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from mrpo.assessment.assessed import question_key
from mrpo.completions import InferredQuestion, read_completions
from mrpo.errors import UserError

AVERAGE = "average"
_Texts = tuple[str, str, str | None]  # question, gold answer, gold rationale


@dataclass(frozen=True)
class ModelCompletions:
    """What one model said to every question. `samples` is the number of completions of each."""

    name: str
    file: Path
    questions: tuple[InferredQuestion, ...]

    @property
    def samples(self) -> int:
        return len(self.questions[0].completions)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets, in order of appearance."""
        return tuple(dict.fromkeys(dataset_of(question) for question in self.questions))


def dataset_of(question: InferredQuestion) -> str:
    return str(question.example.metadata["dataset"])


def read_models(files: Sequence[Path], names: Sequence[str]) -> list[ModelCompletions]:
    """The models of `files`, called `names`, or where there are none, by the stems of their files.

    Raises:
        UserError: a file is not what `mrpo infer` writes, a question stands twice in it or has another number of
            completions than the first, or names are missing, equal or not fit for a file name.
    """
    if names and len(names) != len(files):
        raise UserError(f"--name is given {len(names)} times for {len(files)} files; give it once for each, in order")
    names = names or [file.stem for file in files]
    for index, name in enumerate(names):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"{name!r} cannot name a model's files; give --name with letters, digits, '.', '_', '-', '+'"
            )
        if name.casefold() in (other.casefold() for other in names[:index]):
            raise UserError(f"two files have the name {name}; tell them apart with --name, once for each file in order")
    models = [
        ModelCompletions(name, file, tuple(read_completions(file))) for name, file in zip(names, files, strict=True)
    ]
    for model in models:
        _check_questions(model)
    return models


def _check_questions(model: ModelCompletions) -> None:
    seen: set[str] = set()
    for question in model.questions:
        dataset, example, count = dataset_of(question), question.example, len(question.completions)
        if dataset == AVERAGE:
            raise UserError(f'{model.file}: a data set cannot be called "{AVERAGE}", the name of the average over all')
        if question_key(dataset, example.id) in seen:
            raise UserError(f"{model.file}: question {example.id} of {dataset} stands twice; ids must be unique")
        if count != model.samples or count == 0:
            raise UserError(
                f"{model.file}: question {example.id} of {dataset} has {count} completions and the first question "
                f"{model.samples}; all need the same number, at least 1"
            )
        seen.add(question_key(dataset, example.id))


def check_same_questions(models: Sequence[ModelCompletions]) -> None:
    """Models are tested against each other on the same questions with the same gold texts, in any order.

    The gold rationale is one of them, as the judge reads it.

    Raises:
        UserError: two models differ; says in how many questions, and names one.
    """
    texts = [_texts(model) for model in models]
    for (first, first_texts), (second, second_texts) in combinations(zip(models, texts, strict=True), 2):
        if first_texts != second_texts:
            raise UserError(_difference(first, second, first_texts, second_texts))


def _texts(model: ModelCompletions) -> dict[tuple[str, str], _Texts]:
    return {
        (dataset_of(q), q.example.id): (q.example.question, q.example.answer, q.example.rationale)
        for q in model.questions
    }


def _difference(
    first: ModelCompletions,
    second: ModelCompletions,
    first_texts: Mapping[tuple[str, str], _Texts],
    second_texts: Mapping[tuple[str, str], _Texts],
) -> str:
    only_first, only_second = first_texts.keys() - second_texts.keys(), second_texts.keys() - first_texts.keys()
    changed = {key for key in first_texts.keys() & second_texts.keys() if first_texts[key] != second_texts[key]}
    all_differing = sorted(only_first | only_second | changed)
    dataset, example_id = all_differing[0]
    return (
        f"{len(all_differing)} questions differ between {first.name} ({first.file}) and {second.name} ({second.file}): "
        f"{len(only_first)} only in the first, {len(only_second)} only in the second, {len(changed)} with another "
        f"question, gold answer or gold rationale, such as {example_id} of {dataset}; models are compared on the same "
        "questions, so finish the inference of both, or evaluate them apart"
    )
