"""The folder of an evaluation: eval.json, and NAME.traces.jsonl with every judged completion of each model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrpo.assessment.assessed import Assessed, trace_record
from mrpo.assessment.content import settings_of
from mrpo.assessment.questions import ModelCompletions
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.whole_files import write_whole

CONTENT = "eval.json"
_TRACES = ".traces.jsonl"


def check_folder(folder: Path, models: Sequence[ModelCompletions], config: Config, resamples: int) -> None:
    """An evaluation that is there may be made again, but another one does not take its place unasked.

    Raises:
        UserError: the folder holds an evaluation of other files or names, or with other settings; says what differs.
    """
    there = read_content(folder)
    if there is None:
        return
    problem = f"{folder} holds an evaluation"
    files = {name: entry.get("file") for name, entry in there["models"].items()}
    if files != {model.name: str(model.file.absolute()) for model in models}:
        problem += f" of {', '.join(f'{name} ({file})' for name, file in files.items())}"
    elif different := _difference(there.get("settings", {}), settings_of(config, resamples)):
        problem += f" with {different}"
    else:
        return
    raise UserError(f"{problem}; replace it with --overwrite, or name another --out")


def read_content(folder: Path) -> dict[str, Any] | None:
    """The content of FOLDER/eval.json; None without that file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    path = folder / CONTENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; delete it, or name another --out") from None
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise UserError(f"{path}: not what mrpo eval wrote; delete it, or name another --out")
    return content


def remove_evaluation(folder: Path, content: Mapping[str, Any]) -> None:
    """Removes the evaluation of FOLDER/eval.json, which holds `content`: that file first, then its models' traces.

    Raises:
        OSError: a file cannot be removed.
    """
    (folder / CONTENT).unlink(missing_ok=True)
    for path in folder.glob(f"*{_TRACES}"):
        if path.name.removesuffix(_TRACES) in content["models"]:
            path.unlink()


def write_traces(folder: Path, name: str, assessed: Sequence[Assessed]) -> None:
    """Writes FOLDER/NAME.traces.jsonl, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    records = (json.dumps(trace_record(item, name), allow_nan=False) + "\n" for item in assessed)
    write_whole(_trace_file(folder, name), records)


def write_content(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes FOLDER/eval.json, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / CONTENT, [json.dumps(content, indent=1, allow_nan=False) + "\n"])


def _trace_file(folder: Path, name: str) -> Path:
    return folder / f"{name}{_TRACES}"


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """The first setting that differs, as "judge.kind=embedded, not openai"; empty without any."""
    for key, value in wanted.items():
        then = there.get(key)
        if isinstance(value, dict) and isinstance(then, dict):
            if inner := _difference(then, value, f"{prefix}{key}."):
                return inner
        elif then != value:
            return f"{prefix}{key}={then}, not {value}"
    return ""
