"""Asks the judges about every completion, and computes its rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from mrpo.assessment.assessed import Assessed, follows_format
from mrpo.assessment.questions import ModelCompletions, dataset_of
from mrpo.completions import InferredQuestion
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.judge import Judge, make_judge
from mrpo.judge.answers import AnswerJudge, AnswerRequest, make_answer_judge
from mrpo.judge.cache import CachedAnswerJudge, CachedJudge, IdentifiedAnswerJudge, IdentifiedJudge, VerdictCache
from mrpo.records import Unjudged
from mrpo.rewards import AnswerReward
from mrpo.scoring import ParsedCompletion, PendingScore, collect_scores, reward_answers, submit_parsed

ROUNDS = 8  # completions per request under way in a batch, after each of which progress is told


@dataclass(frozen=True)
class _Batch:
    """Completions with the judges: question and sample of each, and what they will say of its steps and answer."""

    places: list[tuple[InferredQuestion, int]]
    scores: list[PendingScore]
    answers: list[Future[bool | Unjudged]]


class Assessor:
    """Judges completions with the judges of their data sets; `close` ends them.

    Verdicts of an endpoint are kept in `cache` if there is one; the embedded judges cost less than looking them up.

    Raises:
        UserError: the judge's key or an encoder is missing.
    """

    def __init__(self, config: Config, cache: VerdictCache | None) -> None:
        self._config = config
        self._cache = cache
        self._answer_reward = AnswerReward(config.reward)
        self._step_judges: dict[str, Judge] = {}
        self._answer_judges: dict[str, AnswerJudge] = {}

    def judge_name(self, datasets: Sequence[str]) -> str:
        """Who judges the steps and who the answers of these data sets."""
        steps = dict.fromkeys(self._step_judge(dataset).name for dataset in datasets)
        answers = dict.fromkeys(self._answer_judge(dataset).name for dataset in datasets)
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
        places = [(question, sample) for question in model.questions for sample in range(model.samples)]
        batches = (self._submit(places[start : start + size]) for start in range(0, len(places), size))
        for batch in _one_ahead(batches):
            found = self._collect(batch)
            assessed += found
            unjudged += _reasons(found)
            self._check_judged(unjudged, len(assessed))
            progress(len(found))
        return assessed

    def close(self) -> None:
        """Closes the judges."""
        judges: list[Judge | AnswerJudge] = [*self._step_judges.values(), *self._answer_judges.values()]
        for judge in judges:
            judge.close()

    def _submit(self, places: list[tuple[InferredQuestion, int]]) -> _Batch:
        inferred = [question.completions[sample] for question, sample in places]
        parsed = [
            ParsedCompletion(question.example, item.completion, item.steps, item.answer)
            for (question, _), item in zip(places, inferred, strict=True)
        ]
        datasets = [dataset_of(question) for question, _ in places]
        scores = [submit_parsed(item, self._step_judge(d)) for item, d in zip(parsed, datasets, strict=True)]
        answers: dict[int, Future[bool | Unjudged]] = {}
        for dataset in dict.fromkeys(datasets):
            mine = [place for place, name in enumerate(datasets) if name == dataset]
            requests = [AnswerRequest(parsed[place].example, parsed[place].answer) for place in mine]
            answers |= zip(mine, self._answer_judge(dataset).submit_answers(requests), strict=True)
        return _Batch(places, scores, [answers[place] for place in range(len(places))])

    def _collect(self, batch: _Batch) -> list[Assessed]:
        answers = reward_answers(batch.scores, self._answer_reward)
        scored, _ = collect_scores(batch.scores, answers, self._config.reward)
        return [
            Assessed(
                dataset_of(question), question.example, sample, item, answer.result(),
                follows_format(item.completion, question.think_tag),
            )
            for (question, sample), item, answer in zip(batch.places, scored, batch.answers, strict=True)
        ]  # fmt: skip

    def _step_judge(self, dataset: str) -> Judge:
        name = self._judge_key(dataset)
        if name not in self._step_judges:
            judge = make_judge(self._config.judge, dataset)
            if self._cache is not None and isinstance(judge, IdentifiedJudge):
                judge = CachedJudge(judge, self._cache)
            self._step_judges[name] = judge
        return self._step_judges[name]

    def _answer_judge(self, dataset: str) -> AnswerJudge:
        name = self._judge_key(dataset)
        if name not in self._answer_judges:
            judge = make_answer_judge(self._config, dataset, self._answer_reward)
            if self._cache is not None and isinstance(judge, IdentifiedAnswerJudge):
                judge = CachedAnswerJudge(judge, self._cache)
            self._answer_judges[name] = judge
        return self._answer_judges[name]

    def _judge_key(self, dataset: str) -> str:
        """What a data set's judges are kept under: an endpoint serves them all."""
        return "" if self._config.judge.kind == "openai" else dataset

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


def _one_ahead(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches, each when the next has been submitted, so that the judges never run dry."""
    submitted: list[_Batch] = []
    for batch in batches:
        submitted.append(batch)
        if len(submitted) > 1:
            yield submitted.pop(0)
    yield from submitted
