"""Verdicts on disk, so that a restart or a repeated evaluation asks for none again.

One SQLite file that several processes may use at once. Every verdict is found under a digest of all that it depends on:
the judge, its prompt and the request. What stayed unjudged is not kept.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from PIL import Image

from mrpo.errors import UserError
from mrpo.judge import Judge
from mrpo.judge.answers import AnswerJudge, AnswerRequest
from mrpo.records import JudgeRequest, StepVerdict, Unjudged, Verdict

FILE_NAME = "verdicts.sqlite"
_FORMAT = 1  # of keys and values; another one finds nothing of this
_LOCK_SECONDS = 60.0

Request = TypeVar("Request")
Result = TypeVar("Result")


@runtime_checkable
class IdentifiedJudge(Judge, Protocol):
    """A judge whose verdict depends on `identity` and on the request's images and texts alone."""

    identity: str


@runtime_checkable
class IdentifiedAnswerJudge(AnswerJudge, Protocol):
    """An answer judge whose verdict depends on `identity` and on the request's texts alone."""

    identity: str


class VerdictCache:
    """FOLDER/verdicts.sqlite, made if it is missing.

    The file keeps SQLite's rollback journal: write-ahead logging needs memory that processes share, which network file
    systems do not give. Every use opens the file anew, so that the object may cross a fork or a thread.

    Raises:
        UserError: the folder cannot be written, or the file is no such cache.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; name a folder that can be written") from None
        with self._open() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")

    def find(self, keys: Sequence[str]) -> dict[str, Any]:
        """The verdicts, as JSON values, of those keys that have one."""
        query = "SELECT verdict FROM verdicts WHERE key = ?"
        with self._open() as connection:
            rows = ((key, connection.execute(query, (key,)).fetchone()) for key in keys)
            return {key: json.loads(row[0]) for key, row in rows if row is not None}

    def add(self, verdicts: Mapping[str, Any]) -> None:
        """Keep JSON values under their keys, all or none of them; a key that is there keeps its first."""
        rows = [(key, json.dumps(verdict)) for key, verdict in verdicts.items()]
        with self._open() as connection:
            connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            # A transaction takes the write lock at its start, so that it waits for others and never fails half-way.
            with (
                closing(sqlite3.connect(self._path, timeout=_LOCK_SECONDS, isolation_level="IMMEDIATE")) as connection,
                connection,
            ):
                yield connection
        except sqlite3.Error as error:
            raise UserError(f"{self._path}: {error}; delete the file, or name another folder for the cache") from None


class CachedJudge:
    """A judge that asks `judge` only for what the cache does not hold, and for the same thing once."""

    def __init__(self, judge: IdentifiedJudge, cache: VerdictCache) -> None:
        self.name, self.identity = judge.name, judge.identity
        self._judge, self._cache = judge, cache

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order."""
        keys = [_step_key(self.identity, request) for request in requests]
        return _through(self._cache, keys, requests, self._judge.judge, _write_verdict, _read_verdict)


class CachedAnswerJudge:
    """As `CachedJudge`, of answers."""

    def __init__(self, judge: IdentifiedAnswerJudge, cache: VerdictCache) -> None:
        self.name, self.identity = judge.name, judge.identity
        self._judge, self._cache = judge, cache

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One result per request, in order."""
        keys: list[str | None] = [
            _key(self.identity, question=r.example.question, gold_answer=r.example.answer, answer=r.answer)
            for r in requests
        ]
        return _through(self._cache, keys, requests, self._judge.judge_answers, bool, bool)


def _through(
    cache: VerdictCache,
    keys: Sequence[str | None],
    requests: Sequence[Request],
    ask: Callable[[Sequence[Request]], list[Result | Unjudged]],
    write: Callable[[Result], Any],
    read: Callable[[Any], Result],
) -> list[Result | Unjudged]:
    """The results of `requests`: those kept, and those that `ask` gives for the others, which are then kept.

    A request whose key is None is always asked for.
    """
    kept = cache.find([key for key in keys if key is not None])
    names = [place if key is None else key for place, key in enumerate(keys)]
    missing = {name: request for name, request in zip(names, requests, strict=True) if name not in kept}
    asked = dict(zip(missing, ask(list(missing.values())), strict=True)) if missing else {}
    cache.add({name: write(r) for name, r in asked.items() if isinstance(name, str) and not isinstance(r, Unjudged)})
    return [asked[name] if name in asked else read(kept[str(name)]) for name in names]


def _step_key(identity: str, request: JudgeRequest) -> str | None:
    example = request.example
    try:
        images = [_image_digest(image) for image in example.images]
    except OSError:
        return None  # the judge says what is wrong with the image
    return _key(
        identity,
        images=images,
        question=example.question,
        gold_answer=example.answer,
        gold_rationale=example.rationale,
        steps=request.steps,
        answer=request.answer,
    )


def _key(identity: str, **content: Any) -> str:
    text = json.dumps({"format": _FORMAT, "judge": identity, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _image_digest(image: Path | Image.Image) -> str:
    if isinstance(image, Path):
        status = image.stat()
        return _file_digest(image, status.st_mtime_ns, status.st_size)
    content = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    content.update(image.tobytes())
    return content.hexdigest()


@lru_cache(maxsize=1 << 16)
def _file_digest(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_verdict(verdict: Verdict) -> list[list[Any]]:
    return [[step.gold_alignment, step.answer_contribution, step.reason] for step in verdict.steps]


def _read_verdict(value: Any) -> Verdict:
    return Verdict(tuple(StepVerdict(*step) for step in value))
