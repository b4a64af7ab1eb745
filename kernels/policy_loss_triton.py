"""The row kernel in Triton, for every GPU: one program a row, everything computed in fp32.

A program reads its row of V logits of s bytes block by block and keeps, in every lane of a block, a running maximum and
sum of exponentials (and of exponentials times logits, for the entropy); lanes are joined once, at the end. So a column
costs one exponential and no reduction. A second pass writes the gradient, last columns first, while they are still in
the cache. Bytes for N rows: 2sNV read and sNV written, sNV read without a gradient, no array beside the gradient.
FLOPs: about 8NV forward and 4NV backward; memory is the bound.

The target's column is kept out of the sum: for a confident policy 1 - p(target) would otherwise be a difference of
nearly equal numbers, and it is the whole gradient. Launch shapes are fixed rather than tuned by timing: the shape sets
the order of the sums, and two runs must give the same bits.

Rows are fastest when they begin at multiples of 16 bytes: pad the leading dimension, not the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .records import LossConfig, RowInputs, RowOutputs, SegmentedAdvantages

_LOWEST = tl.constexpr(-1e30)  # a maximum to start from: -inf - -inf would be NaN
_FAR = tl.constexpr(200.0)  # 2^-200 is 0 in fp32, and times a number that is no infinity it stays 0
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

_BLOCK = 4096
_SCALE_PROGRAMS = 1024  # enough to fill a GPU, few enough to return at once


@triton.jit
def _accumulate(x, largest, total, moment, log2_scale, WITH_ENTROPY: tl.constexpr):
    """Adds a block to every lane's maximum, sum of 2^z and sum of z 2^z, z = (x - maximum) * log2_scale."""
    larger = x > largest
    distance = tl.abs(x - largest) * log2_scale
    distance = tl.where(distance > _FAR, _FAR, distance)
    power = tl.exp2(-distance)
    if WITH_ENTROPY:
        moment = tl.where(larger, (moment - total * distance) * power, moment - distance * power)
    total = tl.where(larger, total * power + 1.0, total + power)
    return tl.where(larger, x, largest), total, moment


@triton.jit
def _log1p(y):
    """log(1 + y) for y >= 0, to a relative error of 1e-6 where 1 + y would round y away."""
    series = y * (1.0 - y * (1 / 2 - y * (1 / 3 - y * (1 / 4 - y * (1 / 5 - y * (1 / 6 - y * (1 / 7 - y / 8)))))))
    return tl.where(y < 0.1, series, tl.log(1.0 + y))


@triton.jit
def _expm1(y):
    series = y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y / 5040))))))
    return tl.where(tl.abs(y) < 0.5, series, tl.exp(y) - 1.0)


@triton.jit
def _advantage(advantages, segment_ends, tokens, num_segments, row):
    """Of one row: its own, or that of the first segment whose end lies beyond its token."""
    if segment_ends is None:
        place = row
    else:
        token = row if tokens is None else tl.load(tokens + row)
        place = token * 0
        last = place + num_segments - 1
        while place < last:
            middle = (place + last) // 2
            beyond = tl.load(segment_ends + middle) <= token
            place = tl.where(beyond, middle + 1, place)
            last = tl.where(beyond, last, middle)
    return tl.load(advantages + place)


