"""A run whose judge is an endpoint: it learns as verdicts come, stops when they fail, and goes on where it stopped."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from judge_server import Answer, completion, running_server, verdict
from launching import TRAIN, launch, read_metrics, train

from mrpo.evaluated import read_evaluated
from mrpo.evaluation import num_unjudged

ARGUMENTS = (
    "optim.batch_size=16",
    "rollout.group_size=4",
    "rollout.max_tokens=32",
    "eval.at_start=false",
    "eval.at_end=false",
    "log.plots=false",
    "judge.kind=openai",
    "judge.model=m",
)


def test_an_update_in_the_order_of_verdicts_is_the_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    questions: dict[str, int] = {}
    lock = threading.Lock()

    def late(record: dict[str, Any], attempt: int) -> Answer:
        """The prompts of a step are judged a second apart, so that they do not come together."""
        with lock:
            place = questions.setdefault(record["question"], len(questions))
        if streamed:
            time.sleep(place % 4)
        steps = [
            {
                "index": i,
                "reason": "drawn",
                "gold_alignment": bool(crc32(s["text"].encode()) % 2),
                "answer_contribution": False,
            }
            for i, s in enumerate(record["steps"], start=1)
        ]
        return completion(json.dumps({"steps": steps}))

    found = {}
    for streamed in (True, False):
        questions.clear()
        with running_server() as server:
            server.otherwise = late
            train(
                f"output_dir={tmp_path / str(streamed)}", "optim.steps=2", f"judge.base_url={server.url}",
                f"update.streamed={streamed}", "update.packing=shared_prefix", *ARGUMENTS,
            )  # fmt: skip
        found[streamed] = read_metrics(tmp_path / str(streamed))
    for one, other in zip(found[True], found[False], strict=True):
        assert one["update/passes"] > other["update/passes"] == 1
        for name in ("reward", "loss", "grad_norm", "entropy", "unjudged"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def failing_from(event: Callable[[], bool], mended: threading.Event) -> Callable[[dict[str, Any], int], Answer]:
    """An endpoint that is out of order from `event` on until it is mended."""

    def otherwise(record: dict[str, Any], attempt: int) -> Answer:
        if mended.is_set() or not event():
            return verdict(record)
        return 503, {}, '{"error": {"message": "out of order"}}'

    return otherwise


def test_a_run_stops_when_its_judge_fails_and_goes_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost: not the steps that no checkpoint was due for, nor completions that only earlier weights make."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mended, run, unbroken = threading.Event(), tmp_path / "run", tmp_path / "unbroken"
    with running_server() as server:
        server.otherwise = failing_from(lambda: len(read_metrics(run)) >= 1, mended)
        arguments = [
            *ARGUMENTS, "optim.steps=3", "rollout.ahead=1", "checkpoint.every=0", "update.streamed=false",
            f"judge.base_url={server.url}", "judge.retries=0", "judge.breaker_patience=0",
        ]  # fmt: skip
        stopped = launch(TRAIN, [f"output_dir={run}", *arguments])
        assert stopped.returncode != 0
        assert "100% of a step's completions unjudged, above judge.max_unjudged=50%" in stopped.stderr
        assert "out of order" in stopped.stderr
        assert [record["step"] for record in read_metrics(run)] == [1, 2]
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
        mended.set()
        train(f"output_dir={run}", *arguments, "--resume")
        train(f"output_dir={unbroken}", *arguments)
    found, expected = read_metrics(run), read_metrics(unbroken)
    assert [record["step"] for record in found] == [1, 2, 3]
    for name in ("reward", "loss", "grad_norm", "entropy", "completion/tokens"):
        assert [record[name] for record in found] == [record[name] for record in expected], name


def test_an_evaluation_without_its_judge_ends_the_run_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mended, run = threading.Event(), tmp_path / "run"
    with running_server() as server:
        server.otherwise = failing_from((run / "policy").exists, mended)
        arguments = [
            f"output_dir={run}", *ARGUMENTS, "eval.at_end=true", "data.eval_size=6", "optim.steps=1",
            f"judge.base_url={server.url}", "judge.retries=0", "judge.breaker_patience=0",
        ]  # fmt: skip
        stopped = launch(TRAIN, arguments)
        assert stopped.returncode != 0
        assert "100% of an evaluation's completions unjudged, above judge.max_unjudged=50%" in stopped.stderr
        assert not (run / "evaluation-after.json").exists()
        mended.set()
        train(*arguments, "--resume")
    assert num_unjudged(read_evaluated(run / "evaluation-after.json")) == 0
