"""In bfloat16 on a GPU packed rows stand no further from an fp32 computation of the same weights than dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from grouped_rows import GroupPlan, make_groups
from tiny_models import build_tiny_model

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.backbones.packed import use_packed_rows
from mrpo.batching import Row, collate, pack
from mrpo.config import Config, LossConfig
from mrpo.kernels.prefix_attention import AttentionName
from mrpo.policy_module import PolicyModule

PLANS = [GroupPlan(images=((96, 96),), words=5 + i, completions=8) for i in range(8)]
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a Qwen3-VL with 8 layers of width 1024."""
    folder = build_tiny_model(
        "qwen3_vl",
        tmp_path_factory.mktemp("medium"),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        rope_parameters=ROPE,
    )
    return Config.model_validate({"model": {"path": str(folder)}})


def error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Mean distance of log-probabilities, in nats."""
    return (torch.cat(list(found)) - torch.cat(list(exact))).abs().mean().item()


def logprobs(
    model: Any, processor: Processor, groups: Sequence[Sequence[Row]], attention: AttentionName | None, *, packed: bool
) -> list[torch.Tensor]:
    """Of every group in its order."""
    module = PolicyModule(model, processor.family, LossConfig(), 1.0, attention)
    found = []
    for rows in groups:
        if packed:
            batch: Any = pack(rows, processor, model.model, model.device, model.dtype, multiple=128)
        else:
            batch = collate(rows, processor, model.device, model.dtype)
        with torch.no_grad():
            found.append(module(batch, only_logprobs=True)[0].float())
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flex", "flash"])
def test_packed_rows_are_as_exact_as_dense_ones(config: Config, attention: AttentionName) -> None:
    processor = load_processor(config)
    wide, narrow = (
        load_model(config.model.model_copy(update={"dtype": dtype})).cuda() for dtype in ("float32", "bfloat16")
    )
    wide.load_state_dict(narrow.state_dict())  # the same weights, rounded alike
    for model in (wide, narrow):
        use_packed_rows(model, processor.family)
    groups = make_groups(processor, PLANS, longest=256)
    exact = logprobs(wide, processor, groups, "sdpa", packed=False)
    dense = error(logprobs(narrow, processor, groups, attention, packed=False), exact)
    packed = error(logprobs(narrow, processor, groups, attention, packed=True), exact)
    assert packed <= 1.05 * dense


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_packed_rows_equal_dense_ones_in_fp32(config: Config, attention: AttentionName) -> None:
    processor = load_processor(config)
    model = load_model(config.model).cuda()
    use_packed_rows(model, processor.family)
    groups = make_groups(processor, PLANS[:2], longest=64)
    dense = logprobs(model, processor, groups, attention, packed=False)
    packed = logprobs(model, processor, groups, attention, packed=True)
    torch.testing.assert_close(torch.cat(packed), torch.cat(dense), rtol=1e-4, atol=1e-4)
