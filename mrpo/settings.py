"""Settings from a YAML file and from the command line -> a checked `Config`, and back to YAML.

Every setting is kept with the place it comes from until all of them are checked, so that one `UserError` can list all
that is wrong at once: the key, its source, the value given and what would be right.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mrpo import yaml12
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.help import Field, describe_fields, sections, value_text

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Setting:
    """`value` for a field (or, with `inside`, for a key path inside a mapping field) and where it was given."""

    key: str
    value: Any
    source: str
    inside: tuple[str, ...] = ()


class _Invalid(Exception):
    """One thing that is wrong, as a line for the user."""


def load_config(config_file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run: the defaults, then the YAML file, then `section.key=value` items; later ones win.

    Values on the command line are YAML scalars, lists or mappings (`null`, `1e-4`, `[a, b]`); a field of text or a
    path takes its value as it stands. `deepspeed.extra.key.key=value` sets a key inside a mapping.

    Raises:
        UserError: lists everything that is wrong: unreadable file, unknown key (with the nearest known one), key set
            twice in the file, value of a wrong type or out of range, impossible combination.
    """
    problems: list[str] = []
    settings = _read_file(config_file, problems) if config_file is not None else []
    for text in overrides:
        try:
            settings.append(_parse_override(text))
        except _Invalid as problem:
            problems.append(str(problem))
    config, invalid = _validate(settings)
    problems += invalid
    if problems or config is None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} settings are wrong:\n{listed}")
    return config


def to_yaml(config: Config) -> str:
    """All of `config` as YAML that `load_config` reads back equal."""
    return yaml12.dump(config.model_dump(mode="json"))


def nearest_keys(key: str) -> list[str]:
    """The known dotted keys most like `key`: several when they are equally near, none when nothing is near.

    A key without (or with a wrong) section is compared by its last part.
    """
    wanted = key.strip().lower().lstrip("-").replace("-", "_")
    scores = {field.key: _likeness(wanted, field.key) for field in describe_fields()}
    best = max(scores.values())
    return [known for known, score in scores.items() if score == best] if best >= 0.6 else []


def _likeness(wanted: str, known: str) -> float:
    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()

    by_name = ratio(wanted.rpartition(".")[2], known.rpartition(".")[2])
    return max(ratio(wanted, known), by_name if "." not in wanted else 0.85 * by_name)


def _find_field(key: str, source: str) -> tuple[Field, tuple[str, ...]]:
    """The field that `key` names, and the rest of the key when the field is a mapping."""
    for field in describe_fields():
        if key == field.key:
            return field, ()
        if field.takes_mapping and key.startswith(f"{field.key}."):
            return field, tuple(key.removeprefix(f"{field.key}.").split("."))
    if key in sections():
        raise _Invalid(f"{key} ({source}) is a section: set its keys, as in {nearest_keys(key + '.')[0]}")
    near = " or ".join(nearest_keys(key))
    raise _Invalid(f"{key} ({source}): unknown key" + (f"; did you mean {near}?" if near else ""))


def _parse_override(text: str) -> Setting:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise _Invalid(f"{text!r} ({COMMAND_LINE}): expected section.key=value")
    field, inside = _find_field(key.strip(), COMMAND_LINE)
    plain_text = field.takes_text and raw not in ("null", "~") and not raw.startswith(("'", '"'))
    if plain_text and (raw or field.type.startswith("text")):
        return Setting(field.key, raw, COMMAND_LINE)
    try:
        value = yaml12.load(raw)
    except (yaml.YAMLError, ValueError) as error:
        raise _Invalid(f"{field.key} = {raw} ({COMMAND_LINE}): not a YAML value: {_yaml_problem(error)}") from None
    return Setting(field.key, value, COMMAND_LINE, inside)


def _read_file(path: Path, problems: list[str]) -> list[Setting]:
    try:
        loader = yaml12.Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; give an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: not valid YAML: {_yaml_problem(error)}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"config file {path}: expected `section:` with indented `key: value` lines at the top")
    return list(_settings(loader, root, "", path, {}, problems))


