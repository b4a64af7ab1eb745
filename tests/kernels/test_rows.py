"""The row kernel without autograd, and what the backward pass does with its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import Case, device_of, every_implementation, needs_triton, random_case, run

from mrpo.kernels import SegmentedAdvantages
from mrpo.kernels.dispatch import use
from mrpo.kernels.rows import LossConfig, RowInputs, RowOutputs, loss_rows, times_upstream

CONFIG = LossConfig(beta=0.1, temperature=0.8)


def inputs_of(case: Case) -> RowInputs:
    return RowInputs(case.targets, **case.others)


def rows_of(case: Case, implementation: str, **options: Any) -> RowOutputs:
    case = case.to(device_of(implementation))
    with use(implementation):
        return loss_rows(case.logits, inputs_of(case), config=CONFIG, **options)


@every_implementation
def test_the_gradient_is_that_of_policy_loss_wherever_it_is_written(implementation: str) -> None:
    case = random_case(11, 29)
    expected, expected_gradient = run(case, implementation, torch.float32, beta=0.1, temperature=0.8)
    logits = case.logits.clone().to(device_of(implementation))
    for gradient in ("none", "new", "inplace"):
        rows = rows_of(replace(case, logits=logits), implementation, gradient=gradient)
        assert rows.losses.sum().item() == pytest.approx(expected.loss.item(), rel=1e-6)
        assert torch.equal(rows.logprobs.cpu(), expected.logprobs)
        assert rows.entropy is None
        if gradient == "none":
            assert rows.dlogits is None
            continue
        assert rows.dlogits is not None
        assert torch.equal(rows.dlogits.cpu(), expected_gradient)
        assert torch.equal(logits.cpu(), expected_gradient if gradient == "inplace" else case.logits)
        assert (rows.dlogits.data_ptr() == logits.data_ptr()) == (gradient == "inplace")


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_has_the_dtype_of_the_logits(implementation: str, dtype: torch.dtype) -> None:
    case = random_case(5, 17)
    case = replace(case, logits=case.logits.to(dtype))
    exact = rows_of(replace(case, logits=case.logits.float()), implementation, gradient="new").dlogits
    assert exact is not None
    for gradient in ("new", "inplace"):
        dlogits = rows_of(replace(case, logits=case.logits.clone()), implementation, gradient=gradient).dlogits
        assert dlogits is not None
        torch.testing.assert_close(dlogits, exact.to(dtype))  # Triton's interpreter truncates to bf16


@every_implementation
def test_columns_far_apart_are_written_in_place(implementation: str) -> None:
    case = random_case(5, 17)
    expected = rows_of(case, implementation, gradient="new").dlogits
    wide = torch.full((5, 34), 7.0, device=device_of(implementation))
    wide[:, ::2] = case.logits.to(wide.device)
    with use(implementation):
        loss_rows(wide[:, ::2], inputs_of(case.to(str(wide.device))), config=CONFIG, gradient="inplace")
    assert expected is not None
    assert torch.equal(wide[:, ::2], expected)
    assert (wide[:, 1::2] == 7.0).all()


@every_implementation
def test_rows_taken_out_give_what_they_gave_among_the_others(implementation: str) -> None:
    case = random_case(20, 13)
    ends = torch.tensor([4, 4, 9, 20])
    case = replace(case, advantages=SegmentedAdvantages(ends, torch.tensor([1.0, 5.0, -2.0, 0.5])))
    case = case.to(device_of(implementation))
    with use(implementation):
        whole = loss_rows(case.logits, inputs_of(case), config=CONFIG, entropy=True, gradient="new")
        for rows in (slice(3, 17), torch.tensor([19, 0, 4, 8, 9], device=case.logits.device)):
            part = loss_rows(case.logits[rows], inputs_of(case)[rows], config=CONFIG, entropy=True, gradient="new")
            for name, value in vars(whole).items():
                assert torch.equal(getattr(part, name), value[rows]), name


def test_upstream_of_one_costs_no_copy() -> None:
    gradient = torch.randn(3, 4)
    assert times_upstream(gradient, torch.tensor(1.0)) is gradient
    assert torch.equal(times_upstream(gradient, torch.tensor(-2.0)), gradient * -2.0)


@needs_triton
@pytest.mark.parametrize("factor", [1.0, -0.5])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 5000)])
def test_the_scaling_kernel_scales_in_place(factor: float, shape: tuple[int, ...]) -> None:
    from mrpo.kernels.policy_loss_triton import scale_unless_one

    tensor = torch.randn(shape, device=device_of("triton"))
    expected = tensor * factor
    assert scale_unless_one(tensor, torch.tensor(factor, device=tensor.device)) is tensor
    assert torch.equal(tensor, expected)


@needs_triton
def test_the_scaling_kernel_leaves_the_columns_between_rows_alone() -> None:
    from mrpo.kernels.policy_loss_triton import scale_unless_one

    wide = torch.ones(3, 5000, device=device_of("triton"))
    scale_unless_one(wide[:, 8:4500], torch.tensor(3.0, device=wide.device))
    assert (wide[:, 8:4500] == 3.0).all()
    assert wide.sum().item() == 3 * (5000 + 2 * 4492)
