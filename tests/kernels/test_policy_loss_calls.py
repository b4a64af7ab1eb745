"""The policy loss as a function: with autograd, strided tensors, threads and wrong arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import device_of, every_implementation, random_case, run

from mrpo.kernels import policy_loss
from mrpo.kernels.dispatch import extension, use

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy


@pytest.mark.skipif(extension() is None, reason="mrpo._C is not built")
def test_same_bits_on_repeat_and_with_any_number_of_threads() -> None:
    case = random_case(50, 3001)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            runs.append(run(case, "cpp", torch.float32, beta=0.1, with_entropy=True))
    finally:
        torch.set_num_threads(threads)
    first, first_gradient = runs[0]
    for result, gradient in runs[1:]:
        assert torch.equal(gradient, first_gradient)
        assert torch.equal(result.loss, first.loss)
        assert torch.equal(result.logprobs, first.logprobs)


@every_implementation
@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_is_honoured(implementation: str, inplace: bool) -> None:
    case = random_case(8, 17)
    _, plain = run(case, implementation, torch.float32)
    case = case.to(device_of(implementation))
    logits = case.logits.clone().requires_grad_()
    with use(implementation):
        loss = policy_loss(logits * 2.0, case.targets, **case.others, temperature=2.0, inplace=inplace).loss
    for _ in range(2):
        (0.25 * loss).backward(retain_graph=True)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.cpu(), plain * (2 * 0.25 + 1))


@every_implementation
def test_only_the_loss_carries_a_gradient(implementation: str) -> None:
    result, _ = run(random_case(4, 17), implementation, torch.float32, beta=0.1, with_entropy=True)
    assert result.entropy is not None
    assert not any(output.requires_grad for output in (result.logprobs, result.clipped, result.kl, result.entropy))


@every_implementation
def test_without_recording_the_values_are_the_same(implementation: str) -> None:
    case = random_case(8, 17)
    expected, _ = run(case, implementation, torch.float32)
    case = case.to(device_of(implementation))
    with use(implementation), torch.no_grad():
        result = policy_loss(case.logits.clone().requires_grad_(), case.targets, **case.others)
    assert not result.loss.requires_grad
    assert torch.equal(result.loss.cpu(), expected.loss)
    assert torch.equal(result.logprobs.cpu(), expected.logprobs)


@every_implementation
@pytest.mark.parametrize("layout", ["every other column", "transposed", "slice of a row", "every other row"])
def test_strided_logits(implementation: str, layout: str) -> None:
    case = random_case(14, 19)
    wide = torch.full((28, 38), torch.nan, device=device_of(implementation))
    views = {
        "every other column": wide[:14, ::2],
        "transposed": wide[:19, :14].T,
        "slice of a row": wide[:14, 7:26],
        "every other row": wide[::2, :19],
    }
    strided = views[layout].copy_(case.logits)
    assert not strided.is_contiguous()
    expected, expected_gradient = run(case, implementation, torch.float32)
    case = case.to(device_of(implementation))
    others = {name: tensor for name, tensor in case.others.items() if tensor is not None}
    vectors = {name: torch.stack([tensor, tensor], dim=1)[:, 0] for name, tensor in others.items()}
    leaf = strided.detach().requires_grad_()
    with use(implementation):
        result = policy_loss(leaf, torch.stack([case.targets, case.targets], dim=1)[:, 0], **vectors)
    result.loss.backward()
    assert torch.equal(result.loss.cpu(), expected.loss)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.cpu(), expected_gradient)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", torch.zeros(4), ValueError),
        ("logits", torch.zeros(4, 0), ValueError),
        ("logits", torch.zeros(4, 6, dtype=torch.int64), TypeError),
        ("targets", torch.zeros(4), TypeError),
        ("targets", torch.zeros(5, dtype=torch.int64), ValueError),
        ("targets", torch.tensor([0, 1, 6, 2]), ValueError),
        ("targets", torch.tensor([0, -1, 5, 2]), ValueError),
        ("advantages", torch.zeros(4, 1), ValueError),
        ("advantages", torch.zeros(4, device="meta"), ValueError),
        ("weights", torch.ones(4, dtype=torch.bool), TypeError),
        ("weights", torch.ones(4, requires_grad=True), ValueError),
        ("old_logprobs", torch.zeros(3), ValueError),
        ("ref_logprobs", [0.0] * 4, TypeError),
        ("sampler_logprobs", torch.zeros(4, 1), ValueError),
        ("sampler_logprobs", torch.tensor([0.0, 0.0, torch.nan, 0.0]), ValueError),
        ("old_logprobs", torch.full((4,), torch.nan), ValueError),
        ("advantages", torch.full((4,), torch.nan), ValueError),
        ("weights", torch.full((4,), torch.nan), ValueError),
        ("importance_cap", 0.0, ValueError),
        ("importance_cap", float("nan"), ValueError),
        ("epsilon_low", 1.0, ValueError),
        ("epsilon_low", -0.1, ValueError),
        ("epsilon_high", float("nan"), ValueError),
        ("beta", -1.0, ValueError),
        ("temperature", 0.0, ValueError),
    ],
)
def test_bad_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {**vars(random_case(4, 6)), name: value}
    with pytest.raises(error, match=name):
        policy_loss(**arguments)


def test_a_kl_needs_its_reference() -> None:
    case = replace(random_case(4, 6), ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(**vars(case), beta=0.1)


def test_the_row_of_a_wrong_target_is_named() -> None:
    case = replace(random_case(3, 6), targets=torch.tensor([5, 0, 6]))
    with pytest.raises(ValueError, match=r"targets\[2\] is 6"):
        policy_loss(**vars(case))
