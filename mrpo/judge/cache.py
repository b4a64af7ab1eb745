"""Verdicts on disk, so that a restart or a repeated evaluation asks for none again.

One SQLite file that several processes may use at once. Every verdict is found under a digest of all that it depends on:
the judge, its prompt and the request. What stayed unjudged is not kept.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from mrpo.errors import UserError
from mrpo.judge import Judge
from mrpo.judge.answers import AnswerJudge, AnswerRequest
from mrpo.judge.images import PerPicture, image_digest
from mrpo.pictures import Picture
from mrpo.records import JudgeRequest, StepVerdict, Unjudged, Verdict

FILE_NAME = "verdicts.sqlite"
_FORMAT = 1  # of keys and values; another one finds nothing of this
_LOCK_SECONDS = 60.0

Request = TypeVar("Request")
Result = TypeVar("Result")
Item = TypeVar("Item")


@runtime_checkable
class IdentifiedJudge(Judge, Protocol):
    """A judge whose verdict depends on `identity` and on the request's images and texts alone."""

    identity: str


@runtime_checkable
class IdentifiedAnswerJudge(AnswerJudge, Protocol):
    """An answer judge whose verdict depends on `identity` and on the request's texts alone."""

    identity: str


class VerdictCache:
    """FOLDER/verdicts.sqlite, made if it is missing when it is first used.

    The file keeps SQLite's rollback journal: write-ahead logging needs memory that processes share, which network file
    systems do not give. Every use opens the file anew, so that the object may cross a fork or a thread. Every use
    raises a UserError if the folder or the file cannot be written, or the file is no such cache.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME

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
            # Every time: somebody may have removed the file or its folder during the run.
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A transaction takes the write lock at its start, so that it waits for others and never fails half-way.
            with (
                closing(sqlite3.connect(self._path, timeout=_LOCK_SECONDS, isolation_level="IMMEDIATE")) as connection,
                connection,
            ):
                connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
                yield connection
        except OSError as error:
            raise UserError(f"{self._path.parent}: {error.strerror}; name a folder that can be written") from None
        except sqlite3.Error as error:
            raise UserError(f"{self._path}: {error}; {_remedy(error)}name another folder for the cache") from None


class CachedJudge:
    """A judge that asks `judge` only for what the cache does not hold, and for the same thing once."""

    def __init__(self, judge: IdentifiedJudge, cache: VerdictCache) -> None:
        self.name, self.identity = judge.name, judge.identity
        self._judge = judge
        key = partial(_step_key, judge.identity, PerPicture(image_digest))
        self._lookup = _Lookup(cache, key, judge.submit, _write_verdict, _read_verdict)

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        """Looks the request up in the background, and asks for it if need be."""
        return self._lookup.submit(request)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def stats(self) -> dict[str, float]:
        """Those of the judge, and judge/cached: how many verdicts were found in the cache."""
        return self._judge.stats() | {"judge/cached": float(self._lookup.take_found())}

    def close(self) -> None:
        self._lookup.close(self._judge.close)


class CachedAnswerJudge:
    """As `CachedJudge`, of answers."""

    def __init__(self, judge: IdentifiedAnswerJudge, cache: VerdictCache) -> None:
        self.name, self.identity = judge.name, judge.identity
        self._judge = judge
        self._lookup = _Lookup(cache, partial(_answer_key, judge.identity), self._ask, bool, bool)

    def submit_answers(self, requests: Sequence[AnswerRequest]) -> list[Future[bool | Unjudged]]:
        """Looks the requests up in the background, and asks for them if need be."""
        return [self._lookup.submit(request) for request in requests]

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One result per request, in order."""
        return [future.result() for future in self.submit_answers(requests)]

    def close(self) -> None:
        self._lookup.close(self._judge.close)

    def _ask(self, request: AnswerRequest) -> Future[bool | Unjudged]:
        return self._judge.submit_answers([request])[0]


