"""A run whose judge is an endpoint: it stops when too much goes unjudged, and goes on where it stopped."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, running_server, verdict
from launching import TRAIN, launch, read_metrics, train


def test_a_run_stops_when_its_judge_fails_and_goes_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mended = threading.Event()
    run = tmp_path / "run"

    def otherwise(record: dict[str, Any], attempt: int) -> Answer:
        if mended.is_set() or not (run / "checkpoints" / "step-000001").exists():
            return verdict(record)
        return 503, {}, '{"error": {"message": "out of order"}}'

    with running_server() as server:
        server.otherwise = otherwise
        arguments = [
            f"output_dir={run}",
            "optim.steps=3",
            "optim.batch_size=16",
            "rollout.group_size=4",
            "rollout.max_tokens=32",
            "checkpoint.every=1",
            "eval.at_start=false",
            "eval.at_end=false",
            "log.plots=false",
            "judge.kind=openai",
            f"judge.base_url={server.url}",
            "judge.model=m",
            "judge.retries=0",
            "judge.breaker_patience=0",
        ]
        stopped = launch(TRAIN, arguments)
        assert stopped.returncode != 0
        assert "100% of a step's completions unjudged, above judge.max_unjudged=50%" in stopped.stderr
        assert "out of order" in stopped.stderr
        assert [record["step"] for record in read_metrics(run)] == [1]
        mended.set()
        train(*arguments, "--resume")
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
