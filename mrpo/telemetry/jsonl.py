"""JSON lines that survive a kill: a record is written in one call, and a resumed run cuts what it will write again.

`JsonLines` keeps records by their `step`; the functions below it serve any other file of records.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mrpo.errors import UserError


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `JsonLines` wrote. A torn last line (killed in mid-write) is left out.

    Raises:
        UserError: the file is missing, or a line before the last is not a JSON object with an integer `step`.
    """
    try:
        return [record for _, record in _whole_records(path)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a .jsonl file that a run wrote") from None


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the JSON object of each line, read as they are asked for; a torn last line is left out.

    Raises:
        OSError: the file cannot be read.
        UserError: a line before the last is not a JSON object.
    """
    for number, _, record in whole_lines(path):
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; fix or delete the line")
        yield number, record


class JsonLines:
    """Append records to a file, each as one line in one unbuffered write call: a kill loses no finished record.

    The file is first cut to the records whose `step` is at most `resume_step`; None starts it anew. Either happens
    by temporary file and rename, so that the old content or the new one is there at any moment.

    Raises:
        UserError: a line before the last of a file to resume is not a JSON object with an integer `step`.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_until(path, resume_step)
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append `record` with `step` as its first key. NaN and infinities become null: JSON has neither.

        Raises:
            OSError: the line could not be written whole.
        """
        append_line(self._file, {"step": step, **{key: value for key, value in record.items() if key != "step"}})

    def close(self) -> None:
        self._file.close()


def append_line(file: IO[bytes], record: Mapping[str, Any]) -> None:
    """Appends `record` to an unbuffered file as one line in one call. NaN and infinities become null: JSON has neither.

    Raises:
        OSError: the line could not be written whole.
    """
    line = json.dumps(_json_value(record), allow_nan=False).encode() + b"\n"
    written = file.write(line)
    if written != len(line):
        raise OSError(f"{file.name}: wrote {written} of {len(line)} bytes; is the disk full?")


def whole_lines(path: Path) -> Iterator[tuple[int, bytes, Any]]:
    """Number, bytes and JSON value (None: not JSON) of each line; a last line that a kill has torn is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield number, line, value


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _keep_until(path: Path, last_step: int | None) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as kept:
        if last_step is not None and path.exists():
            kept.writelines(line for line, record in _whole_records(path) if record["step"] <= last_step)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(temporary, path)


def _whole_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line, record in whole_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}, line {number}: not a JSON object with an integer step; fix or delete the line")
        yield line, record
