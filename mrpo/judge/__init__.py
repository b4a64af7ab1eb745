"""Judges: they say of every reasoning step whether it agrees with the gold rationale and whether it helps.

A judge takes one completion at a time and gives a future, so that a trainer hands over each completion the moment its
generation ends and goes on working; see `mrpo.scoring`. Embedded judges are done when `submit` returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TypeVar

from mrpo.config import JudgeConfig
from mrpo.records import Example, JudgeRequest, Unjudged, Verdict

Result = TypeVar("Result")


class Judge(Protocol):
    """Anything that judges completions. `name` goes into logs and metrics.

    A judge that cannot tell returns `Unjudged` with the reason. It never raises for a single completion and never
    answers "invalid" in place of "unknown". All methods may be called from any thread.
    """

    name: str

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        """Begins to judge one completion; the verdict has one entry per step."""
        ...

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order, when all are there."""
        ...

    def stats(self) -> dict[str, float]:
        """Metrics of the verdicts that arrived since the last call, such as judge/latency_p50; empty: nothing to say.

        Those of several processes are put together by `mrpo.judge.stats.merge_stats`.
        """
        ...

    def close(self) -> None:
        """Ends threads and connections; verdicts still awaited become `Unjudged`. Does no harm twice."""
        ...


def finished(result: Result) -> Future[Result]:
    """A future that has its result."""
    future: Future[Result] = Future()
    future.set_result(result)
    return future


class EmbeddedJudge(ABC):
    """A judge in this process that takes no time worth waiting for: `submit` returns a finished future."""

    @abstractmethod
    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        """The result of one completion."""

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        return finished(self.judge_one(request))

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order."""
        return [self.judge_one(request) for request in requests]

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:  # noqa: B027 - there is nothing to close, so none need say more
        pass


def gold_rationale(example: Example) -> str | None:
    """The gold rationale; None also where it is blank. Without one, Answer Contribution alone makes a step valid."""
    return example.rationale if example.rationale and example.rationale.strip() else None


def make_judge(config: JudgeConfig, data_name: str, cache_folder: Path | None = None) -> Judge:
    """The judge that `judge.kind` names: the embedded one of the data set, or an OpenAI-compatible endpoint.

    The verdicts of an endpoint are kept in `judge.cache`, or else in `cache_folder`, made when the first one is looked
    for; with neither they are not kept. Embedded judges cost less than looking up.

    Raises:
        UserError: the endpoint needs a key and its environment variable is not set, or the encoder cannot be loaded.
    """
    if config.kind == "openai":
        from mrpo.judge.cache import CachedJudge, VerdictCache
        from mrpo.judge.endpoint import Endpoint
        from mrpo.judge.openai_client import OpenAIJudge

        judge = OpenAIJudge(Endpoint(config))
        folder = config.cache or cache_folder
        return judge if folder is None else CachedJudge(judge, VerdictCache(folder))
    if data_name == "phantom":
        from mrpo.judge.phantom import PhantomJudge

        return PhantomJudge()
    if config.encoder is not None:
        from mrpo.judge.sentences import SentenceEncoder, SentenceJudge

        return SentenceJudge(SentenceEncoder(config.encoder), config.min_overlap, config.min_similarity)
    from mrpo.judge.lexical import LexicalJudge

    return LexicalJudge(min_overlap=config.min_overlap)
