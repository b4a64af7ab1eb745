"""Requests to a judge and the settings that reach the test server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from judge_server import JudgeServer
from PIL import Image

from mrpo.config import JudgeConfig
from mrpo.judge.openai_client import OpenAIJudge
from mrpo.records import Example, JudgeRequest

KEY = "sk-secret-7"

Make = Callable[..., OpenAIJudge]


def judge_config(server: JudgeServer, **changes: Any) -> JudgeConfig:
    return JudgeConfig.model_validate(
        {"kind": "openai", "base_url": server.url, "api_key_env": "JUDGE_KEY", "model": "judge-1", "retries": 2}
        | changes
    )


def judge_request(
    question: str = "Where?", steps: tuple[str, ...] = ("CT.", "A mass."), **changes: Any
) -> JudgeRequest:
    fields: dict[str, Any] = {"images": (Image.new("RGB", (8, 6), "red"),), "rationale": "A CT. A mass."} | changes
    example = Example("1", fields["images"], question, "mass", fields["rationale"], "test")
    return JudgeRequest(example, steps, "mass")
