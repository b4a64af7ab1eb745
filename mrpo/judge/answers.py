"""Judges of answers: each says of a model's answer whether it is the gold one. Used by `mrpo eval`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from mrpo.config import Config
from mrpo.judge import finished
from mrpo.records import Example, Unjudged
from mrpo.rewards.answer import AnswerReward


@dataclass(frozen=True)
class AnswerRequest:
    """What a judge sees of one answer: the example and the model's answer, None where it gave none."""

    example: Example
    answer: str | None

    @property
    def is_empty(self) -> bool:
        return not (self.answer or "").strip()


class AnswerJudge(Protocol):
    """Anything that judges answers. `name` goes into logs and metrics.

    A judge that cannot tell returns `Unjudged` with the reason. It never raises for a single answer and never says
    "wrong" in place of "unknown". A missing or empty answer is wrong.
    """

    name: str

    def submit_answers(self, requests: Sequence[AnswerRequest]) -> list[Future[bool | Unjudged]]:
        """Begins to judge answers, in order: whether each is correct."""
        ...

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One verdict per request, in order, when all are there."""
        ...

    def close(self) -> None:
        """As of a `Judge`."""
        ...


class _EmbeddedAnswerJudge(ABC):
    def __init__(self, reward: AnswerReward) -> None:
        self._reward = reward

    @abstractmethod
    def _is_correct(self, value: float, parts: Mapping[str, float]) -> bool:
        """Whether an answer of this reward is correct."""

    def submit_answers(self, requests: Sequence[AnswerRequest]) -> list[Future[bool | Unjudged]]:
        return [finished(verdict) for verdict in self.judge_answers(requests)]

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One verdict per request, in order; none is ever unjudged."""
        rewards = self._reward([request.answer for request in requests], [r.example.answer for r in requests])
        return [self._is_correct(value, parts) for value, parts in rewards]

    def close(self) -> None:  # noqa: B027 - there is nothing to close, so none need say more
        pass


class ExactAnswerJudge(_EmbeddedAnswerJudge):
    """Correct is what equals the gold answer but for case, white space and a final full stop, or is the same quantity.

    Exact where an answer has one right wording, as on phantom.
    """

    name = "exact"

    def _is_correct(self, value: float, parts: Mapping[str, float]) -> bool:
        return parts["symbolic"] == 1.0


class LexicalAnswerJudge(_EmbeddedAnswerJudge):
    """A stand-in without understanding: correct is an answer whose reward exceeds `tau`, as in training.

    Exact answers have reward 1; the others share words with the gold answer. Synonyms are missed, and "left lung" may
    pass for "right lung": use `judge.kind=openai` for results.
    """

    name = "lexical"

    def __init__(self, reward: AnswerReward, *, tau: float) -> None:
        super().__init__(reward)
        self._tau = tau

    def _is_correct(self, value: float, parts: Mapping[str, float]) -> bool:
        return value > self._tau


def make_answer_judge(config: Config, data_name: str, reward: AnswerReward) -> AnswerJudge:
    """The judge that `judge.kind` names: an endpoint, or the embedded one of the data set.

    Raises:
        UserError: the endpoint needs a key and its environment variable is not set.
    """
    if config.judge.kind == "openai":
        from mrpo.judge.endpoint import Endpoint
        from mrpo.judge.openai_client import OpenAIAnswerJudge

        return OpenAIAnswerJudge(Endpoint(config.judge))
    if data_name == "phantom":
        return ExactAnswerJudge(reward)
    return LexicalAnswerJudge(reward, tau=config.advantage.tau)
