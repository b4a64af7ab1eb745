"""Packed-row attention against every completion's own row [prompt, completion], in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_varlen import PlainVarlen, span_pairs
from torch.nn.attention.flex_attention import flex_attention

from mrpo.kernels import prefix_flash
from mrpo.kernels.prefix_attention import PrefixLayout, choose_attention, compilations, prefix_attention
from mrpo.kernels.prefix_flash import FlashAttnPackage, TorchFlash
from mrpo.kernels.prefix_layout import Spans

# One group alone; ragged with an empty completion; several with padding; one without completions; nothing but prompts.
LAYOUTS = [
    ([(5, [3])], 8),
    ([(4, [2, 0, 3, 1])], 10),
    ([(3, [2, 4]), (1, [1]), (6, [5, 2, 2])], 32),
    ([(2, [3, 1]), (4, []), (1, [0])], 16),
    ([(3, []), (2, [])], 5),
]


def inputs(length, *, dtype=torch.float64, device="cpu", seed=0, heads=4, kv_heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, length, head_dim), (kv_heads, length, head_dim), (kv_heads, length, head_dim))
    tensors = [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def rows_apart(q, k, v, groups, scale=None):
    """Each completion attends in a row of its own behind a copy of its prompt; prompts alone; no padding."""
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts, place = [], 0
    for prompt, completions in groups:
        first = torch.arange(place, place + prompt)
        place += prompt
        for number, size in enumerate((0, *completions)):
            row = torch.cat([first, torch.arange(place, place + size)])
            place += size
            scores = q[:, :, row] @ k[:, :, row].transpose(2, 3) * scale
            weights = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
            out = weights.softmax(-1) @ v[:, :, row]
            parts.append(out if number == 0 else out[:, :, prompt:])
    return torch.cat(parts, 2)


def gradients(out, tensors, size):
    used = out[:, :, :size]
    weights = torch.randn(used.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    return torch.autograd.grad((used * weights).sum(), tensors)


@pytest.fixture
def plain_flash(monkeypatch):
    """Puts the plain primitive under the joining and the backward pass of `flash`."""
    monkeypatch.setattr(prefix_flash, "default_primitive", PlainVarlen)


def relative_error(found, truth):
    return float((found.double().cpu() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("groups", "length"), LAYOUTS)
@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_a_packed_row_equals_rows_apart_with_gradients(name, groups, length, plain_flash):
    q, k, v = inputs(length)
    size = sum(prompt + sum(completions) for prompt, completions in groups)
    layout = PrefixLayout.make(groups, length)
    out = prefix_attention(q, k, v, layout, implementation=name)
    assert torch.isfinite(out).all()
    truth = rows_apart(q, k, v, groups)
    torch.testing.assert_close(out[:, :, :size], truth, rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(out, (q, k, v), size), gradients(truth, (q, k, v), size), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("groups", "length"), LAYOUTS)
def test_flex_follows_the_layout(groups, length):
    q, k, v = (tensor.detach() for tensor in inputs(length))  # on the CPU it has no backward pass
    layout = PrefixLayout.make(groups, length)
    found = prefix_attention(q, k, v, layout, implementation="flex")
    truth = prefix_attention(q, k, v, layout, implementation="sdpa")
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_the_scale_is_the_given_one(plain_flash):
    groups, layout = LAYOUTS[1][0], PrefixLayout.make(*LAYOUTS[1])
    q, k, v = inputs(layout.length)
    truth = rows_apart(q, k, v, groups, scale=0.7)
    for name in ("sdpa", "flash"):
        found = prefix_attention(q, k, v, layout, scale=0.7, implementation=name)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "length"), LAYOUTS[1:4])
def test_the_own_backward_pass_is_the_derivative(groups, length, plain_flash):
    layout = PrefixLayout.make(groups, length)
    q, k, v = inputs(length, heads=2, kv_heads=1, head_dim=2)
    assert torch.autograd.gradcheck(
        lambda *tensors: prefix_attention(*tensors, layout, scale=0.6, implementation="flash"), (q, k, v)
    )


@pytest.mark.parametrize(("groups", "length"), LAYOUTS[2:])
def test_the_flash_operator_is_well_behaved(groups, length, plain_flash):
    layout = PrefixLayout.make(groups, length)
    tensors = [tensor.detach()[0].transpose(0, 1).requires_grad_() for tensor in inputs(length)]
    torch.library.opcheck(prefix_flash.joined_attention, (*tensors, *layout.flash_spans, True, 0.6))


def test_large_scores_join_without_overflow(plain_flash):
    layout = PrefixLayout.make(*LAYOUTS[2])
    q, k, v = (tensor.detach() * 60 for tensor in inputs(layout.length))
    out = prefix_attention(q, k, v, layout, scale=1.0, implementation="flash")
    torch.testing.assert_close(out, prefix_attention(q, k, v, layout, scale=1.0, implementation="sdpa"))


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (3, 10)])
@pytest.mark.parametrize("no_keys", [float("inf"), float("-inf")])
def test_joining_in_triton_is_joining_in_fp64(heads, head_dim, no_keys):
    pytest.importorskip("triton")
    from mrpo.kernels.prefix_join_triton import join_in_place

    device = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
    generator = torch.Generator().manual_seed(0)
    own, prefix = (torch.randn(9, heads, head_dim, generator=generator) for _ in range(2))
    own_lse, prefix_lse = (torch.randn(heads, 9, generator=generator) * 30 for _ in range(2))
    has_prefix = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    prefix_lse[:, ~has_prefix], prefix[~has_prefix] = no_keys, float("nan")
    first, second = own_lse.double().exp(), torch.where(has_prefix, prefix_lse, -torch.inf).double().exp()
    share = (second / (first + second)).t()[..., None]
    truth = (1 - share) * own.double() + share * prefix.double().nan_to_num()
    found, lse = join_in_place(*(t.clone().to(device) for t in (own, own_lse, prefix, prefix_lse, has_prefix)))
    torch.testing.assert_close(found.cpu(), truth.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.cpu(), (first + second).log().float(), rtol=1e-5, atol=1e-5)


def test_padding_and_other_groups_are_not_seen():
    layout = PrefixLayout.make(*LAYOUTS[2])
    q, k, v = (tensor.detach() for tensor in inputs(layout.length))
    before = prefix_attention(q, k, v, layout)
    second_group, padding = slice(9, 11), slice(26, 32)
    for part in (second_group, padding):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, part], v2[:, :, part] = 100.0, -100.0
        changed = (prefix_attention(q, k2, v2, layout) != before).any(-1).any(1)[0].nonzero().flatten().tolist()
        assert changed == list(range(layout.length))[part]


group = st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5))


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(group, min_size=1, max_size=4), spare=st.integers(0, 20), block=st.sampled_from([4, 16, 128]))
def test_the_tiles_of_the_block_mask_are_those_of_the_dense_mask(groups, spare, block):
    size = sum(prompt + sum(completions) for prompt, completions in groups)
    layout = PrefixLayout.make(groups, size + spare)
    mask, tiles = layout.mask, layout.block_mask(block)
    blocks = -(-layout.length // block)
    spread = torch.zeros(blocks * block, blocks * block, dtype=torch.bool)
    spread[: layout.length, : layout.length] = mask
    counts = spread.view(blocks, block, blocks, block).sum((1, 3))

    def listed(number, places):
        found = torch.zeros(blocks, blocks, dtype=torch.bool)
        for row in range(blocks):
            found[row, places[0, 0, row, : number[0, 0, row]]] = True
        return found

    full = listed(tiles.full_kv_num_blocks, tiles.full_kv_indices)
    partial = listed(tiles.kv_num_blocks, tiles.kv_indices)
    assert torch.equal(full | partial, counts > 0)
    assert torch.equal(full, counts == block * block)
    assert not (full & partial).any()
    rows, columns = torch.meshgrid(torch.arange(layout.length), torch.arange(layout.length), indexing="ij")
    assert torch.equal(tiles.mask_mod(0, 0, rows, columns), mask)
    assert mask.diagonal().all()  # no token without a key: no NaN


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(group, min_size=1, max_size=4), spare=st.integers(0, 20))
def test_spans_cover_every_visible_pair_once(groups, spare):
    size = sum(prompt + sum(completions) for prompt, completions in groups)
    layout = PrefixLayout.make(groups, size + spare)
    count = torch.zeros(layout.length, layout.length, dtype=torch.int64)
    for rows, columns in span_pairs(layout.own_spans):
        count[rows, columns] += torch.ones(
            rows.stop - rows.start, columns.stop - columns.start, dtype=torch.int64
        ).tril()
    if layout.prefix_spans is not None:
        for rows, columns in span_pairs(layout.prefix_spans):
            count[rows, columns] += 1
        assert layout.prefix_spans.queries[-1] == layout.prefix_spans.keys[-1] == layout.length
    assert torch.equal(count, layout.mask.long())


@pytest.mark.parametrize(
    ("groups", "length", "message"),
    [
        ([(0, [1])], 8, "group 0: a prompt must have at least one token, not 0"),
        ([(2, [1]), (3, [2, -1])], 16, "group 1: completion lengths"),
        ([(4, [3, 2])], 8, "groups of 9 tokens do not fit a row of 8"),
    ],
)
def test_impossible_layouts_are_refused(groups, length, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.make(groups, length)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[:, :, :-1], k, v), ValueError, "q has 9 tokens, its layout 10"),
        (lambda q, k, v: (q, k[:, :, 1:], v), ValueError, "k must have shape"),
        (lambda q, k, v: (q, k, v.float()), TypeError, "v must have dtype"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "3 query heads cannot share 2 key-value heads"),
        (lambda q, k, v: (q.repeat(2, 1, 1, 1), k, v), ValueError, "q must have shape"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    layout = PrefixLayout.make(*LAYOUTS[1])
    with pytest.raises(error, match=message):
        prefix_attention(*change(*inputs(layout.length)), layout)


def test_an_unknown_implementation_is_refused():
    layout = PrefixLayout.make(*LAYOUTS[1])
    with pytest.raises(ValueError, match="one of sdpa, flex, flash, not 'fast'"):
        prefix_attention(*inputs(layout.length), layout, implementation="fast")


def test_the_cpu_takes_sdpa():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert choose_attention(torch.device("cpu"), 128, dtype) == "sdpa"
    assert choose_attention(torch.device("cuda"), 128, torch.float64) == "sdpa"


def test_compiled_graphs_are_counted():
    before = compilations()
    torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(3))
    assert compilations() == before + 1


GPU_LAYOUTS = [
    ([(846, [200] * 8), (846, [200, 17, 1, 0, 133, 200, 90, 64])], 5248),
    ([(300, [100, 7]), (1, [1]), (640, [512] * 4)], 3200),
]


def test_new_lengths_need_no_new_graph_of_flex():
    torch._dynamo.reset()
    run = torch.compile(flex_attention, dynamic=True, backend="eager")
    counts = []
    for groups, length in [
        ([(70, [40] * 4)], 256),
        ([(9, [60] * 4), (50, [9])], 512),
        ([(3, [2])], 384),
        GPU_LAYOUTS[1],
    ]:
        q, k, v = (tensor.detach().float() for tensor in inputs(length))
        mask = PrefixLayout.make(groups, length).block_mask()
        run(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
        counts.append(compilations())
    assert counts[1] == counts[-1]
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "length"), GPU_LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("name", "dtype"), [("flash", torch.bfloat16), ("flex", torch.bfloat16), ("flex", torch.float32)]
)
def test_on_a_gpu_errors_are_those_of_sdpa_in_the_same_precision(name, dtype, head_dim, groups, length):
    size = sum(prompt + sum(completions) for prompt, completions in groups)
    options = {"device": "cuda", "heads": 8, "kv_heads": 2, "head_dim": head_dim}
    layout = PrefixLayout.make(groups, length, "cuda")

    def results(implementation, dtype):
        # The same rounded numbers in every precision.
        tensors = [t.detach().to(dtype).requires_grad_() for t in inputs(length, dtype=torch.bfloat16, **options)]
        out = prefix_attention(*tensors, layout, implementation=implementation)
        assert torch.isfinite(out).all()
        return [out[:, :, :size], *gradients(out, tensors, size)]

    truth = [tensor.double().cpu() for tensor in results("sdpa", torch.float64)]
    plain, found = results("sdpa", dtype), results(name, dtype)
    floor = 1e-3 if dtype == torch.float32 else 0.0  # FlexAttention's fp32 products may run in TF32
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + floor


@pytest.mark.gpu
@pytest.mark.parametrize("primitive", [TorchFlash, FlashAttnPackage])
def test_a_flash_primitive_keeps_its_contract_for_empty_stretches(primitive):
    if primitive is FlashAttnPackage:
        pytest.importorskip("flash_attn")
    kernel = primitive()
    q, k, v = (t.detach()[0].transpose(0, 1) for t in inputs(300, dtype=torch.bfloat16, device="cuda", head_dim=64))
    spans = Spans.make([(100, 0), (150, 100), (0, 200), (50, 0)], torch.device("cuda"))
    out, lse = kernel.forward(q, k, v, spans, causal=False, scale=0.125)
    assert lse.shape == (4, 300)
    assert lse.dtype == torch.float32
    assert not out[:100].any()
    assert not out[250:].any()
    gradients = kernel.backward(torch.ones_like(out), q, k, v, out, lse, spans, causal=False, scale=0.125)
    plain = PlainVarlen()
    exact = [t.double().cpu() for t in (q, k, v)]
    near = Spans.make([(100, 0), (150, 100), (0, 200), (50, 0)], torch.device("cpu"))
    true_out, true_lse = plain.forward(*exact, near, causal=False, scale=0.125)
    assert relative_error(out, true_out) < 1e-2
    torch.testing.assert_close(lse[:, 100:250].double().cpu(), true_lse[:, 100:250], rtol=1e-3, atol=1e-3)
    truths = plain.backward(torch.ones_like(true_out), *exact, true_out, true_lse, near, causal=False, scale=0.125)
    for found, truth in zip(gradients, truths, strict=True):
        assert torch.isfinite(found).all()
        assert relative_error(found, truth) < 2e-2
    assert not gradients[0][:100].any()
    assert not gradients[1][100:].any()
    assert not gradients[2][100:].any()


@pytest.mark.gpu
def test_flex_compiles_no_more_for_new_lengths():
    def step(groups, length):
        layout = PrefixLayout.make(groups, length, "cuda")
        q, k, v = inputs(length, dtype=torch.bfloat16, device="cuda", head_dim=64)
        prefix_attention(q, k, v, layout, implementation="flex").sum().backward()

    step([(100, [30] * 4)], 256)
    step([(100, [60] * 4), (50, [9])], 512)
    before = compilations()
    for length in (384, 640, 768, 1152):
        step([(length // 2, [20] * 3), (30, [length // 8])], length)
    assert compilations() == before
