"""YAML with the scalars of the 1.2 core schema, for configuration files and command-line values.

PyYAML reads YAML 1.1, where `1e-4` is text, `no` is false, `0123` is octal and `12:30` is 750. Here a number is what
Python calls a number, only `true` and `false` are booleans, and everything else that is not null is text. A mapping
that sets one key twice is refused instead of keeping the last value.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# (type, pattern, first characters); of the patterns that match, the first one wins
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 -- PyYAML's own interface

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes scalars so that `Loader` reads the same values."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- PyYAML's own interface

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks bare and would read them back as "\n"; double quotes make it escape them.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style)


for _type, _pattern, _first in _SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _type, re.compile(rf"(?:{_pattern})\Z"), _first)
Loader.add_constructor(_TAG + "int", _construct_int)
Dumper.add_representer(str, _represent_text)


def load(text: str) -> Any:
    """The value that `text` writes.

    Raises:
        yaml.YAMLError, ValueError: it is not YAML, has a duplicate key or an unsafe tag.
    """
    return yaml.load(text, Loader)


def dump(value: Any) -> str:
    """YAML text in block style, keys in their own order."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
