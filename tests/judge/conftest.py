"""A judge's server on this machine, and judges that ask it without waiting between tries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from judge_server import JudgeServer, running_server
from judging import KEY, Make, judge_config

from mrpo.judge.endpoint import Endpoint
from mrpo.judge.openai_client import OpenAIJudge


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with running_server() as judge_server:
        yield judge_server


@pytest.fixture
def waits() -> list[float]:
    """The pauses between tries: recorded, not waited for."""
    return []


@pytest.fixture
def make(server: JudgeServer, waits: list[float]) -> Iterator[Make]:
    """Makes judges at the server with the given settings, and closes them."""

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with ExitStack() as made:

        def make_one(**changes: Any) -> OpenAIJudge:
            return made.enter_context(closing(OpenAIJudge(Endpoint(judge_config(server, **changes), sleep=sleep))))

        yield make_one
