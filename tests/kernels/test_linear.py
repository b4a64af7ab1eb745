"""The fused linear operators against full logits and autograd in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from mrpo.kernels.dispatch import use
from mrpo.kernels.linear import plan_chunks
from mrpo.kernels.linear_logprobs import linear_logprobs
from mrpo.kernels.linear_policy_loss import fused_linear_policy_loss
from mrpo.kernels.policy_loss import PolicyLoss, policy_loss
from mrpo.kernels.records import SegmentedAdvantages

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Operands of one head and loss, fp64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Case:
        tokens = {k: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for k, v in self.tokens.items()}
        return Case(self.hidden.to(dtype), self.weight.to(dtype), _to(self.bias, dtype), tokens)


def _to(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def make_case(rows: int, size: int, vocab: int, *, seed: int = 0, bias: bool = False, idle: float = 0.0) -> Case:
    """Ratios on both sides of the clip; a share `idle` of the rows has weight 0 and as many have advantage 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(rows, size), normal(vocab, size) / size**0.5
    offset = normal(vocab) if bias else None
    targets = torch.randint(vocab, (rows,), generator=generator)
    logits = hidden @ weight.t() + (0 if offset is None else offset)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    draw = torch.rand(rows, generator=generator)
    tokens = {
        "targets": targets,
        "advantages": normal(rows).masked_fill((draw > idle) & (draw < 2 * idle), 0.0),
        "weights": (torch.rand(rows, generator=generator, dtype=torch.float64) / rows).masked_fill(draw < idle, 0.0),
        "old_logprobs": logprobs + 0.3 * normal(rows),
        "ref_logprobs": logprobs + 0.3 * normal(rows),
        "sampler_logprobs": logprobs + 0.5 * normal(rows),
    }
    return Case(hidden, weight, offset, tokens)


OPTIONS = {"epsilon_low": 0.1, "epsilon_high": 0.3, "temperature": 0.8, "importance_cap": 1.5, "with_entropy": True}


def run(case: Case, *, frozen: bool = False, **options: Any) -> tuple[PolicyLoss, list[torch.Tensor]]:
    parts = [part.clone().requires_grad_() for part in (case.hidden, case.weight, case.bias) if part is not None]
    if frozen:
        parts[1].requires_grad_(False)
    bias = parts[2] if len(parts) == 3 else None
    result = fused_linear_policy_loss(parts[0], parts[1], bias=bias, **case.tokens, **{**OPTIONS, **options})
    result.loss.backward()
    return result, [part.grad for part in parts if part.grad is not None]


