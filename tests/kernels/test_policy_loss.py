"""The policy loss and its gradient are the formula: in fp64, by hand, by finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import Case, device_of, every_implementation, random_case, relative_error, run

from mrpo.kernels import policy_loss
from mrpo.kernels.dispatch import use

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy


@every_implementation
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.04, "temperature": 0.7, "epsilon_low": 0.1, "epsilon_high": 0.3, "with_entropy": True},
        {"beta": 1.0, "temperature": 1.5, "importance_cap": 1.2, "with_entropy": True},
    ],
)
@pytest.mark.parametrize(("rows", "vocab"), [(3, 1), (40, 2), (40, 7), (33, 257), (20, 1021), (9, 2053), (2, 151_936)])
def test_fp32_is_within_1e5_of_fp64(implementation: str, rows: int, vocab: int, options: dict[str, Any]) -> None:
    if implementation == "reference" and vocab > 10_000:
        pytest.skip("eager fp32 sums are not that exact")
    case = random_case(rows, vocab, seed=vocab)
    if "importance_cap" in options:
        case = sampled(case)
    truth, true_gradient = run(case, "reference", torch.float64, **options)
    result, gradient = run(case, implementation, torch.float32, **options)
    assert result.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5, abs=1e-6)
    assert torch.equal(result.clipped, truth.clipped)
    torch.testing.assert_close(result.kl.double(), truth.kl, rtol=1e-4, atol=1e-6)
    if vocab > 1:  # else every probability is 1 and both sides are 0
        assert relative_error(result.logprobs, truth.logprobs) < 1e-5
        assert relative_error(gradient, true_gradient) < 1e-5
    if truth.entropy is not None:
        assert result.entropy is not None
        torch.testing.assert_close(result.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
    assert gradient.isfinite().all()


def sampled(case: Case) -> Case:
    """With log-probabilities of a sampler near the old ones: some importance weights reach a cap of 1.2."""
    assert case.old_logprobs is not None
    noise = torch.randn(len(case.weights), generator=torch.Generator().manual_seed(1))
    return replace(case, sampler_logprobs=case.old_logprobs + 0.3 * noise)


def test_reference_is_the_formula() -> None:
    case = sampled(random_case(25, 11))
    options = {
        "importance_cap": 1.2,
        "beta": 0.2,
        "temperature": 0.8,
        "epsilon_low": 0.1,
        "epsilon_high": 0.3,
        "with_entropy": True,
    }
    result, _ = run(case, "reference", torch.float64, **options)
    assert case.old_logprobs is not None
    assert case.ref_logprobs is not None
    assert case.sampler_logprobs is not None
    total, capped = 0.0, 0
    for n, (row, advantage) in enumerate(zip(case.logits.tolist(), case.advantages.tolist(), strict=True)):
        exponentials = [math.exp(x / 0.8) for x in row]
        probabilities = [e / sum(exponentials) for e in exponentials]
        logprob = math.log(probabilities[int(case.targets[n])])
        ratio = math.exp(logprob - case.old_logprobs[n].item())
        surrogate = min(ratio * advantage, min(max(ratio, 0.9), 1.3) * advantage)
        d = case.ref_logprobs[n].item() - logprob
        kl = math.exp(d) - d - 1
        importance = math.exp(case.old_logprobs[n].item() - case.sampler_logprobs[n].item())
        capped += importance > 1.2
        total += case.weights[n].item() * (-min(importance, 1.2) * surrogate + 0.2 * kl)
        assert result.logprobs[n].item() == pytest.approx(logprob, rel=1e-12)
        assert result.kl[n].item() == pytest.approx(kl, rel=1e-9)
        assert bool(result.clipped[n]) == (surrogate != ratio * advantage)
        assert result.entropy is not None
        assert result.entropy[n].item() == pytest.approx(-sum(p * math.log(p) for p in probabilities), rel=1e-12)
    assert result.loss.item() == pytest.approx(total, rel=1e-12)
    assert 0 < capped < 25


@pytest.mark.parametrize("with_old", [True, False])
def test_gradcheck_in_fp64(with_old: bool) -> None:
    case = sampled(random_case(6, 5))
    arguments = case.to("cpu", torch.float64).others
    if with_old:

        def loss(logits: torch.Tensor) -> torch.Tensor:
            return policy_loss(logits, case.targets, **arguments, beta=0.1, temperature=0.9).loss

        assert torch.autograd.gradcheck(loss, case.logits.double().requires_grad_())
    else:
        # Finite differences see a constant where ratio = exp(logp - logp.detach()): compare with -A logp, its gradient.
        del arguments["old_logprobs"], arguments["sampler_logprobs"]
        logits = case.logits.double().requires_grad_()
        (gradient,) = torch.autograd.grad(policy_loss(logits, case.targets, **arguments).loss, logits)
        logprobs = logits.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
        (expected,) = torch.autograd.grad(-(arguments["weights"] * arguments["advantages"] * logprobs).sum(), logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@every_implementation
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [
        (2.0, 1.5, -2.6, True),  # above 1 + epsilon_high
        (2.0, 0.5, -1.0, False),
        (2.0, 1.2, -2.4, False),
        (-2.0, 1.5, 3.0, False),
        (-2.0, 0.5, 1.6, True),  # below 1 - epsilon_low
        (-2.0, 0.9, 1.8, False),
        (0.0, 1.5, 0.0, False),
    ],
)
def test_clip_by_hand(implementation: str, advantage: float, ratio: float, loss: float, clipped: bool) -> None:
    logprob = math.log(0.5)
    case = Case(
        logits=torch.zeros(1, 2),
        targets=torch.tensor([0]),
        advantages=torch.tensor([advantage]),
        weights=torch.ones(1),
        old_logprobs=torch.tensor([logprob - math.log(ratio)]),
    )
    result, gradient = run(case, implementation, torch.float32, epsilon_low=0.2, epsilon_high=0.3)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert bool(result.clipped[0]) == clipped
    slope = 0.0 if clipped else -advantage * ratio * 0.5  # d logprob / d logits = (1/2, -1/2)
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-6)


@every_implementation
def test_without_old_logprobs_the_ratio_is_one(implementation: str) -> None:
    case = replace(random_case(12, 31), old_logprobs=None, ref_logprobs=None)
    result, gradient = run(case, implementation, torch.float32)
    coefficient = -(case.weights * case.advantages).double()
    onehot = torch.nn.functional.one_hot(case.targets, 31)
    expected = coefficient[:, None] * (onehot - case.logits.double().softmax(-1))
    assert result.loss.item() == pytest.approx(coefficient.sum().item(), rel=1e-5)
    assert relative_error(gradient, expected) < 1e-6
    assert not result.clipped.any()
    assert not result.kl.any()


@every_implementation
@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.2), (0.0, 0.0)])
def test_a_ratio_that_overflows_is_clipped(implementation: str, advantage: float, loss: float) -> None:
    case = replace(random_case(1, 9), advantages=torch.tensor([advantage]), weights=torch.ones(1), ref_logprobs=None)
    result, gradient = run(replace(case, old_logprobs=torch.tensor([-1000.0])), implementation, torch.float32)
    assert result.loss.item() == pytest.approx(loss)
    assert torch.equal(gradient, torch.zeros(1, 9))


@every_implementation
@pytest.mark.parametrize(
    ("advantage", "log_importance", "importance"),
    [
        (2.0, math.log(1.5), 1.5),
        (-2.0, math.log(0.25), 0.25),
        (2.0, math.log(4.0), 3.0),  # capped
        (-2.0, 1000.0, 3.0),  # overflows, capped
        (0.0, 1000.0, 3.0),
    ],
)
@pytest.mark.parametrize("old", ["given", "current"])
def test_importance_weight_by_hand(
    implementation: str, old: str, advantage: float, log_importance: float, importance: float
) -> None:
    """It is a constant factor of the policy term, not of the KL."""
    current = math.log(0.5)
    before = current - math.log(1.1) if old == "given" else current
    ratio = 1.1 if old == "given" else 1.0
    case = Case(
        logits=torch.zeros(1, 2),
        targets=torch.tensor([0]),
        advantages=torch.tensor([advantage]),
        weights=torch.ones(1),
        old_logprobs=torch.tensor([before]) if old == "given" else None,
        ref_logprobs=torch.tensor([current + math.log(2.0)]),
        sampler_logprobs=torch.tensor([before - log_importance]),
    )
    result, gradient = run(case, implementation, torch.float32, beta=0.5, importance_cap=3.0)
    assert result.loss.item() == pytest.approx(-importance * ratio * advantage + 0.5 * (1 - math.log(2.0)), rel=1e-5)
    slope = 0.5 * (-importance * ratio * advantage - 0.5)  # d logprob / d logits = (1/2, -1/2), d KL / d logprob = -1
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-5)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(implementation: str, dtype: torch.dtype) -> None:
    case = random_case(8, 41)
    case = replace(case, logits=case.logits.to(dtype))
    truth, true_gradient = run(case, "reference", torch.float64)
    case = case.to(device_of(implementation))
    logits = case.logits.detach().clone().requires_grad_()
    with use(implementation):
        result = policy_loss(logits, case.targets, **case.others)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert relative_error(result.logprobs.cpu(), truth.logprobs) < 1e-6
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.cpu(), true_gradient.to(dtype))
