"""Logits that are huge, forbidden or NaN, rows that have no part, no rows at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_cases import Case, every_implementation, every_kernel, random_case, relative_error, run

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy


@every_implementation
def test_huge_logits(implementation: str) -> None:
    case = random_case(30, 101, spread=1.0)
    case = replace(case, logits=case.logits + 1e4 * torch.randint(-1, 2, (30, 101)), old_logprobs=None)
    logprobs = case.logits.double().log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    case = replace(case, ref_logprobs=(logprobs + 0.1).float())
    truth, true_gradient = run(case, "reference", torch.float64, beta=0.1)
    result, gradient = run(case, implementation, torch.float32, beta=0.1)
    assert gradient.isfinite().all()
    assert relative_error(result.logprobs, truth.logprobs) < 1e-5
    # At |logprob| = 1e4 the KL's difference itself is known in fp32 to 1e-3 only.
    assert relative_error(gradient, true_gradient) < 1e-3


@every_implementation
@pytest.mark.parametrize("forbidden", [torch.arange(40) % 3 == 1, torch.arange(2600) < 2100], ids=["some", "leading"])
def test_forbidden_columns_have_no_part(implementation: str, forbidden: torch.Tensor) -> None:
    vocab = len(forbidden)
    case = random_case(20, vocab)
    allowed = (~forbidden).nonzero()[:, 0]
    case = replace(case, targets=allowed[case.targets % len(allowed)])
    kept = (~forbidden).cumsum(0) - 1
    smaller = replace(case, logits=case.logits[:, ~forbidden], targets=kept[case.targets])
    truth, true_gradient = run(smaller, "reference", torch.float64, beta=0.1, with_entropy=True)
    masked = replace(case, logits=case.logits.masked_fill(forbidden, -torch.inf))
    result, gradient = run(masked, implementation, torch.float32, beta=0.1, with_entropy=True)
    assert torch.equal(gradient[:, forbidden], torch.zeros(20, int(forbidden.sum())))
    assert relative_error(gradient[:, ~forbidden], true_gradient) < 1e-5
    assert result.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    assert result.entropy is not None
    assert truth.entropy is not None
    assert relative_error(result.entropy, truth.entropy) < 1e-5


@every_kernel
def test_a_confident_policy_keeps_its_small_gradient(implementation: str) -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 1234] = 27.0  # 1 - p is 1e-8: below fp32's resolution at 1
    case = Case(logits, torch.tensor([1234]), torch.ones(1), torch.ones(1))
    truth, true_gradient = run(case, "reference", torch.float64)
    result, gradient = run(case, implementation, torch.float32)
    assert relative_error(result.logprobs, truth.logprobs) < 1e-5
    assert relative_error(gradient, true_gradient) < 1e-5


def poisoned(case: Case, rows: torch.Tensor) -> Case:
    """Weight 0 and garbage in the given rows."""
    assert case.old_logprobs is not None
    assert case.ref_logprobs is not None
    garbage = case.logits.masked_fill(rows[:, None], torch.nan)
    garbage[rows.nonzero()[0], 0] = torch.inf
    return replace(
        case,
        logits=garbage,
        targets=case.targets.masked_fill(rows, -100),
        advantages=case.advantages.masked_fill(rows, torch.nan),
        weights=case.weights.masked_fill(rows, 0.0),
        old_logprobs=case.old_logprobs.masked_fill(rows, -torch.inf),
        ref_logprobs=case.ref_logprobs.masked_fill(rows, torch.nan),
    )


@every_implementation
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_rows_of_weight_zero_give_zero_whatever_they_hold(implementation: str, share: float) -> None:
    case = random_case(30, 37)
    skipped = torch.arange(30) < 30 * share
    options = {"beta": 0.1, "with_entropy": True}
    result, gradient = run(poisoned(case, skipped), implementation, torch.float32, **options)
    expected, expected_gradient = run(
        replace(case, weights=case.weights.masked_fill(skipped, 0.0)), implementation, torch.float32, **options
    )
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
    assert result.entropy is not None
    for output in (gradient, result.logprobs, result.clipped, result.kl, result.entropy):
        assert not output[skipped].any()
        assert output.isfinite().all()
    if share == 1.0:
        assert result.loss.item() == 0.0


@every_implementation
def test_no_rows(implementation: str) -> None:
    result, gradient = run(random_case(0, 13), implementation, torch.float32, beta=0.1)
    assert result.loss.item() == 0.0
    assert gradient.shape == (0, 13)


@every_implementation
@pytest.mark.parametrize("column", [0, 5, 1500])
def test_a_nan_logit_shows(implementation: str, column: int) -> None:
    case = random_case(3, 2000)
    case.logits[1, column] = torch.nan
    result, gradient = run(case, implementation, torch.float32)
    assert result.loss.isnan()
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()
