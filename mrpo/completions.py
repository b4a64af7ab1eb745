"""Completions on disk: what `mrpo infer` writes and evaluation reads, one JSON object per question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mrpo.errors import UserError
from mrpo.file_lock import lock_file
from mrpo.records import Completion, Example, Step
from mrpo.telemetry import append_line, whole_lines

_ROW_START = b'{"id": '


@dataclass(frozen=True)
class InferredCompletion:
    """One completion with its reasoning steps and the text of its answer (None: no answer tag)."""

    completion: Completion
    steps: tuple[Step, ...]
    answer: str | None


@dataclass(frozen=True)
class InferredQuestion:
    """A question and what `model` said to it."""

    example: Example
    model: str
    think_tag: str
    completions: tuple[InferredCompletion, ...]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _StepRecord(_Record):
    text: str
    start: int
    end: int


class _CompletionRecord(_Record):
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    steps: list[_StepRecord]
    answer: str | None

    def completion(self) -> InferredCompletion:
        completion = Completion(tuple(self.token_ids), self.text, self.finish_reason)
        return InferredCompletion(completion, tuple(Step(s.text, s.start, s.end) for s in self.steps), self.answer)


class _QuestionRecord(_Record):
    id: str
    dataset: str
    split: str
    question: str
    answer: str
    rationale: str | None
    images: list[str]
    metadata: dict[str, Any]
    model: str
    think_tag: str
    completions: list[_CompletionRecord]

    def inferred(self) -> InferredQuestion:
        example = Example(
            id=self.id,
            images=tuple(map(Path, self.images)),
            question=self.question,
            answer=self.answer,
            rationale=self.rationale,
            split=self.split,
            metadata=self.metadata | {"dataset": self.dataset},
        )
        completions = tuple(record.completion() for record in self.completions)
        return InferredQuestion(example, self.model, self.think_tag, completions)


def read_completions(file: Path) -> list[InferredQuestion]:
    """The questions of a file that `mrpo infer` wrote, in order; a last line that a kill has torn is left out.

    Raises:
        UserError: the file is missing or empty, or a line is not what `mrpo infer` writes.
    """
    try:
        questions = [_parse(file, number, value).inferred() for number, _, value in whole_lines(file)]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a file that mrpo infer wrote") from error
    if not questions:
        raise UserError(f"{file} holds no completions; mrpo infer writes such a file")
    return questions


def _parse(file: Path, number: int, value: Any) -> _QuestionRecord:
    try:
        return _QuestionRecord.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}, line {number}: not a row of mrpo infer: {f'{place}: ' if place else ''}{first['msg']}"
        ) from None


class CompletionFile:
    """A file of completions to be begun or gone on with, locked as long as it is open.

    `header` is what all rows share: model, fingerprint, think_tag, sampling. `done` is the number of `examples` whose
    rows are there already. Nothing in the file changes before the first `write`.

    Raises:
        UserError: another process writes the file, it cannot be opened, or its rows are not those that this run would
            have written; then with the field that differs.
    """

    def __init__(
        self, file: Path, header: Mapping[str, Any], examples: Sequence[Example], *, overwrite: bool = False
    ) -> None:
        self._path = file
        self._header = _plain(header)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from error
        self.done = 0
        self._kept = 0  # bytes
        self._cut = False
        try:
            if not lock_file(self._file):
                raise UserError(f"{self._path}: another process is writing this file")
            if not overwrite:
                self._take_up(examples)
        except BaseException:
            self._file.close()
            raise

    def write(self, example: Example, completions: Sequence[InferredCompletion]) -> None:
        """Appends the row of `example`, the next one in order.

        Raises:
            OSError: the row could not be written whole.
        """
        if not self._cut:
            self._file.truncate(self._kept)  # a torn line, or all that is to be overwritten
            self._cut = True
        row = {**_example_record(example), **self._header, "completions": [_record(c) for c in completions]}
        append_line(self._file, row)
        self.done += 1

    def __enter__(self) -> CompletionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _take_up(self, examples: Sequence[Example]) -> None:
        for number, line, value in whole_lines(self._path):
            if number > len(examples):
                raise UserError(f"{self._path} has more rows than the {len(examples)} questions asked for; {_ADVICE}")
            _parse(self._path, number, value)
            expected = {**_plain(_example_record(examples[number - 1])), **self._header}
            if difference := _difference(value, expected):
                raise UserError(f"{self._path}, line {number}: {difference}; {_ADVICE}")
            self.done, self._kept = number, self._kept + len(line)
        self._check_tail()

    def _check_tail(self) -> None:
        """What follows the last whole line is cut off, so it must be the beginning of a row."""
        with self._path.open("rb") as file:
            file.seek(self._kept)
            tail = file.read(len(_ROW_START))
        if not _ROW_START.startswith(tail):
            raise UserError(f"{self._path} was not written by mrpo infer; {_ADVICE}")


_ADVICE = "go on with the same settings, name another --out, or replace the file with --overwrite"


def _difference(row: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first field of `expected` that `row` has otherwise, in words."""
    for key, value in expected.items():
        then = row.get(key)
        if then == value:
            continue
        if isinstance(then, dict) and isinstance(value, dict) and value.keys() == then.keys():
            return _difference(then, value, f"{prefix}{key}.")
        if key == "fingerprint":
            return f"the files of model={row.get('model')} have changed since it was written"
        return f"it was written with {prefix}{key}={_short(then)}, not {_short(value)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` as JSON gives it back."""
    return json.loads(json.dumps(record))


def _example_record(example: Example) -> dict[str, Any]:
    paths = [image for image in example.images if isinstance(image, Path)]
    if len(paths) < len(example.images):
        raise UserError(f"example {example.id}: its image is not in a file; prepare the data with mrpo data prepare")
    return {
        "id": example.id,
        "dataset": example.metadata.get("dataset", ""),
        "split": example.split,
        "question": example.question,
        "answer": example.answer,
        "rationale": example.rationale,
        "images": [str(path.absolute()) for path in paths],
        "metadata": {key: value for key, value in example.metadata.items() if key != "dataset"},
    }


def _record(item: InferredCompletion) -> dict[str, Any]:
    return {
        "text": item.completion.text,
        "token_ids": item.completion.token_ids,
        "finish_reason": item.completion.finish_reason,
        "steps": [{"text": step.text, "start": step.start, "end": step.end} for step in item.steps],
        "answer": item.answer,
    }