def truth(case: Case, **options: Any) -> tuple[PolicyLoss, list[torch.Tensor]]:
    """Full logits in fp64 through the plain PyTorch definition."""
    parts = [part.clone().requires_grad_() for part in (case.hidden, case.weight, case.bias) if part is not None]
    logits = parts[0] @ parts[1].t()
    if len(parts) == 3:
        logits = logits + parts[2]
    with use("reference"):
        result = policy_loss(logits, **case.tokens, **{**OPTIONS, **options})
    result.loss.backward()
    return result, [part.grad for part in parts if part.grad is not None]


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative norm; where nothing is expected (every token clipped), nothing may be there."""
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "size", "vocab", "chunk"), [(1, 3, 2, 5), (37, 16, 257, 8), (23, 8, 1021, 23)])
def test_fp32_is_within_1e5_of_fp64(rows: int, size: int, vocab: int, chunk: int, bias: bool, beta: float) -> None:
    case = make_case(rows, size, vocab, bias=bias)
    result, gradients = run(case.to(torch.float32), chunk_rows=chunk, beta=beta)
    expected, true_gradients = truth(case, beta=beta)
    for name in ("loss", "logprobs", "kl", "entropy"):
        assert error(getattr(result, name), getattr(expected, name)) < 1e-5, name
    assert torch.equal(result.clipped, expected.clipped)
    assert len(gradients) == len(true_gradients)
    for gradient, true in zip(gradients, true_gradients, strict=True):
        assert error(gradient, true) < 1e-5


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        # 4096 rows of logits and a sum in fp32 take as much as 4096 + 2 x 4096 rows
        (12_288, {}, (12_288, torch.bfloat16)),
        (12_289, {}, (4096, torch.float32)),
        (12_288, {"trained": False}, (4096, torch.float32)),
        (12_288, {"sum_dtype": torch.float32}, (4096, torch.float32)),
        (12_288, {"dtype": torch.float32}, (4096, torch.float32)),
        (4096, {"trained": False}, (4096, torch.bfloat16)),
        (4096, {"chunk_rows": 2048}, (2048, torch.float32)),
        (2048, {"chunk_rows": 2048}, (2048, torch.bfloat16)),
        (0, {}, (1, torch.bfloat16)),
    ],
)
def test_one_chunk_is_taken_where_it_needs_no_more_memory(
    rows: int, options: dict[str, Any], expected: tuple[int, torch.dtype]
) -> None:
    assert plan_chunks(rows, 4096, **{"dtype": torch.bfloat16, "trained": True, **options}) == expected


def test_one_chunk_in_bfloat16_is_as_exact_as_a_sum_in_fp32() -> None:
    case = make_case(64, 32, 301)
    _, true_gradients = truth(case.to(torch.bfloat16).to(torch.float64))
    runs = {"one": {}, "sum": {"chunk_rows": 16}, "wide": {"weight_grad_dtype": torch.float32}}
    errors = {
        name: [error(g, t) for g, t in zip(run(case.to(torch.bfloat16), **options)[1], true_gradients, strict=True)]
        for name, options in runs.items()
    }
    for of_one_gradient in zip(*errors.values(), strict=True):
        assert 1e-4 < max(of_one_gradient) < 1.05 * min(of_one_gradient)


@pytest.mark.parametrize("vocab", [151_936, 152_064, 151_674])
def test_real_vocabularies(vocab: int) -> None:
    case = make_case(5, 4, vocab)
    result, gradients = run(case.to(torch.float32), chunk_rows=3)
    expected, true_gradients = truth(case)
    assert error(result.loss, expected.loss) < 1e-5
    for gradient, true in zip(gradients, true_gradients, strict=True):
        assert error(gradient, true) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_idle_rows_are_dropped_and_change_nothing(beta: float) -> None:
    case = make_case(40, 8, 101, idle=0.3)
    idle = case.tokens["weights"] == 0
    assert idle.any()
    poisoned = replace(case, hidden=case.hidden.masked_fill(idle[:, None], torch.nan))
    result, gradients = run(poisoned.to(torch.float32), beta=beta)
    expected, true_gradients = truth(case, beta=beta)
    assert error(result.loss, expected.loss) < 1e-5
    for gradient, true in zip(gradients, true_gradients, strict=True):
        assert error(gradient, true) < 1e-5
    assert not gradients[0][idle].any()
    dropped = idle if beta else idle | (case.tokens["advantages"] == 0)
    assert not result.logprobs[dropped].any()
    assert result.logprobs[~dropped].all()


@pytest.mark.parametrize("rows", [0, 6])
def test_a_batch_without_contributing_rows_gives_zero(rows: int) -> None:
    case = make_case(6, 4, 11)
    tokens = {name: value[:rows] for name, value in case.tokens.items()}
    tokens["weights"] = torch.zeros(rows, dtype=torch.float64)
    result, gradients = run(Case(case.hidden[:rows], case.weight, None, tokens).to(torch.float32))
    assert result.loss.item() == 0.0
    assert [gradient.shape for gradient in gradients] == [(rows, 4), (11, 4)]
    assert not any(gradient.any() for gradient in gradients)


def test_a_frozen_head_gets_no_gradient_and_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the weight's gradient was computed")

    monkeypatch.setattr("mrpo.kernels.linear.WeightGradient.add", refuse)
    case = make_case(9, 4, 31)
    _, gradients = run(case.to(torch.float32), frozen=True)
    assert len(gradients) == 1
    assert error(gradients[0], truth(case)[1][0]) < 1e-5


def test_without_gradients_only_values_are_computed() -> None:
    case = make_case(9, 4, 31)
    with torch.no_grad():
        parts = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        result = fused_linear_policy_loss(*parts, **case.tokens, **OPTIONS)
    assert not result.loss.requires_grad
    assert error(result.loss, truth(case)[0].loss.detach()) < 1e-12


def test_upstream_gradients_are_honoured() -> None:
    case = make_case(9, 4, 31)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    result = fused_linear_policy_loss(hidden, weight, **case.tokens, **OPTIONS)
    (result.loss * -3.5 + hidden.sum()).backward()
    _, (true_hidden, true_weight) = truth(case)
    torch.testing.assert_close(hidden.grad, -3.5 * true_hidden + 1)
    torch.testing.assert_close(weight.grad, -3.5 * true_weight)


def test_gradcheck() -> None:
    case = make_case(5, 3, 7, seed=3, bias=True)
    # The loss is compared without ratios, whose kinks finite differences would step over.
    tokens = {**case.tokens, "old_logprobs": None, "sampler_logprobs": None, "advantages": torch.zeros(5).double()}

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_linear_policy_loss(hidden, weight, bias=bias, **tokens, beta=0.5, chunk_rows=2).loss

    assert case.bias is not None
    parts = [part.clone().requires_grad_() for part in (case.hidden, case.weight, case.bias)]
    assert torch.autograd.gradcheck(loss, parts)


def test_tied_embeddings_sum_both_gradients() -> None:
    case = make_case(6, 4, 19)
    inputs = torch.tensor([3, 1, 4, 1, 5, 9])
    for_tied: list[torch.Tensor] = []
    for fused in (True, False):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(inputs, weight).tanh()
        if fused:
            loss = fused_linear_policy_loss(hidden, weight, **case.tokens, **OPTIONS).loss
        else:
            with use("reference"):
                loss = policy_loss(hidden @ weight.t(), **case.tokens, **OPTIONS).loss
        loss.backward()
        assert weight.grad is not None
        for_tied.append(weight.grad)
    torch.testing.assert_close(*for_tied)


def test_segments_equal_one_advantage_per_token() -> None:
    case = make_case(10, 4, 31)
    values = torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64)
    segments = SegmentedAdvantages(torch.tensor([3, 4, 8, 10]), values)
    tokens = {**case.tokens, "advantages": values[torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])]}
    _, expected = truth(replace(case, tokens=tokens))
    _, found = run(replace(case, tokens={**case.tokens, "advantages": segments}), chunk_rows=3)
    for gradient, true in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, true)


def test_autocast_takes_fp32_operands_to_half_precision_products() -> None:
    case = make_case(32, 16, 101).to(torch.float32)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = fused_linear_policy_loss(hidden, weight, **case.tokens, **OPTIONS)
    result.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    _, (true_hidden, true_weight) = truth(make_case(32, 16, 101))
    assert 1e-5 < error(hidden.grad, true_hidden) < 0.05
    assert error(weight.grad, true_weight) < 0.05


def test_same_bits_on_repeat() -> None:
    case = make_case(33, 16, 257).to(torch.float32)
    first, second = (run(case, chunk_rows=8) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weight": torch.zeros(7, 5)}, "weight"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \(V, H\)"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"weight": torch.zeros(7, 4, dtype=torch.float64)}, "one dtype"),
        ({"targets": torch.tensor([0, 7, 1])}, "targets"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"logit_softcap": 30.0}, "logit_softcap"),
        ({"beta": 0.1}, "ref_logprobs"),
        ({"epsilon_low": 1.5}, "epsilon_low"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], name: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.long),
        "advantages": torch.ones(3),
        "weights": torch.ones(3),
    }
    with pytest.raises((TypeError, ValueError), match=name):
        fused_linear_policy_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weight": torch.zeros(7)}, "weight"),
        ({"targets": torch.zeros(3)}, "targets"),
        ({"targets": torch.tensor([0, 7, 1])}, "targets"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
)
def test_bad_arguments_of_logprobs_are_named(change: dict[str, Any], name: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises((TypeError, ValueError), match=name):
        linear_logprobs(**{**arguments, **change})


@pytest.mark.parametrize("bias", [False, True])
def test_logprobs_and_their_gradients(bias: bool) -> None:
    case = make_case(21, 8, 257, bias=bias)
    upstream = torch.randn(21, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def parts(dtype: torch.dtype) -> list[torch.Tensor]:
        found = (case.hidden, case.weight, case.bias)
        return [part.to(dtype).clone().requires_grad_() for part in found if part is not None]

    exact = parts(torch.float64)
    logits = (exact[0] @ exact[1].t() + (exact[2] if bias else 0)) / 0.7
    log_softmax = logits.log_softmax(-1)
    expected = log_softmax.gather(1, case.tokens["targets"][:, None])[:, 0]
    (expected * upstream).sum().backward()

    found = parts(torch.float32)
    logprobs, entropy = linear_logprobs(
        found[0],
        found[1],
        case.tokens["targets"],
        bias=found[2] if bias else None,
        temperature=0.7,
        with_entropy=True,
        chunk_rows=8,
    )
    (logprobs * upstream.float()).sum().backward()
    assert error(logprobs.detach(), expected.detach()) < 1e-5
    assert entropy is not None
    assert not entropy.requires_grad
    assert error(entropy, -(log_softmax.exp() * log_softmax).sum(-1).detach()) < 1e-5
    for part, true in zip(found, exact, strict=True):
        assert part.grad is not None
        assert true.grad is not None
        assert error(part.grad, true.grad) < 1e-5


def test_logprobs_gradcheck() -> None:
    case = make_case(5, 3, 7)
    parts = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, case.tokens["targets"], chunk_rows=2)[0], parts)


def test_a_sequence_level_ratio_through_logprobs() -> None:
    """GSPO's geometric mean ratio, which the fused loss cannot express, has the gradient of full logits."""
    case = make_case(8, 4, 31)
    gradients = []
    for fused in (True, False):
        hidden = case.hidden.clone().requires_grad_()
        if fused:
            logprobs, _ = linear_logprobs(hidden, case.weight, case.tokens["targets"])
        else:
            log_softmax = (hidden @ case.weight.t()).log_softmax(-1)
            logprobs = log_softmax.gather(1, case.tokens["targets"][:, None])[:, 0]
        ratio = (logprobs - case.tokens["old_logprobs"]).view(2, 4).mean(1).exp()
        (ratio * torch.tensor([1.0, -2.0])).sum().backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)
