"""What only a GPU can show: half precision at real sizes, 64-bit offsets, no waiting for the device.

Under compute-sanitizer, which a GPU's kernels pass without a word (a process of PyTorch holds more than a few bytes, so
leaks are not asked for):

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -m gpu -k sanitizer tests/kernels
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m pytest -m gpu -k sanitizer tests/kernels
"""

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
from mrpo.kernels.dispatch import extension, implementation_of, use
from mrpo.kernels.policy_loss_cuda import run_cuda
from mrpo.kernels.records import LossConfig, RowInputs, RowOutputs

pytestmark = pytest.mark.gpu

needs_cuda_part = pytest.mark.skipif(
    not getattr(extension(), "cuda_architectures", ()), reason="mrpo._C has no CUDA part"
)
CUDA = pytest.param("cuda", marks=needs_cuda_part)
each_kernel = pytest.mark.parametrize("kernel", [CUDA, "triton"])

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


def on_gpu(case: Case, kernel: str, **options: Any) -> tuple[PolicyLoss, torch.Tensor]:
    """The loss and the gradient of the logits, on the GPU."""
    logits = case.logits.detach().clone().requires_grad_()
    with use(kernel):
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


def test_the_cuda_kernel_is_the_default_where_there_are_clusters() -> None:
    clusters = torch.cuda.get_device_capability() >= (9, 0) and bool(getattr(extension(), "cuda_architectures", ()))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        chosen = implementation_of("policy_loss", torch.device("cuda", 0), dtype)
        assert chosen == ("cuda" if clusters else "triton")


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [*VOCABULARIES, 997])
def test_half_precision_is_at_most_twice_as_far_from_fp64_as_eager(kernel: str, vocab: int, dtype: torch.dtype) -> None:
    case = random_case(48, vocab, seed=vocab)
    case = replace(case, logits=case.logits.to(dtype), weights=torch.rand(48)).to("cuda")
    truth, true_gradient = run(case.to("cpu"), "reference", torch.float64, **OPTIONS)
    result, gradient = on_gpu(case, kernel)
    eager_logprobs, eager_gradient = eager(case)
    assert gradient.dtype == dtype
    ours, theirs = (relative_error(g.cpu(), true_gradient) for g in (gradient, eager_gradient))
    assert ours <= 2 * theirs
    ours, theirs = (relative_error(x.cpu(), truth.logprobs) for x in (result.logprobs, eager_logprobs))
    assert ours <= 2 * theirs
    assert ours < 1e-5


@each_kernel
@pytest.mark.parametrize("vocab", [*VOCABULARIES, 1, 997, 32_003, 400_009])
def test_fp32_is_within_1e5_of_fp64(kernel: str, vocab: int) -> None:
    case = random_case(24, vocab, seed=vocab)
    truth, true_gradient = run(case, "reference", torch.float64, with_entropy=True, **OPTIONS)
    result, gradient = on_gpu(case.to("cuda"), kernel, with_entropy=True)
    torch.testing.assert_close(result.logprobs.cpu().double(), truth.logprobs, rtol=1e-5, atol=1e-6)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy.cpu().double(), truth.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.clipped.cpu(), truth.clipped)
    if vocab > 1:
        assert relative_error(gradient.cpu(), true_gradient) < 1e-5


