"""Attention of stretches with themselves against one softmax a stretch, in fp64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from plain_varlen import PlainVarlen

from mrpo.kernels import prefix_flash
from mrpo.kernels.segment_attention import segment_attention

# Equal images; windows of an image with narrow ones at its edges; empty ones; one token.
LENGTHS = [[6, 6, 6], [4, 4, 2, 4, 4, 2, 2, 2, 1], [0, 3, 0, 5, 0], [1]]


@pytest.fixture(autouse=True)
def _plain_flash(monkeypatch):
    monkeypatch.setattr(prefix_flash, "default_primitive", PlainVarlen)


def inputs(tokens, *, heads=4, kv_heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator, dtype=torch.float64)
    return [part.requires_grad_() for part in packed.split([heads, kv_heads, kv_heads], 1)]  # views, as a tower's


def starts_of(lengths, device="cpu"):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def one_by_one(q, k, v, lengths, scale):
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    parts = []
    for start, end in pairwise([0, *accumulate(lengths)]):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(parts)


def gradients(out, tensors):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    return torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["sdpa", "flash"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_stretch_sees_itself_with_gradients(name, lengths, scale):
    tensors = inputs(sum(lengths))
    out = segment_attention(*tensors, starts_of(lengths), max(lengths), scale=scale, implementation=name)
    truth = one_by_one(*tensors, lengths, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(out, tensors), gradients(truth, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_the_own_backward_pass_is_the_derivative():
    lengths = [3, 0, 2, 4]
    assert torch.autograd.gradcheck(
        lambda *tensors: segment_attention(*tensors, starts_of(lengths), 4, implementation="flash"),
        inputs(9, heads=2, kv_heads=1, head_dim=2),
    )


@pytest.mark.parametrize("longest", [4, None])
def test_kernels_are_told_the_longest_stretch(longest, monkeypatch):
    told = []

    class Listening(PlainVarlen):
        def forward(self, q, k, v, spans, **options):
            told.append((spans.max_queries, spans.max_keys))
            return super().forward(q, k, v, spans, **options)

    monkeypatch.setattr(prefix_flash, "default_primitive", Listening)
    segment_attention(*inputs(9), starts_of([2, 4, 3]), longest, implementation="flash")
    assert told == [(4, 4)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v, starts: (q[None], k, v, starts), ValueError, "q must have shape"),
        (lambda q, k, v, starts: (q[:0], k[:0], v[:0], starts[:1]), ValueError, "with T > 0"),
        (lambda q, k, v, starts: (q, k[1:], v, starts), ValueError, "k must have shape"),
        (lambda q, k, v, starts: (q, k, v.float(), starts), TypeError, "v must have dtype"),
        (lambda q, k, v, starts: (q[:, :3], k, v, starts), ValueError, "3 query heads cannot share 2 key-value heads"),
        (lambda q, k, v, starts: (q, k, v, starts.long()), TypeError, "starts must have dtype torch.int32"),
        (lambda q, k, v, starts: (q, k, v, starts[:-1]), ValueError, "starts must end at 9, the number of tokens"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        segment_attention(*change(*inputs(9), starts_of([2, 4, 3])))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80])  # the towers of InternVL3, Qwen3-VL and Qwen2.5-VL
@pytest.mark.parametrize("lengths", [[3136, 1024, 784], [64] * 49 + [32] * 7 + [16]])
def test_on_a_gpu_errors_are_those_of_sdpa_in_the_same_precision(head_dim, lengths, monkeypatch):
    monkeypatch.undo()  # the real primitive
    rounded = [t.detach().bfloat16() for t in inputs(sum(lengths), heads=4, kv_heads=4, head_dim=head_dim)]
    starts = starts_of(lengths, "cuda")

    def results(name, dtype):
        tensors = [t.to("cuda", dtype).requires_grad_() for t in rounded]
        out = segment_attention(*tensors, starts, max(lengths), implementation=name)
        return [tensor.double() for tensor in (out, *gradients(out, tensors))]

    exact, plain, found = (
        results("sdpa", torch.float64),
        results("sdpa", torch.bfloat16),
        results(None, torch.bfloat16),
    )
    for truth, theirs, ours in zip(exact, plain, found, strict=True):
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()
