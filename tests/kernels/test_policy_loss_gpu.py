"""What only a GPU can show: half precision at real sizes, 64-bit offsets, no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import Case, random_case, relative_error, run

from mrpo.kernels import PolicyLoss, SegmentedAdvantages, policy_loss
from mrpo.kernels.checks import check_values

pytestmark = pytest.mark.gpu

VOCABULARIES = [151_936, 152_064, 151_674]  # Qwen3-VL, Qwen2.5-VL, InternVL3
OPTIONS: dict[str, Any] = {"beta": 0.04, "temperature": 0.9, "epsilon_high": 0.28}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(case: Case, **options: Any) -> tuple[PolicyLoss, torch.Tensor]:
    """The loss and the gradient of the logits, on the GPU."""
    logits = case.logits.detach().clone().requires_grad_()
    result = policy_loss(logits, case.targets, **case.others, **OPTIONS, **options)
    result.loss.backward()
    assert logits.grad is not None
    return result, logits.grad


def eager(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradient by plain PyTorch in the dtype of the logits."""
    logits = case.logits.detach().clone().requires_grad_()
    logprobs = (logits / OPTIONS["temperature"]).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    ratio = (logprobs - case.old_logprobs).exp()
    clipped = ratio.clamp(0.8, 1 + OPTIONS["epsilon_high"])
    difference = case.ref_logprobs - logprobs
    kl = difference.exp() - difference - 1
    losses = -torch.minimum(ratio * case.advantages, clipped * case.advantages) + OPTIONS["beta"] * kl
    (case.weights * losses).sum().backward()
    assert logits.grad is not None
    return logprobs.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [*VOCABULARIES, 997])
def test_half_precision_is_at_most_twice_as_far_from_fp64_as_eager(vocab: int, dtype: torch.dtype) -> None:
    case = random_case(48, vocab, seed=vocab)
    case = replace(case, logits=case.logits.to(dtype), weights=torch.rand(48)).to("cuda")
    truth, true_gradient = run(case.to("cpu"), "reference", torch.float64, **OPTIONS)
    result, gradient = on_gpu(case)
    eager_logprobs, eager_gradient = eager(case)
    assert gradient.dtype == dtype
    ours, theirs = (relative_error(g.cpu(), true_gradient) for g in (gradient, eager_gradient))
    assert ours <= 2 * theirs
    ours, theirs = (relative_error(x.cpu(), truth.logprobs) for x in (result.logprobs, eager_logprobs))
    assert ours <= 2 * theirs
    assert ours < 1e-5


def test_more_than_2_to_the_31_logits() -> None:
    rows, vocab = 14_500, 151_936
    last = random_case(3, vocab)
    last = replace(last, logits=last.logits.bfloat16())
    expected, expected_gradient = on_gpu(last.to("cuda"))
    case = Case(
        logits=torch.zeros(rows, vocab, dtype=torch.bfloat16),
        targets=torch.zeros(rows, dtype=torch.int64),
        advantages=torch.zeros(rows),
        weights=torch.zeros(rows),
        old_logprobs=torch.zeros(rows),
        ref_logprobs=torch.zeros(rows),
    )
    assert rows * vocab > 2**31
    for name, tensor in vars(last).items():
        if tensor is not None:
            getattr(case, name)[-3:] = tensor
    case = case.to("cuda")
    buffer = case.logits.requires_grad_() * 1.0
    result = policy_loss(buffer, case.targets, **case.others, **OPTIONS, inplace=True)
    assert torch.equal(result.logprobs[-3:], expected.logprobs)
    assert torch.equal(buffer[-3:], expected_gradient)
    assert not buffer[:-3].any()


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_two_runs_give_the_same_bits(vocab: int) -> None:
    case = random_case(64, vocab)
    case = replace(case, logits=case.logits.bfloat16()).to("cuda")
    first, first_gradient = on_gpu(case, with_entropy=True)
    for _ in range(3):
        result, gradient = on_gpu(case, with_entropy=True)
        assert torch.equal(gradient, first_gradient)
        for name, value in vars(first).items():
            assert torch.equal(getattr(result, name), value), name


def test_padded_rows_give_the_same_bits_and_keep_their_padding() -> None:
    case = random_case(16, 151_674)
    case = replace(case, logits=case.logits.bfloat16()).to("cuda")
    expected, expected_gradient = on_gpu(case)
    padded = torch.full((16, 151_680), 7.0, dtype=torch.bfloat16, device="cuda", requires_grad=True) * 1.0
    logits = padded[:, :151_674]
    logits.data.copy_(case.logits)
    result = policy_loss(logits, case.targets, **case.others, **OPTIONS, inplace=True)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(logits, expected_gradient)
    assert (padded[:, 151_674:] == 7.0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_waits_for_the_device(inplace: bool) -> None:
    case = random_case(32, 997)
    ends = torch.tensor([8, 20, 32])
    case = replace(case, advantages=SegmentedAdvantages(ends, torch.tensor([1.0, -1.0, 0.5]))).to("cuda")
    upstream = torch.tensor(-3.0, device="cuda")
    _, plain = on_gpu(case)
    leaf = case.logits.clone().requires_grad_()
    with no_waiting():
        loss = policy_loss(leaf * 1.0, case.targets, **case.others, **OPTIONS, inplace=inplace).loss
        loss.backward(upstream, retain_graph=True)  # scaled out of place
        loss.backward(upstream)  # scaled in place
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * -3.0 * plain)


def test_values_on_the_device_are_checked_on_request() -> None:
    case = replace(random_case(3, 6), targets=torch.tensor([5, 0, 6])).to("cuda")
    with check_values(), pytest.raises(ValueError, match=r"targets\[2\] is 6"):
        policy_loss(**vars(case))
