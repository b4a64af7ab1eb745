"""What a judge model answered, read tolerantly and believed sparingly.

A model that is not held to the schema wraps its JSON in prose or code fences and leaves a comma too many: that is
mended. What says something else than the schema allows, or more than one thing, is refused, and so is a verdict that
stands word for word in the judged material: such an answer only quotes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import json_repair
from pydantic import BaseModel, ValidationError

LONGEST = 20_000  # characters of an answer, far above any verdict; mending takes quadratic time

Model = TypeVar("Model", bound=BaseModel)


def chosen_text(response: Any) -> str:
    """The text of a chat completion; servers that are not what they say can return any shape.

    Raises:
        ValueError: there is none, or the model refused or did not finish.
    """
    try:
        choice = response.choices[0]
        content, refusal = choice.message.content, getattr(choice.message, "refusal", None)
    except (AttributeError, IndexError, TypeError):
        raise ValueError("the endpoint returned no text") from None
    if refusal:
        raise ValueError("the judge refused to answer")
    if choice.finish_reason == "content_filter":
        raise ValueError("the endpoint's content filter stopped the answer")
    if choice.finish_reason == "length":
        raise ValueError("the answer was cut off at the length limit")
    if not isinstance(content, str) or not content.strip():
        raise ValueError("the endpoint returned no text")
    return content


def read_answer(text: str, schema: type[Model], material: Sequence[str]) -> Model:
    """The one object of `schema` in `text`, which does not stand in `material`.

    Raises:
        ValueError: there is none or more than one. The reason quotes nothing of `text`.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the answer is longer than {LONGEST} characters")
    found, problem = _fitting(_written(text), schema)
    if not found:
        found, problem = _fitting(_mended(text), schema)
    if not found:
        raise ValueError(f"malformed verdict: {problem}")
    if len(found) > 1:
        raise ValueError("the answer holds more than one verdict")
    ((written, model),) = found.items()
    if any(written in _squeezed(source) for source in material if "{" in source):
        raise ValueError("the answer only quotes a verdict from the judged text")
    return model


def _fitting(values: Iterable[Any], schema: type[Model]) -> tuple[dict[str, Model], str]:
    """Those of `values` that fit, by how they are written, and what is wrong with the last of the others."""
    found: dict[str, Model] = {}
    problem = "it is no JSON object"
    for value in values:
        try:
            found[_squeezed(json.dumps(value, ensure_ascii=False))] = schema.model_validate(value)
        except ValidationError as error:
            problem = _problem(error, schema)
    return found, problem


def _written(text: str) -> Iterator[Any]:
    """The JSON objects in `text`, but for those inside another."""
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        end = place + 1
        with suppress(ValueError, RecursionError):
            value, end = decoder.raw_decode(text, place)
            yield value
        place = text.find("{", end)


def _mended(text: str) -> Iterator[Any]:
    """The JSON objects that `text` may be meant for."""
    with suppress(ValueError, RecursionError):
        value = json_repair.loads(text) if "{" in text else []
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _problem(error: ValidationError, schema: type[BaseModel]) -> str:
    """What is wrong first and where, in words that are pydantic's and ours alone."""
    first = error.errors(include_input=False, include_url=False)[0]
    known = json.dumps(schema.model_json_schema())
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or f'"{part}"' in known)
    return f"{first['msg']} at {place or 'top'}"
