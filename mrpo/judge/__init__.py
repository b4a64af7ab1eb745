"""Judges: they say of every reasoning step whether it agrees with the gold rationale and whether it helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mrpo.config import JudgeConfig
from mrpo.records import JudgeRequest, Unjudged, Verdict


class Judge(Protocol):
    """Anything that judges completions. `name` goes into logs and metrics."""

    name: str

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order; a verdict has one entry per step.

        A judge that cannot tell returns `Unjudged` with the reason. It never raises for a single completion and never
        answers "invalid" in place of "unknown".
        """
        ...


def make_judge(config: JudgeConfig, data_name: str) -> Judge:
    """The judge that `judge.kind` names: the embedded one of the data set, or an OpenAI-compatible endpoint.

    Raises:
        UserError: the endpoint needs a key and its environment variable is not set.
    """
    if config.kind == "openai":
        from mrpo.judge.openai_client import OpenAIJudge

        return OpenAIJudge(config)
    if data_name == "phantom":
        from mrpo.judge.phantom import PhantomJudge

        return PhantomJudge()
    from mrpo.judge.lexical import LexicalJudge

    return LexicalJudge(min_overlap=config.min_overlap)
