from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import Conv3d

from mrpo.backbones import patches
from mrpo.backbones.patches import embed_patches_by_product


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_forward", patches._product)


def results(conv: Conv3d, inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    out = conv(inputs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum().backward()
    return [out, *(t.grad for t in (inputs, *conv.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(2, 4, 4), (4, 8, 4)])  # one patch an input, and four
def test_a_product_is_the_convolution(bias: bool, size: tuple[int, int, int], as_on_a_gpu: None) -> None:
    torch.manual_seed(0)
    conv = Conv3d(3, 10, (2, 4, 4), stride=(2, 4, 4), bias=bias)
    other = copy.deepcopy(conv)
    embed_patches_by_product(other)
    assert "forward" in vars(other)
    inputs = torch.randn(7, 3, *size)
    for found, truth in zip(results(other, inputs), results(conv, inputs), strict=True):
        torch.testing.assert_close(found, truth)


def test_a_copy_has_its_own_weights(as_on_a_gpu: None) -> None:
    conv = Conv3d(3, 10, 2, stride=2)
    embed_patches_by_product(conv)
    kept = copy.deepcopy(conv)
    inputs = torch.randn(4, 3, 2, 2, 2)
    before = kept(inputs)
    with torch.no_grad():
        conv.weight.zero_()
    assert torch.equal(kept(inputs), before)


def test_other_convolutions_stay() -> None:
    others = [Conv3d(4, 4, 2, stride=2, **option) for option in ({"padding": 1}, {"groups": 2}, {"dilation": 2})]
    embed_patches_by_product(torch.nn.ModuleList(others))
    assert not any("forward" in vars(module) for module in others)


@pytest.mark.gpu
def test_on_a_gpu_errors_are_those_of_bfloat16() -> None:
    torch.manual_seed(0)
    conv = Conv3d(3, 128, (2, 16, 16), stride=(2, 16, 16)).bfloat16()
    inputs = torch.randn(500, 3, 2, 16, 16).bfloat16()
    truth = results(copy.deepcopy(conv).double(), inputs.double())
    embed_patches_by_product(conv.cuda())
    for found, exact in zip(results(conv, inputs.cuda()), truth, strict=True):
        assert (found.double().cpu() - exact).norm() <= 1e-2 * exact.norm()