class _Lookup(Generic[Request, Result]):
    """Between a judge and the cache: one thread that looks up and keeps, so that nobody else waits for the disk.

    What has gathered while the thread was busy is looked up, or written, in one go. A verdict is written before it is
    handed out: one that was used is never asked for again. Equal requests share one asking, also when the second comes
    while the first is under way. A request whose key is None is always asked for.
    """

    def __init__(
        self,
        cache: VerdictCache,
        key_of: Callable[[Request], str | None],
        ask: Callable[[Request], Future[Result | Unjudged]],
        write: Callable[[Result], Any],
        read: Callable[[Any], Result],
    ) -> None:
        self._cache, self._key_of, self._ask, self._write, self._read = cache, key_of, ask, write, read
        self._thread = ThreadPoolExecutor(1, "verdict-cache")
        self._submitted: deque[tuple[Request, Future[Result | Unjudged]]] = deque()
        self._arrived: deque[tuple[str, Future[Result | Unjudged]]] = deque()
        self._awaited: dict[str, list[Future[Result | Unjudged]]] = {}  # touched by the thread alone
        self._found = 0
        self._closed = False

    def submit(self, request: Request) -> Future[Result | Unjudged]:
        future: Future[Result | Unjudged] = Future()
        self._submitted.append((request, future))
        self._thread.submit(self._look_up)
        return future

    def take_found(self) -> int:
        """How many requests were found in the cache since the last call."""
        found, self._found = self._found, 0
        return found

    def close(self, close_judge: Callable[[], None]) -> None:
        """Keeps what has arrived, closes the judge between the last asking and the last keeping, ends the thread."""
        if not self._closed:
            self._closed = True
            self._thread.submit(close_judge).result()
            self._thread.shutdown()

    def _look_up(self) -> None:
        """The requests that were submitted since the last time."""
        batch = _drain(self._submitted)
        try:
            keys = [self._key_of(request) for request, _ in batch]
            kept = self._cache.find([key for key in dict.fromkeys(keys) if key is not None])
        except Exception as error:  # whoever waits must be told
            _fail([future for _, future in batch], error)
            return
        for key, (request, future) in zip(keys, batch, strict=True):
            try:
                self._answer(key, kept, request, future)
            except Exception as error:
                _fail([future], error)

    def _answer(self, key: str | None, kept: Mapping[str, Any], request: Request, future: Future) -> None:
        if key is None:
            self._ask(request).add_done_callback(partial(_hand_over, [future]))
        elif key in kept:
            self._found += 1
            future.set_result(self._read(kept[key]))
        elif key in self._awaited:
            self._awaited[key].append(future)
        else:
            asked = self._ask(request)
            self._awaited[key] = [future]
            asked.add_done_callback(partial(self._arrive, key))

    def _arrive(self, key: str, asked: Future[Result | Unjudged]) -> None:
        self._arrived.append((key, asked))
        self._thread.submit(self._keep)

    def _keep(self) -> None:
        """The verdicts that arrived since the last time."""
        batch = [(self._awaited.pop(key), key, asked) for key, asked in _drain(self._arrived)]
        told = {key: asked.result() for _, key, asked in batch if not asked.cancelled() and not asked.exception()}
        try:
            self._cache.add({key: self._write(r) for key, r in told.items() if not isinstance(r, Unjudged)})
        except Exception as error:
            _fail([future for futures, _, _ in batch for future in futures], error)
        else:
            for futures, _, asked in batch:
                _hand_over(futures, asked)


def _remedy(error: sqlite3.Error) -> str:
    """What else than to take another folder helps with a cache that cannot be used.

    Only a file that is no database, or a broken one, is to be deleted.
    """
    if not isinstance(error, sqlite3.OperationalError):
        return "delete the file, or "
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without SQLite's finer distinctions
    if code == sqlite3.SQLITE_ERROR:
        return "this is a database of something else: "
    remedies = {sqlite3.SQLITE_FULL: "make room on its disk", sqlite3.SQLITE_BUSY: "end the process that has locked it"}
    return f"the verdicts in it are kept: {remedies.get(code, 'let it be read and written')}, or "


def _drain(items: deque[Item]) -> list[Item]:
    """All that is in `items` now; others may append meanwhile."""
    return [items.popleft() for _ in range(len(items))]


def _hand_over(futures: Sequence[Future], asked: Future) -> None:
    if asked.cancelled():
        _fail(futures, CancelledError())
    elif error := asked.exception():
        _fail(futures, error)
    else:
        for future in futures:
            future.set_result(asked.result())


def _fail(futures: Sequence[Future], error: BaseException) -> None:
    for future in futures:
        future.set_exception(error)


def _answer_key(identity: str, request: AnswerRequest) -> str:
    example = request.example
    return _key(identity, question=example.question, gold_answer=example.answer, answer=request.answer)


def _step_key(identity: str, digest: Callable[[Picture], str], request: JudgeRequest) -> str | None:
    example = request.example
    try:
        images = [digest(image) for image in example.images]
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


def _write_verdict(verdict: Verdict) -> list[list[Any]]:
    return [[step.gold_alignment, step.answer_contribution, step.reason] for step in verdict.steps]


def _read_verdict(value: Any) -> Verdict:
    return Verdict(tuple(StepVerdict(*step) for step in value))
