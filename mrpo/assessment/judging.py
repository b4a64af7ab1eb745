"""Asks the judges about every completion, and computes its rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache as cached
from typing import TypeVar

from mrpo.assessment.assessed import Assessed, follows_format
from mrpo.assessment.questions import ModelCompletions, dataset_of
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.judge import Judge, make_judge
from mrpo.judge.answers import AnswerJudge, AnswerRequest, make_answer_judge
from mrpo.judge.cache import CachedAnswerJudge, CachedJudge, IdentifiedAnswerJudge, IdentifiedJudge, VerdictCache
from mrpo.records import JudgeRequest, Unjudged, Verdict
from mrpo.rewards import AnswerReward
from mrpo.scoring import ParsedCompletion, score_parsed

ROUNDS = 8  # completions at once per request under way: verdicts are kept and progress is told after each such batch

Request = TypeVar("Request", JudgeRequest, AnswerRequest)
Result = TypeVar("Result")


class Assessor:
    """Judges completions with the judges of their data sets.

    Verdicts of an endpoint are kept in `cache` if there is one; the embedded judges cost less than looking them up.

    Raises:
        UserError: the judge's key or the BERTScore encoder is missing.
    """

    name = "by data set"

    def __init__(self, config: Config, cache: VerdictCache | None) -> None:
        self._config = config
        self._cache = cache
        self._answer_reward = AnswerReward(config.reward)
        self._step_judge_of = cached(self._make_step_judge)
        self._answer_judge_of = cached(self._make_answer_judge)

    def judge_name(self, datasets: Sequence[str]) -> str:
        """Who judges the steps and who the answers of these data sets."""
        steps = dict.fromkeys(self._step_judge_of(dataset).name for dataset in datasets)
        answers = dict.fromkeys(self._answer_judge_of(dataset).name for dataset in datasets)
        model = f" ({self._config.judge.model})" if self._config.judge.kind == "openai" else ""
        return f"steps: {', '.join(steps)}{model}; answers: {', '.join(answers)}{model}"

    def assess(self, model: ModelCompletions, progress: Callable[[int], None]) -> list[Assessed]:
        """Every completion, question by question. `progress` is told how many were judged since the last call.

        Raises:
            UserError: more than the share `judge.max_unjudged` of the completions so far stayed unjudged.
        """
        assessed: list[Assessed] = []
        unjudged: list[str] = []
        size = ROUNDS * self._config.judge.concurrency
        pairs = [(question, sample) for question in model.questions for sample in range(model.samples)]
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            inferred = [question.completions[sample] for question, sample in batch]
            parsed = [
                ParsedCompletion(question.example, item.completion, item.steps, item.answer)
                for (question, _), item in zip(batch, inferred, strict=True)
            ]
            scored = score_parsed(parsed, judge=self, answer_reward=self._answer_reward, config=self._config.reward)
            verdicts = self.judge_answers([AnswerRequest(item.example, item.answer) for item in parsed])
            for (question, sample), item, verdict in zip(batch, scored, verdicts, strict=True):
                well_formed = follows_format(item.completion, question.think_tag)
                assessed.append(Assessed(dataset_of(question), question.example, sample, item, verdict, well_formed))
            unjudged += _reasons(assessed[start:])
            self._check_judged(unjudged, len(assessed))
            progress(len(batch))
        return assessed

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict | Unjudged]:
        """One result per request, in order, by the step judge of its data set."""
        return _route(requests, lambda dataset: self._step_judge_of(dataset).judge)

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        """One result per request, in order, by the answer judge of its data set."""
        return _route(requests, lambda dataset: self._answer_judge_of(dataset).judge_answers)

    def _make_step_judge(self, dataset: str) -> Judge:
        judge = make_judge(self._config.judge, dataset)
        if self._cache is not None and isinstance(judge, IdentifiedJudge):
            return CachedJudge(judge, self._cache)
        return judge

    def _make_answer_judge(self, dataset: str) -> AnswerJudge:
        judge = make_answer_judge(self._config, dataset, self._answer_reward)
        if self._cache is not None and isinstance(judge, IdentifiedAnswerJudge):
            return CachedAnswerJudge(judge, self._cache)
        return judge

    def _check_judged(self, unjudged: Sequence[str], total: int) -> None:
        limit = self._config.judge.max_unjudged
        if len(unjudged) > limit * total:
            kept = "; verdicts so far are kept in the cache" if self._cache is not None else ""
            raise UserError(
                f"the judge left {len(unjudged)} of {total} completions unjudged, above "
                f"judge.max_unjudged={limit:g}: {unjudged[-1]}{kept}"
            )


def _reasons(assessed: Sequence[Assessed]) -> Iterator[str]:
    """Why a completion is unjudged, once for each that is."""
    for item in assessed:
        for verdict in (item.scored.verdict, item.answer_verdict):
            if isinstance(verdict, Unjudged):
                yield verdict.reason
                break


def _route(
    requests: Sequence[Request], ask_of: Callable[[str], Callable[[Sequence[Request]], Sequence[Result]]]
) -> list[Result]:
    """The results of `requests`, in order, where those of one data set go together to `ask_of(dataset)`."""
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(str(request.example.metadata["dataset"]), []).append(place)
    results: dict[int, Result] = {}
    for dataset, of_dataset in places.items():
        answers = ask_of(dataset)([requests[place] for place in of_dataset])
        results |= zip(of_dataset, answers, strict=True)
    return [results[place] for place in range(len(requests))]
