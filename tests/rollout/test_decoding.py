"""Decoding with a cache against a forward pass over each prompt and completion by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_logprobs import policy_logits
from grouped_rows import MIXED, GroupPlan, make_groups
from tiny_models import TINY_FAMILIES

from mrpo.backbones import load_model, load_processor, to_device
from mrpo.config import Config
from mrpo.rollout.decoding import ExactSampler, decode
from mrpo.rollout.hf import HFEngine

COPIES, LONGEST = 4, 12
TEXT = (GroupPlan(images=(), words=2, completions=4), GroupPlan(images=(), words=8, completions=4))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("plans", [MIXED, TEXT], ids=["images", "text"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_every_logit_is_that_of_a_row_of_its_own(
    family: str, plans: tuple[GroupPlan, ...], device: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Prompts of several lengths with several images, one, or none; completions that end one after the other."""
    config = Config.model_validate({"model": {"path": str(tiny_folder(family))}})
    processor, model = load_processor(config), load_model(config.model).eval()
    rows = [row for group in make_groups(processor, plans) for row in (group * COPIES)[:COPIES]]
    prompts = [row.prompt for row in rows[::COPIES]]
    end = processor.tokenizer.eos_token_id
    wanted = [(*row.token_ids, end)[:LONGEST] for row in rows]
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1
    assert len({len(token_ids) for token_ids in wanted}) > 3
    seen: list[list[torch.Tensor]] = [[] for _ in rows]
    batches: list[int] = []
    ended: list[int] = []

    def choose(logits: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        batches.append(len(numbers))
        chosen = []
        for values, number in zip(logits, numbers, strict=True):
            place = len(seen[number])
            chosen.append(wanted[number][place] if place < len(wanted[number]) else end)
            seen[number].append(values.cpu())
        return torch.tensor(chosen, device=device)

    def on_end(number: int, token_ids: Any) -> None:
        assert tuple(token_ids) == wanted[number]
        ended.append(number)

    inputs = HFEngine(model, processor, batch_size=64, weights=nullcontext)._inputs(prompts)
    decode(
        copy.deepcopy(model).to(device),
        to_device(inputs, torch.device(device), torch.float32),
        choose,
        copies=COPIES,
        max_tokens=LONGEST,
        end_ids={end},
        never_ids=processor.placeholder_ids,
        on_end=on_end,
    )
    assert ended == sorted(range(len(rows)), key=lambda number: (len(wanted[number]), number))
    assert batches[0] == len(rows)
    assert batches[-1] < len(rows)  # finished ones were taken out
    for row, token_ids, found in zip(rows, wanted, seen, strict=True):
        expected = policy_logits(model, processor, row.prompt, token_ids)
        torch.testing.assert_close(torch.stack(found[: len(token_ids)]), expected, rtol=1e-4, atol=1e-4)


def test_a_draw_does_not_depend_on_who_else_is_still_running() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    everyone = ExactSampler(0.7, (3, 4, 5), 2, torch.device("cpu"))
    fewer = ExactSampler(0.7, (3, 4, 5), 2, torch.device("cpu"))
    some = [0, 4, 5]
    for _ in range(20):
        together = everyone(logits, range(6))
        assert fewer(logits[some], some).tolist() == together[some].tolist()