@needs_cuda_part
@pytest.mark.parametrize("cluster", [None, (0, 0, 0), (4, 8, 13), (8, 4, 24), (8, 8, 13), (8, 12, 8)], ids=str)
@pytest.mark.parametrize("vocab", [151_936, 151_674])
def test_every_layout_of_clusters_gives_the_same_numbers(vocab: int, cluster: tuple[int, int, int] | None) -> None:
    """More rows than clusters run at once, some of weight 0."""
    case = random_case(300, vocab)
    weights = case.weights.masked_fill(torch.arange(300) % 7 == 3, 0.0)
    case = replace(case, logits=case.logits.bfloat16(), weights=weights).to("cuda")
    expected, expected_gradient = on_gpu(case, "triton")
    inputs = RowInputs(case.targets, **case.others)

    def poisoned(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((300,), 1 if dtype == torch.bool else torch.nan, dtype=dtype, device="cuda")

    dlogits = torch.full_like(case.logits, torch.nan)
    outputs = RowOutputs(poisoned(), poisoned(), poisoned(torch.bool), poisoned(), poisoned(), dlogits)
    if cluster is not None and cluster[0] and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no clusters")
    run_cuda(case.logits, inputs, LossConfig(**OPTIONS), outputs, cluster=cluster)
    torch.testing.assert_close(outputs.logprobs, expected.logprobs, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs.clipped, expected.clipped)
    assert relative_error(dlogits, expected_gradient.double()) < 2**-8
    assert not dlogits[weights.cuda() == 0].any()


@needs_cuda_part
@pytest.mark.parametrize("gradient", ["none", "new", "inplace"])
@pytest.mark.parametrize(("rows", "vocab"), [(40, 9001), (3, 70_003), (5, 3)])
def test_sanitizer(rows: int, vocab: int, gradient: str) -> None:
    """Small enough for compute-sanitizer, with clusters of one and of several blocks, and the plain kernel."""
    case = random_case(rows, vocab)
    case = replace(case, logits=case.logits.bfloat16()).to("cuda")
    inputs, size = RowInputs(case.targets, **case.others), (rows,)
    for cluster in (None, (0, 0, 0)):
        logits = case.logits.clone()
        dlogits = {"none": None, "new": torch.empty_like(logits), "inplace": logits}[gradient]
        floats = [torch.empty(size, device="cuda") for _ in range(4)]
        clipped = torch.empty(size, dtype=torch.bool, device="cuda")
        outputs = RowOutputs(floats[0], floats[1], clipped, floats[2], floats[3], dlogits)
        run_cuda(logits, inputs, LossConfig(**OPTIONS), outputs, cluster=cluster)
        torch.cuda.synchronize()
        assert outputs.losses.isfinite().all()


@each_kernel
def test_more_than_2_to_the_31_logits(kernel: str) -> None:
    rows, vocab = 14_500, 151_936
    last = random_case(3, vocab)
    last = replace(last, logits=last.logits.bfloat16())
    expected, expected_gradient = on_gpu(last.to("cuda"), kernel)
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
    with use(kernel):
        result = policy_loss(buffer, case.targets, **case.others, **OPTIONS, inplace=True)
    assert torch.equal(result.logprobs[-3:], expected.logprobs)
    assert torch.equal(buffer[-3:], expected_gradient)
    assert not buffer[:-3].any()


@each_kernel
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_two_runs_give_the_same_bits(kernel: str, vocab: int) -> None:
    case = random_case(300, vocab)
    case = replace(case, logits=case.logits.bfloat16()).to("cuda")
    first, first_gradient = on_gpu(case, kernel, with_entropy=True)
    for _ in range(10):
        result, gradient = on_gpu(case, kernel, with_entropy=True)
        assert torch.equal(gradient, first_gradient)
        for name, value in vars(first).items():
            assert torch.equal(getattr(result, name), value), name


@each_kernel
def test_padded_rows_keep_their_padding(kernel: str) -> None:
    case = random_case(16, 151_674)
    case = replace(case, logits=case.logits.bfloat16()).to("cuda")
    expected, expected_gradient = on_gpu(case, kernel)
    padded = torch.full((16, 151_680), 7.0, dtype=torch.bfloat16, device="cuda", requires_grad=True) * 1.0
    logits = padded[:, :151_674]
    logits.data.copy_(case.logits)
    with use(kernel):
        result = policy_loss(logits, case.targets, **case.others, **OPTIONS, inplace=True)
    if kernel == "triton":  # elsewhere the alignment of a row decides which columns are summed together
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(logits, expected_gradient)
    torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=1e-5, atol=1e-6)
    assert relative_error(logits, expected_gradient.double()) < 2**-8
    assert (padded[:, 151_674:] == 7.0).all()


@each_kernel
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_waits_for_the_device(kernel: str, inplace: bool) -> None:
    case = random_case(32, 997)
    ends = torch.tensor([8, 20, 32])
    case = replace(case, advantages=SegmentedAdvantages(ends, torch.tensor([1.0, -1.0, 0.5]))).to("cuda")
    upstream = torch.tensor(-3.0, device="cuda")
    _, plain = on_gpu(case, kernel)
    leaf = case.logits.clone().requires_grad_()
    with use(kernel), no_waiting():
        loss = policy_loss(leaf * 1.0, case.targets, **case.others, **OPTIONS, inplace=inplace).loss
        loss.backward(upstream, retain_graph=True)  # scaled out of place
        loss.backward(upstream)  # scaled in place
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * -3.0 * plain)


def test_values_on_the_device_are_checked_on_request() -> None:
    case = replace(random_case(3, 6), targets=torch.tensor([5, 0, 6])).to("cuda")
    with check_values(), pytest.raises(ValueError, match=r"targets\[2\] is 6"):
        policy_loss(**vars(case))
