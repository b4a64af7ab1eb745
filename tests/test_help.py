"""The help text is complete, fits the terminal, and states the limits that are enforced."""

from __future__ import annotations

import pytest

from mrpo.config import Config, LossConfig
from mrpo.help import config_help, describe_fields, type_text


def test_every_field_is_described_once() -> None:
    dumped = Config().model_dump()
    expected = {
        f"{name}.{key}" if key else name
        for name, value in dumped.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    keys = [field.key for field in describe_fields()]
    assert set(keys) == expected
    assert len(keys) == len(expected)
    assert all(field.description for field in describe_fields())


def test_help_names_every_key_default_and_section_and_fits_100_columns() -> None:
    text = config_help()
    assert max(map(len, text.splitlines())) <= 100
    joined = " ".join(text.split())
    for field in describe_fields():
        assert field.key in joined
        assert " ".join(f"({field.type}; default: {field.default})".split()) in joined
    assert (LossConfig.__doc__ or "missing") in joined


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1}, "integer >= 1"),
        ({"type": "number", "exclusiveMinimum": 0.0, "exclusiveMaximum": 1.0}, "number > 0 and < 1"),
        ({"anyOf": [{"type": "string", "format": "path"}, {"type": "null"}]}, "path or null"),
        ({"enum": [0, 1], "type": "integer"}, "0 | 1"),
        ({"const": "hf", "type": "string"}, "hf"),
        ({"type": "boolean"}, "true | false"),
    ],
)
def test_types_in_words(schema: dict[str, object], text: str) -> None:
    assert type_text(schema) == text
