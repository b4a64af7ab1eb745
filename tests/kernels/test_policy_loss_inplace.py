"""The gradient in place of the logits: the same numbers, and safe with autograd."""

from __future__ import annotations

import pytest
import torch
from loss_cases import device_of, every_implementation, random_case, run

from mrpo.kernels import policy_loss
from mrpo.kernels.dispatch import use


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_the_gradient_takes_the_place_of_the_logits(implementation: str, dtype: torch.dtype) -> None:
    case = random_case(9, 37)
    expected, expected_gradient = run(case, implementation, dtype, beta=0.1, with_entropy=True)
    case = case.to(device_of(implementation), dtype)
    leaf = torch.full((9, 48), 7.0, dtype=dtype, device=case.logits.device, requires_grad=True)
    buffer = leaf * 1.0
    logits = buffer[:, 3:40]
    logits.data.copy_(case.logits)
    with use(implementation):
        result = policy_loss(logits, case.targets, **case.others, beta=0.1, with_entropy=True, inplace=True)
    assert torch.equal(logits.detach().cpu(), expected_gradient)
    assert (buffer[:, :3] == 7.0).all()  # the columns beside them are nobody's to write
    assert (buffer[:, 40:] == 7.0).all()
    assert result.loss.item() == expected.loss.item()
    result.loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:, 3:40].cpu(), expected_gradient)
    assert not leaf.grad[:, :3].any()


@every_implementation
def test_in_place_nothing_is_written_without_a_gradient_to_record(implementation: str) -> None:
    case = random_case(3, 5).to(device_of(implementation))
    logits = case.logits.clone()
    with use(implementation):
        policy_loss(logits, case.targets, **case.others, inplace=True)
        with torch.no_grad():
            policy_loss(logits.requires_grad_() * 1.0, case.targets, **case.others, inplace=True)
    assert torch.equal(logits, case.logits)


@every_implementation
def test_in_place_who_needs_the_values_later_is_told(implementation: str) -> None:
    case = random_case(3, 5).to(device_of(implementation))
    logits = case.logits.clone().requires_grad_().exp()  # its backward pass needs its result
    with use(implementation):
        result = policy_loss(logits, case.targets, **case.others, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.loss.backward()


def test_in_place_is_refused_where_it_is_not_safe() -> None:
    case = random_case(4, 6)
    leaf = case.logits.clone().requires_grad_()
    wide = torch.zeros(4, 12, requires_grad=True) * 1.0
    unsafe = {
        "a leaf": leaf,
        "contiguous rows": wide[:, ::2],
        "not overlap": (leaf * 1.0)[:1].expand(4, 6),
    }
    for reason, logits in [*unsafe.items(), ("a leaf", leaf[:, :6])]:
        with pytest.raises(ValueError, match=f"inplace .*{reason}"):
            policy_loss(logits, case.targets, **case.others, inplace=True)
