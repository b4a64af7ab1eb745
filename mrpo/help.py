"""What can be configured: every field with its type, default and meaning, derived from the classes in `config`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mrpo.config import Config, Section


@dataclass(frozen=True)
class Field:
    """One field: its dotted key, its type with limits in words, its default as YAML, its meaning."""

    key: str
    type: str
    default: str
    description: str

    @property
    def takes_text(self) -> bool:
        """Any text is a value, so a command-line value needs no quotes."""
        return self.type.startswith(("text", "path"))

    @property
    def takes_mapping(self) -> bool:
        return self.type.startswith("mapping")


@cache
def sections() -> dict[str, type[Section]]:
    """The section classes by name, in their order."""
    found: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    return found


@cache
def describe_fields() -> tuple[Field, ...]:
    """Every field of `Config`: top-level keys first, then section by section."""
    return (*_fields_of(Config, ""), *(f for name, section in sections().items() for f in _fields_of(section, name)))


def _fields_of(section: type[Section], name: str) -> list[Field]:
    prefix = f"{name}." if name else ""
    return [
        Field(prefix + key, type_text(schema), value_text(_default(schema)), schema.get("description", ""))
        for key, schema in section.model_json_schema()["properties"].items()
        if prefix or key not in sections()
    ]


def _default(schema: Mapping[str, Any]) -> Any:
    """Of a field whose default is made anew each time the schema says none: it is empty."""
    return schema.get("default", [] if schema.get("type") == "array" else {})


def type_text(schema: Mapping[str, Any]) -> str:
    """A JSON schema of one value in words: `integer >= 1 or null`, `a | b`, `text`."""
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    match schema.get("type"):
        case "boolean":
            return "true | false"
        case "integer" | "number" as kind:
            return " ".join([kind, *_limits(schema)])
        case "string" if schema.get("format") == "path":
            return "path"
        case "string":
            return f"text matching {schema['pattern']}" if "pattern" in schema else "text"
        case "object":
            return "mapping"
        case "array":
            return "list"
        case kind:
            return str(kind)


def _limits(schema: Mapping[str, Any]) -> list[str]:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return [" and ".join(limits)] if limits else []


def value_text(value: Any) -> str:
    """A value as one would write it in YAML, on one line."""
    if isinstance(value, str) and value and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def config_help(width: int = 100) -> str:
    """All fields grouped by section, each with its meaning, type and default, for `--help`."""
    indent = 4 + max(len(field.key) for field in describe_fields())
    lines = [_title("run", Config)]
    section = ""
    for field in describe_fields():
        name = field.key.rpartition(".")[0]
        if name != section:
            section = name
            lines += ["", _title(name, sections()[name])]
        lines += textwrap.wrap(
            f"{field.description} ({field.type}; default: {field.default})",
            width,
            initial_indent=f"  {field.key}".ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _title(name: str, section: type[Section]) -> str:
    return f"{name}: {(section.__doc__ or '').strip()}"
