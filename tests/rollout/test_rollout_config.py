"""What an engine needs is asked for before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mrpo.config import RolloutConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "vllm_server"}, r"engine=vllm_server needs servers, and servers=\[\]"),
        ({"servers": ["http://a"]}, r"engine=hf takes no servers, and servers=\['http://a'\]"),
        ({"tensor_parallel": 2}, "tensor_parallel=2 needs engine=vllm, not hf"),
        ({"engine": "vllm", "temperature": 2.5}, "temperatures up to 2, not temperature=2.5"),
        ({"sleep_level": 3}, "sleep_level"),
        ({"gpu_memory": 0.0}, "gpu_memory"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutConfig.model_validate(settings)


def test_each_engine_can_be_asked_for() -> None:
    assert RolloutConfig().engine == "hf"
    assert RolloutConfig(engine="vllm", tensor_parallel=4).tensor_parallel == 4
    assert RolloutConfig(engine="vllm_server", servers=["http://a:1", "http://b:1"]).servers[1] == "http://b:1"
