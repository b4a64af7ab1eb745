"""An evaluation over processes, which are threads here, and what it amounts to as metrics of a step."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from thread_processes import Meeting, ThreadRuntime

from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.evaluation import Evaluation, evaluate, validation_metrics
from mrpo.judge import EmbeddedJudge
from mrpo.records import Completion, EvaluatedSample, Example, JudgeRequest, Unjudged, Verdict
from mrpo.scoring import Scorer

EXAMPLES = [Example(f"q{number}", (), "Where?", f"place {number}", None, "test") for number in range(5)]


class Copier:
    """Stands for processor, tokenizer and engine: every completion is the gold answer, without tokens or steps."""

    all_special_tokens = ()
    unk_token = bos_token = eos_token = pad_token = None

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return ""

    def encode_prompt(self, example: Example) -> Example:
        return example

    def generate(self, prompts: Sequence[Example], params: Any, on_done: Any = None) -> list[list[Completion]]:
        groups = [[Completion((), f"<answer>{example.answer}</answer>", "stop")] for example in prompts]
        for place, (completion,) in reversed(list(enumerate(groups))):
            if on_done is not None:
                on_done(place, 0, completion)
        return groups


class JudgeOfSome(EmbeddedJudge):
    """Has no verdict for the questions with these ids."""

    def __init__(self, *unjudged: str) -> None:
        self.unjudged = unjudged

    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        return Unjudged("rate limit") if request.example.id in self.unjudged else Verdict(())


class JudgeOfAll(JudgeOfSome):
    """Writes down how many questions it had been asked when somebody waited for a verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0
        self.asked_when_awaited: set[int] = set()

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        judge = self

        class Awaited(Future[Verdict | Unjudged]):
            def result(self, timeout: float | None = None) -> Verdict | Unjudged:
                judge.asked_when_awaited.add(judge.num_asked)
                return super().result(timeout)

        self.num_asked += 1
        verdict = Awaited()
        verdict.set_result(self.judge_one(request))
        return verdict


def evaluate_with(judge: EmbeddedJudge, *, limit: float, num_processes: int = 2) -> list[Evaluation]:
    """What each process gets."""
    config = Config.model_validate({"rollout": {"batch_size": 2}, "judge": {"max_unjudged": limit}})
    meeting, copier = Meeting(num_processes), Copier()

    def run(rank: int) -> Evaluation:
        runtime: Any = ThreadRuntime(rank, meeting, torch.device("cpu"))
        stand_in: Any = copier
        scorer = Scorer(config, judge, copier, "think")
        return evaluate(
            EXAMPLES,
            config=config,
            runtime=runtime,
            processor=stand_in,
            engine=stand_in,
            scorer=scorer,
            progress=lambda count: None,
        )

    with ThreadPoolExecutor(num_processes) as threads:
        return list(threads.map(run, range(num_processes)))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_all_processes_get_the_outcome_of_all_questions_in_their_order(num_processes: int) -> None:
    for found in evaluate_with(JudgeOfSome("q1", "q3"), limit=0.4, num_processes=num_processes):
        assert [sample.question_id for sample in found.samples] == [example.id for example in EXAMPLES]
        assert [sample.validity for sample in found.samples] == [(), None, (), None, ()]
        assert all(sample.correct for sample in found.samples)


def test_no_verdict_is_waited_for_before_all_questions_are_answered() -> None:
    judge = JudgeOfAll()
    evaluate_with(judge, limit=0.0, num_processes=1)
    assert judge.asked_when_awaited == {5}


def test_an_evaluation_with_too_few_verdicts_is_refused_with_the_judges_reason() -> None:
    """Of two processes the first, which tells it, has all its verdicts."""
    with pytest.raises(UserError, match=r"40% of an evaluation's .* judge\.max_unjudged=30%: rate limit; when"):
        evaluate_with(JudgeOfSome("q1", "q3"), limit=0.3)


def sample(correct: bool, validity: tuple[bool, ...] | None, reward: float) -> EvaluatedSample:
    return EvaluatedSample("q", correct, validity, reward, greedy=True)


def test_accuracy_is_of_all_and_the_rest_of_those_judged() -> None:
    samples = [
        sample(True, (True, True, True), 2.0),
        sample(False, (False, True, True), 1.0),  # fails at 1 of 3: early
        sample(False, (True, True, False), 0.0),
        sample(True, None, 9.0),
    ]
    assert validation_metrics(samples) == pytest.approx(
        {
            "validation/accuracy": 0.5,
            "validation/unjudged": 0.25,
            "validation/reward": 1.0,
            "validation/early": 1 / 3,
            "validation/fully_valid": 1 / 3,
        }
    )


def test_without_a_judged_completion_only_accuracy_is_known() -> None:
    assert validation_metrics([sample(True, None, 1.0)]) == {
        "validation/accuracy": 1.0,
        "validation/unjudged": 1.0,
    }