def _settings(
    loader: yaml12.Loader, node: yaml.MappingNode, prefix: str, path: Path, lines: dict[str, int], problems: list[str]
) -> Iterator[Setting]:
    """The leaves below `node`; `lines` remembers where each key was set, to refuse a second time."""
    for key_node, value_node in node.value:
        key, line = f"{prefix}{loader.construct_object(key_node, deep=True)}", key_node.start_mark.line + 1
        source = f"{path}, line {line}"
        if lines.setdefault(key, line) != line:
            problems.append(f"{key} ({source}): already set in line {lines[key]}; keep one of them")
        elif key in sections() and isinstance(value_node, yaml.MappingNode):
            yield from _settings(loader, value_node, f"{key}.", path, lines, problems)
        elif key in sections() and value_node.tag.endswith(":null"):
            continue  # a section whose lines are all commented out
        else:
            try:
                field, inside = _find_field(key, source)
                yield Setting(field.key, loader.construct_object(value_node, deep=True), source, inside)
            except _Invalid as problem:
                problems.append(str(problem))
            except (yaml.YAMLError, ValueError) as error:
                problems.append(f"{key} ({source}): {_yaml_problem(error)}")


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _validate(settings: Sequence[Setting]) -> tuple[Config | None, list[str]]:
    """The config, or what is wrong with it.

    pydantic checks a section's rules only when its fields are right, and the rules across sections only when all
    sections are: what is wrong is taken out and the rest checked again, so that a second fault is not kept for later.
    """
    try:
        # JSON mode is strict (no "5" for 5, no 1 for true) and still takes text for a path.
        return Config.model_validate_json(json.dumps(_tree(settings)), strict=True), []
    except (TypeError, ValueError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
    if not faults:
        odd = next(setting for setting in settings if not _is_json(setting.value))
        wrong, problems = {odd.key}, [f"{odd.key} ({odd.source}): only text, numbers, booleans, lists and mappings"]
    else:
        wrong, problems = set(), []
        for fault in faults:
            keys, lines = _explain(fault, settings)
            wrong |= keys
            problems += [line for line in lines if line not in problems]  # a union has a fault for each of its kinds
    if wrong:
        _, others = _validate([setting for setting in settings if setting.key not in wrong])
        problems += [line for line in others if not any(_mentions(line, key) for key in wrong)]
    return None, problems


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _tree(settings: Sequence[Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = Config().model_dump(mode="json")
    for setting in settings:
        *parents, last = (*setting.key.split("."), *setting.inside)
        node = tree
        for parent in parents:
            child = node.get(parent)
            node[parent] = child if isinstance(child, dict) else {}
            node = node[parent]
        node[last] = copy.deepcopy(setting.value)
    return tree


def _explain(fault: Any, settings: Sequence[Setting]) -> tuple[set[str], list[str]]:
    """The keys to leave out before looking for further faults, and the lines that tell the user about this one."""
    place = ".".join(str(part) for part in fault["loc"])
    given = {setting.key: setting for setting in settings}
    for field in describe_fields():
        if place == field.key or place.startswith(f"{field.key}."):
            setting = given[field.key]
            value = value_text(setting.value) if not isinstance(setting.value, str) else json.dumps(setting.value)
            return {field.key}, [f"{field.key} = {value} ({setting.source}): expected {field.type}"]
    lines = []
    for line in str(fault["ctx"]["error"]).splitlines():
        rule = re.sub(rf"\b({'|'.join(_names(place))})\b", rf"{place}.\1", line) if place else line
        named = [f"{key}: {setting.source}" for key, setting in given.items() if _mentions(rule, key)]
        lines.append(rule + (f" ({'; '.join(named)})" if named else ""))
    return {key for key in given if place and key.startswith(f"{place}.")}, lines


def _names(section: str) -> list[str]:
    return list(sections()[section].model_fields)


def _mentions(line: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", line) is not None
