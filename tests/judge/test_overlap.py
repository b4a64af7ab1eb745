"""The judge works while the trainer does: completions are handed over one by one, and waited for at the end alone."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, JudgeServer, verdict
from judging import judge_config
from transformers import AutoTokenizer

import mrpo
from mrpo.config import Config
from mrpo.judge import make_judge
from mrpo.records import Completion, Example, JudgeRequest, ScoredCompletion, Unjudged, Verdict
from mrpo.scoring import Scorer

TOKENIZER = AutoTokenizer.from_pretrained(Path(mrpo.__file__).parent / "assets" / "phantom")
SAMPLES = 64
HOLD = 0.5  # seconds


def example(number: int, rationale: str | None = "A mass.") -> Example:
    return Example(f"{number}", (), f"q{number}", "mass", rationale, "train")


def completion(*steps: str) -> Completion:
    text = f"<thinking>{' '.join(steps)}</thinking><answer>mass</answer>"
    return Completion(tuple(TOKENIZER(text)["input_ids"]), text, "stop")


def scorer_for(server: JudgeServer, **judge: Any) -> Scorer:
    config = Config.model_validate({"judge": judge_config(server, **judge).model_dump()})
    return Scorer(config, make_judge(config.judge, "vqa_rad"), TOKENIZER, "thinking")


def test_each_completion_is_asked_about_before_the_next_is_generated(server: JudgeServer) -> None:
    asked, let_go = threading.Semaphore(0), threading.Event()

    def script(record: dict[str, Any], attempt: int) -> Answer:
        asked.release()
        assert let_go.wait(60)
        return verdict(record)

    server.otherwise = script
    with closing(scorer_for(server, concurrency=SAMPLES)) as scorer:
        pending = []
        for number in range(SAMPLES):
            pending.append(scorer.submit(example(number), completion(f"Step {number} is it.", "A mass is there.")))
            assert asked.acquire(timeout=60)  # the judge has this one; no verdict is there yet
        assert not any(item.verdict.done() for item in pending)
        threading.Timer(HOLD, let_go.set).start()  # the trainer computes log-probabilities meanwhile
        assert let_go.wait(60)
        scored = scorer.collect(pending)
        metrics = scorer.judge_stats()
    assert [item.steps[0].text for item in scored] == [f"Step {number} is it." for number in range(SAMPLES)]
    assert [item.rewards.process for item in scored] == [0.5] * SAMPLES
    assert metrics["judge/serial_s"] > SAMPLES * HOLD
    assert HOLD < metrics["judge/busy_s"] < metrics["judge/serial_s"]
    assert metrics["judge/wait_s"] < metrics["judge/busy_s"] - HOLD / 2  # HOLD of it was hidden
    assert metrics["judge/overlapped"] >= 0.9
    assert metrics["judge/hidden"] == pytest.approx(1 - metrics["judge/wait_s"] / metrics["judge/busy_s"])


def test_a_trainer_that_does_nothing_else_hides_nothing(server: JudgeServer) -> None:
    server.otherwise = lambda record, attempt: (server.closing.wait(HOLD), verdict(record))[1]
    with closing(scorer_for(server)) as scorer:
        pending = [scorer.submit(example(number), completion("It is a mass.")) for number in range(4)]
        scorer.collect(pending)
        metrics = scorer.judge_stats()
        assert metrics["judge/wait_s"] > 0.9 * HOLD
        assert metrics["judge/hidden"] < 0.5
        assert scorer.judge_stats()["judge/wait_s"] == 0.0


def test_completions_may_be_submitted_from_many_threads(server: JudgeServer) -> None:
    def submit(number: int) -> Any:
        return scorer.submit(example(number), completion(f"Number {number} is it."))

    with closing(scorer_for(server)) as scorer, ThreadPoolExecutor(8) as threads:
        scored = scorer.collect(list(threads.map(submit, range(100))))
    assert [item.steps[0].text for item in scored] == [f"Number {number} is it." for number in range(100)]
    assert all(isinstance(item.verdict, Verdict) for item in scored)
    assert server.asked == {f"q{number}": 1 for number in range(100)}


class OneFails:
    """Says nothing about q1, and that all steps of others are valid."""

    name = "one fails"

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        future: Future[Verdict | Unjudged] = Future()
        future.set_result(Unjudged("no") if request.example.question == "q1" else Verdict(()))
        return future

    def stats(self) -> dict[str, float]:
        return {}


def test_an_unjudged_completion_has_no_process_reward_and_the_share_without_gold_is_told() -> None:
    scorer = Scorer(Config(), OneFails(), TOKENIZER, "thinking")  # type: ignore[arg-type]
    rationales = ["A mass.", "A mass.", None, " "]
    pending = [scorer.submit(example(n, rationale), completion()) for n, rationale in enumerate(rationales)]
    pending[1] = scorer.submit(example(1), completion("A mass is there."))
    scored: list[ScoredCompletion] = scorer.collect(pending)
    assert [item.rewards.process for item in scored] == [0.0, None, 0.0, 0.0]  # 0: without steps
    stats = scorer.judge_stats()
    assert stats.pop("judge/wait_s") < 5
    assert stats == {"judge/without_gold": 0.5}
    assert "judge/without_gold" not in scorer.judge_stats()
