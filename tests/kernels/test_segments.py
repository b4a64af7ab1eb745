"""Advantages of segments: the same loss as with one per token, and the same shaping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import device_of, every_implementation, random_case, run

from mrpo.kernels import SegmentedAdvantages, policy_loss, segment_advantages, step_advantages
from mrpo.kernels.dispatch import use


def segments(*ends: int) -> SegmentedAdvantages:
    return SegmentedAdvantages(torch.tensor(ends, dtype=torch.int64), torch.arange(1.0, 1.0 + len(ends)))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((), "advantages must have segments"),
        ((2, 1, 4), "ends of advantages must ascend"),
        ((2, 3), "advantages must end at token 4, not 3"),
        ((2, 5), "advantages must end at token 4, not 5"),
    ],
)
def test_segments_that_do_not_cover_the_tokens_are_refused(ends: tuple[int, ...], message: str) -> None:
    case = replace(random_case(4, 6), advantages=segments(*ends))
    with pytest.raises(ValueError, match=message):
        policy_loss(**vars(case))


@every_implementation
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_segments_are_the_same_as_an_advantage_per_token(implementation: str, lengths: list[int], seed: int) -> None:
    values = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed))
    values[values.abs() < 0.2] = 0.0
    repeats = torch.tensor(lengths)
    case = replace(random_case(sum(lengths), 7, seed=seed), advantages=values.repeat_interleave(repeats))
    expected, expected_gradient = run(case, implementation, torch.float32, beta=0.1)
    segmented = replace(case, advantages=SegmentedAdvantages(repeats.cumsum(0), values))
    result, gradient = run(segmented, implementation, torch.float32, beta=0.1)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.clipped, expected.clipped)


def test_rows_are_taken_out_as_from_a_tensor() -> None:
    advantages = segments(2, 2, 5, 6)
    plain = torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0, 4.0])
    assert torch.equal(advantages.per_token(6), plain)
    positions = torch.tensor([5, 0, 2])
    assert torch.equal(advantages[positions].per_token(3), plain[positions])
    assert torch.equal(advantages[1:5].per_token(4), plain[1:5])
    assert torch.equal(advantages[1:6][positions[1:]].per_token(2), plain[1:6][positions[1:]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ends": torch.tensor([1, 2], dtype=torch.int32), "values": torch.ones(2)}, "ends"),
        ({"ends": torch.tensor([1]), "values": torch.ones(2)}, "ends"),
        ({"ends": torch.tensor([1]), "values": torch.tensor([1])}, "values"),
        ({"ends": torch.tensor([1]), "values": torch.ones(1, requires_grad=True)}, "values"),
        ({"ends": torch.tensor([1]), "values": torch.ones(1), "tokens": torch.zeros(2)}, "tokens"),
    ],
)
def test_bad_segments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SegmentedAdvantages(**arguments)


@st.composite
def judged(draw: st.DrawFn) -> dict[str, Any]:
    """Completions whose steps follow each other, with tags before, between and after them."""
    spans, step_ids, end = [], [], 0
    batch = draw(st.integers(1, 3))
    for completion in range(batch):
        steps = draw(st.integers(0, 4))
        row: list[int] = []
        for step in [-1, *range(steps), -1]:
            length = draw(st.integers(0, 3))
            end += length
            spans.append((completion, step, end))
            row += [step] * length
        step_ids.append(row)

    def booleans(size: int) -> list[bool]:
        return draw(st.lists(st.booleans(), min_size=size, max_size=size))

    return {
        "advantages": torch.tensor([draw(st.floats(-5, 5, width=32)) for _ in range(batch)]),
        "answer_correct": torch.tensor(booleans(batch)),
        "step_valid": torch.tensor([booleans(4) for _ in range(batch)]),
        "num_steps": torch.tensor([draw(st.integers(0, 4)) for _ in range(batch)]),
        "spans": torch.tensor(spans),
        "step_ids": step_ids,
        "options": {
            "penalty": draw(st.sampled_from(["exponential", "linear", "none"])),
            "round_weights": draw(st.booleans()),
        },
    }


@every_implementation
@settings(max_examples=30, deadline=None)
@given(batch=judged())
def test_shaped_segments_are_the_shaped_tokens(implementation: str, batch: dict[str, Any]) -> None:
    device = device_of(implementation)
    step_ids, options = batch.pop("step_ids"), batch.pop("options")
    longest = max(map(len, step_ids))
    padded = torch.tensor([row + [-1] * (longest - len(row)) for row in step_ids], dtype=torch.int64)
    placed = {name: tensor.to(device) for name, tensor in batch.items()}
    spans = placed.pop("spans")
    with use("reference"):
        tokens = step_advantages(**{**placed, "step_ids": padded.to(device)}, **options)
    flat = torch.cat([row[: len(ids)] for row, ids in zip(tokens, step_ids, strict=True)])
    with use(implementation):
        advantages = segment_advantages(**placed, spans=spans, **options)
    torch.testing.assert_close(advantages.per_token(len(flat)), flat)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), "spans must have shape"),
        (torch.zeros(2, 3), "spans must have dtype"),
        (torch.tensor([[1, 0, 2]]), "spans name a completion"),
        (torch.tensor([[0, -2, 2]]), "spans must name a step"),
        (torch.tensor([[0, 0, 2], [0, 1, 1]]), "ends of spans must ascend"),
    ],
)
def test_bad_spans_are_named(spans: torch.Tensor, message: str) -> None:
    one = torch.ones(1)
    with pytest.raises((TypeError, ValueError), match=message):
        segment_advantages(one, one < 0, torch.ones(1, 2, dtype=torch.bool), torch.tensor([2]), spans)