@triton.jit
def _softmax_statistics(x_row, vocab, target, log2_scale, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum, sum of 2^z over every column but the target's, sum of z 2^z over all, and z of the target."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(x_row + start + lanes).to(tl.float32)
        x = tl.where(start + lanes == target, float("-inf"), x)
        largest, total, moment = _accumulate(x, largest, total, moment, log2_scale, WITH_ENTROPY)
    x = tl.load(x_row + whole + lanes, mask=whole + lanes < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(whole + lanes == target, float("-inf"), x)
    largest, total, moment = _accumulate(x, largest, total, moment, log2_scale, WITH_ENTROPY)

    x_target = tl.load(x_row + target).to(tl.float32)
    others_max = tl.max(largest, 0)
    peak = tl.where(x_target > others_max, x_target, others_max)
    shift = (peak - largest) * log2_scale
    shift = tl.where(shift > _FAR, _FAR, shift)
    others = tl.sum(total * tl.exp2(-shift), 0)
    others = tl.where(peak < float("inf"), others, float("nan"))
    target_z = (x_target - peak) * log2_scale
    if WITH_ENTROPY:
        near = tl.where(target_z < -_FAR, -_FAR, target_z)
        moments = tl.sum((moment - total * shift) * tl.exp2(-shift), 0) + near * tl.exp2(near)
    else:
        moments = 0.0
    return peak, others, moments, target_z


@triton.jit
def _token_loss(logprob, advantage, old, ref, sampler, row, epsilon_low, epsilon_high, beta, importance_cap):
    """Loss, its derivative by the log-probability, KL and whether the clip cut, as csrc/policy_loss.h has them."""
    old_logprob = logprob if old is None else tl.load(old + row)
    ratio = tl.exp(logprob - old_logprob)
    bound = tl.where(advantage > 0.0, 1.0 + epsilon_high, 1.0 - epsilon_low)
    idle = advantage == 0.0  # a ratio that overflows must not meet a zero
    clipped = tl.where(advantage > 0.0, ratio > bound, ratio < bound) & (advantage != 0.0)
    scaled = advantage
    if sampler is not None:
        importance = tl.exp(old_logprob - tl.load(sampler + row))
        scaled = advantage * tl.where(importance > importance_cap, importance_cap, importance)
    loss = tl.where(idle, 0.0, -scaled * tl.where(clipped, bound, ratio))
    slope = tl.where(idle | clipped, 0.0, -scaled * ratio)
    kl = 0.0
    if ref is not None:
        d = tl.load(ref + row) - logprob
        growth = _expm1(d)
        kl = growth - d
        if beta != 0.0:
            loss += beta * kl
            slope -= beta * growth
    return loss, slope, kl, clipped


@triton.jit
def _write_gradient(x_row, dx_row, vocab, target, peak, factor, at_target, log2_scale, BLOCK: tl.constexpr):
    """factor 2^z in every column, `at_target` in the target's; z as in the statistics."""
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    x = tl.load(x_row + whole + lanes, mask=whole + lanes < vocab, other=0.0).to(tl.float32)
    dx = tl.where(whole + lanes == target, at_target, tl.exp2((x - peak) * log2_scale) * factor)
    tl.store(dx_row + whole + lanes, dx.to(dx_row.dtype.element_ty), mask=whole + lanes < vocab)
    for done in range(0, whole, BLOCK):
        columns = whole - BLOCK - done + lanes
        x = tl.load(x_row + columns).to(tl.float32)
        dx = tl.where(columns == target, at_target, tl.exp2((x - peak) * log2_scale) * factor)
        tl.store(dx_row + columns, dx.to(dx_row.dtype.element_ty))


@triton.jit
def _write_zeros(dx_row, vocab, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], dx_row.dtype.element_ty)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(dx_row + start + lanes, zeros)
    tl.store(dx_row + whole + lanes, zeros, mask=whole + lanes < vocab)


@triton.jit(do_not_specialize=["num_segments"])
def _loss_row_kernel(
    logits,  # [N, V], rows `logits_stride` elements apart
    dlogits,  # [N, V], may be `logits`; or None
    logits_stride,
    dlogits_stride,
    vocab,
    targets,  # [N] int64
    weights,  # [N]
    advantages,  # [N], or [num_segments]
    segment_ends,  # [num_segments] int64, or None
    tokens,  # [N] int64, or None
    num_segments,
    old_logprobs,  # [N] or None, as the next two
    ref_logprobs,
    sampler_logprobs,
    losses,  # [N], as the next four; entropy may be None
    logprobs,
    kl,
    clipped,
    entropy,
    epsilon_low,
    epsilon_high,
    beta,
    inverse_temperature,
    importance_cap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # before any product: rows times columns may exceed 32 bits
    weight = tl.load(weights + row)
    if weight == 0.0:  # nothing of the row is read, whatever it holds
        tl.store(losses + row, 0.0)
        tl.store(logprobs + row, 0.0)
        tl.store(kl + row, 0.0)
        tl.store(clipped + row, False)
        if entropy is not None:
            tl.store(entropy + row, 0.0)
        if dlogits is not None:
            _write_zeros(dlogits + row * dlogits_stride, vocab, BLOCK)
        return

    x_row = logits + row * logits_stride
    target = tl.load(targets + row).to(tl.int32)
    log2_scale = inverse_temperature * _LOG2E
    peak, others, moments, target_z = _softmax_statistics(x_row, vocab, target, log2_scale, entropy is not None, BLOCK)
    total = others + tl.exp2(target_z)
    # Both from the same rounded numbers: the log-probability cannot exceed 0.
    logprob = tl.where(target_z == 0.0, -_log1p(others), target_z * _LN2 - tl.log(total))
    advantage = _advantage(advantages, segment_ends, tokens, num_segments, row)
    loss, slope, distance, cut = _token_loss(
        logprob,
        advantage,
        old_logprobs,
        ref_logprobs,
        sampler_logprobs,
        row,
        epsilon_low,
        epsilon_high,
        beta,
        importance_cap,
    )
    tl.store(losses + row, weight * loss)
    tl.store(logprobs + row, logprob)
    tl.store(kl + row, distance)
    tl.store(clipped + row, cut)
    if entropy is not None:
        tl.store(entropy + row, tl.log(total) - _LN2 * moments / total)
    if dlogits is not None:
        dx_row = dlogits + row * dlogits_stride
        coefficient = weight * slope * inverse_temperature
        if coefficient == 0.0:  # clipped, or no advantage: nothing to learn, nothing to read
            _write_zeros(dx_row, vocab, BLOCK)
        else:
            factor, at_target = -coefficient / total, coefficient * (others / total)
            _write_gradient(x_row, dx_row, vocab, target, peak, factor, at_target, log2_scale, BLOCK)


@triton.jit
def _scale_kernel(x, stride, width, blocks_per_row, blocks, factor, BLOCK: tl.constexpr):
    """Rows of `width` columns times a scalar that lies on the device; nothing is touched if that is 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row = (block // blocks_per_row).to(tl.int64)
            columns = (block % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            pointers = x + row * stride + columns
            values = tl.load(pointers, mask=columns < width).to(tl.float32) * scale
            tl.store(pointers, values.to(x.dtype.element_ty), mask=columns < width)


def run_triton(logits: torch.Tensor, inputs: RowInputs, config: LossConfig, outputs: RowOutputs) -> None:
    """Fills `outputs` from logits [N, V] with contiguous rows and fp32 `inputs`, on a CUDA device or interpreted."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    advantages, dlogits = inputs.advantages, outputs.dlogits
    segments = advantages if isinstance(advantages, SegmentedAdvantages) else None
    block, num_warps = _launch_shape(vocab)
    with torch.cuda.device_of(logits):
        _loss_row_kernel[(rows,)](
            logits,
            dlogits,
            logits.stride(0),
            0 if dlogits is None else dlogits.stride(0),
            vocab,
            inputs.targets,
            inputs.weights,
            advantages if segments is None else segments.values,
            None if segments is None else segments.ends,
            None if segments is None else segments.tokens,
            0 if segments is None else len(segments.ends),
            inputs.old_logprobs,
            inputs.ref_logprobs,
            inputs.sampler_logprobs,
            outputs.losses,
            outputs.logprobs,
            outputs.kl,
            outputs.clipped,
            outputs.entropy,
            config.epsilon_low,
            config.epsilon_high,
            config.beta,
            1.0 / config.temperature,
            config.importance_cap,
            BLOCK=block,
            num_warps=num_warps,
        )


def scale_unless_one(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`tensor` times the scalar `factor`, [], in place; a kernel that only looks at the factor if that is 1."""
    if tensor.is_contiguous():
        rows, width, stride = 1, tensor.numel(), 0
    else:
        (rows, width), (stride, _) = tensor.shape, tensor.stride()
    blocks_per_row = triton.cdiv(width, _BLOCK)
    blocks = rows * blocks_per_row
    if blocks > 0:
        with torch.cuda.device_of(tensor):
            programs = min(blocks, _SCALE_PROGRAMS)
            _scale_kernel[(programs,)](tensor, stride, width, blocks_per_row, blocks, factor, BLOCK=_BLOCK, num_warps=8)
    return tensor


def _launch_shape(vocab: int) -> tuple[int, int]:
    """Columns of a block and warps of a program: 16 columns a thread, two 16-byte loads of bf16 in flight."""
    if triton.knobs.runtime.interpret:  # several blocks and a tail even for the small vocabularies of tests
        return min(triton.next_power_of_2(max(vocab // 8, 8)), _BLOCK), 1
    block = min(max(triton.next_power_of_2(vocab), 512), _BLOCK)
    return block, block // 512
