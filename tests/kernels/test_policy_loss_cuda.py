"""The CUDA kernels' own source, compiled for the CPU over an emulation of what it needs of a GPU.

See cuda_emulation/cuda_primitives.cuh: threads take turns in random order and copies are made late, so that a missing
wait or fence shows. What a GPU alone can show is in test_policy_loss_gpu.py.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_rows import DTYPES, assert_close, compiled, exact, full_case, poisoned, rounding, strided
from loss_cases import Case, random_case, relative_error

from mrpo.kernels import SegmentedAdvantages
from mrpo.kernels.dispatch import extension, implementation_of, use
from mrpo.kernels.policy_loss_cpp import kernel_arguments
from mrpo.kernels.records import LossConfig, RowInputs, RowOutputs


@dataclass(frozen=True)
class Shape:
    """How the emulated GPU runs a kernel. blocks: of a cluster, 0 for the plain kernel. warps: of a block, without the
    cluster kernel's last. spare: slots of a ring beyond those it needs. clusters: persistent ones."""

    blocks: int
    warps: int
    spare: int = 0
    clusters: int = 1


PLAIN = Shape(0, 3)
CLUSTERS = [Shape(1, 1, 0, 2), Shape(2, 1, 1), Shape(4, 2, 3, 2)]


def run(
    kernels: ModuleType,
    case: Case,
    config: LossConfig,
    shape: Shape,
    *,
    gradient: str = "new",
    entropy: bool = False,
    seed: int = 0,
    haste: float = 0.1,
) -> RowOutputs:
    """Everything the kernel writes, in memory that held NaN or nonsense before."""
    outputs = poisoned(case.logits, gradient, entropy)
    inputs = RowInputs(case.targets, **case.others)
    call(kernels, case.logits, inputs, config, outputs, shape, seed=seed, haste=haste)
    return outputs


def call(
    kernels: ModuleType,
    logits: torch.Tensor,
    inputs: RowInputs,
    config: LossConfig,
    outputs: RowOutputs,
    shape: Shape,
    **schedule: Any,
) -> None:
    row_bytes = logits.shape[1] * logits.element_size()
    slots = kernels.needed_slots(row_bytes, shape.blocks, shape.warps) + shape.spare if shape.blocks else 0
    kernels.run_kernel(
        dtype=str(logits.dtype).removeprefix("torch."),
        blocks=shape.blocks,
        warps=shape.warps,
        slots=slots,
        clusters=shape.clusters,
        **schedule,
        **kernel_arguments(logits, inputs, config, outputs),
    )


OPTIONS = [
    LossConfig(),
    LossConfig(epsilon_low=0.1, epsilon_high=0.3, beta=0.04, temperature=0.7),
    LossConfig(beta=1.0, temperature=1.5, importance_cap=1.2),
]


@pytest.mark.parametrize("config", OPTIONS, ids=["plain", "temperature", "kl"])
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 257, 1024, 4999])
@pytest.mark.parametrize("shape", [PLAIN, *CLUSTERS], ids=str)
def test_fp32_is_within_1e5_of_fp64(kernels: ModuleType, shape: Shape, vocab: int, config: LossConfig) -> None:
    case = full_case(9, vocab, torch.float32, seed=vocab)
    found = run(kernels, case, config, shape, entropy=True, seed=vocab)
    assert_close(found, exact(case, config), 1e-5)


@pytest.mark.parametrize("gradient", ["none", "new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "offset", "padding"), [(6007, 3, 0), (8192, 0, 8), (4099, 1, 6), (5, 1, 0)])
@pytest.mark.parametrize("shape", [PLAIN, *CLUSTERS], ids=str)
def test_rows_of_any_alignment(
    kernels: ModuleType, shape: Shape, vocab: int, offset: int, padding: int, dtype: torch.dtype, gradient: str
) -> None:
    case = full_case(7, vocab, dtype, seed=vocab)
    case = replace(case, logits=strided(case.logits, offset, padding))
    memory = torch.as_strided(case.logits, (offset + 7 * (vocab + padding),), (1,), 0)
    before = memory.clone()
    truth = exact(case, OPTIONS[1])
    found = run(kernels, case, OPTIONS[1], shape, gradient=gradient, entropy=True, seed=vocab)
    assert_close(found, truth, rounding(dtype))
    if gradient == "inplace":
        memory[offset:].view(7, -1)[:, :vocab] = before[offset:].view(7, -1)[:, :vocab]
    assert torch.equal(memory, before)  # nobody's columns, before, between and behind the rows


@pytest.mark.parametrize("schedule", range(12))
def test_every_order_of_threads_and_copies_gives_the_same_bits(kernels: ModuleType, schedule: int) -> None:
    """More rows than clusters and than a ring holds, and chunks that do not come out even."""
    shape = Shape(2, 2, spare=schedule % 3, clusters=2)
    case = full_case(21, 9001, torch.bfloat16)
    haste = (0.0, 0.02, 0.3, 1.0)[schedule % 4]
    expected = run(kernels, replace(case, logits=case.logits.clone()), OPTIONS[1], shape, gradient="inplace")
    found = run(kernels, case, OPTIONS[1], shape, gradient="inplace", seed=schedule, haste=haste)
    assert expected.dlogits is not None
    assert found.dlogits is not None
    assert relative_error(expected.dlogits, exact(full_case(21, 9001, torch.bfloat16), OPTIONS[1]).dlogits) < 2**-8
    for name, value in vars(expected).items():
        assert value is None or torch.equal(getattr(found, name), value), name


@pytest.mark.parametrize("shape", [PLAIN, CLUSTERS[1]], ids=str)
@pytest.mark.parametrize("column", [0, 2, 8, 4095, 4096, 4098])
def test_the_target_may_be_anywhere(kernels: ModuleType, shape: Shape, column: int) -> None:
    """Of a confident policy, whose 1 - p of 1e-8 is below fp32's resolution at 1; rows are off a multiple of 16."""
    logits = torch.zeros(2, 4099)
    logits[:, column] = 27.0
    case = Case(strided(logits, 1, 0), torch.full((2,), column), torch.ones(2), torch.ones(2))
    truth = exact(case, LossConfig())
    found = run(kernels, case, LossConfig(), shape)
    assert relative_error(found.logprobs, truth.logprobs) < 1e-5
    assert relative_error(found.dlogits, truth.dlogits) < 1e-5


@pytest.mark.parametrize("shape", [PLAIN, *CLUSTERS], ids=str)
def test_huge_logits_forbidden_columns_and_ratios_that_overflow(kernels: ModuleType, shape: Shape) -> None:
    vocab = 3001
    case = random_case(12, vocab, spread=1.0)
    logits = case.logits + 1e4 * torch.randint(-1, 2, (12, vocab), generator=torch.Generator().manual_seed(1))
    forbidden = torch.arange(vocab) < 2500
    logits = logits.masked_fill(forbidden, -torch.inf)
    logits[3:6, 2500:] = torch.finfo(torch.float32).min  # forbidden in the way of a finite mask
    logits[3:6, 2999] = 0.0
    targets = case.targets.clamp(min=2500)
    targets[3:6] = 2999
    logits[6, :] = -torch.inf  # only the target is left
    logits[6, targets[6]] = -3.0
    old = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    old[9:] = torch.tensor([-1e5, -1e5, 1e5])
    case = replace(case, logits=logits, targets=targets, old_logprobs=old, ref_logprobs=None)
    case = replace(case, advantages=torch.tensor([1.0, -1.0] * 4 + [1.0, 2.0, 0.0, 1.0]))
    truth = exact(case, LossConfig())
    found = run(kernels, case, LossConfig(), shape, entropy=True)
    assert found.dlogits is not None
    assert not found.dlogits[:, :2500].any()
    assert found.dlogits.isfinite().all()
    torch.testing.assert_close(found.logprobs.double(), truth.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.clipped, truth.clipped)
    # A log-probability of 1e4 is known in fp32 to 1e-3, and so is its ratio.
    torch.testing.assert_close(found.losses.double(), truth.losses, rtol=5e-3, atol=1e-6)
    assert relative_error(found.dlogits, truth.dlogits) < 3e-3


@pytest.mark.parametrize("shape", [PLAIN, CLUSTERS[2]], ids=str)
@pytest.mark.parametrize("column", [0, 5, 2999])
def test_a_nan_logit_shows_in_its_row_alone(kernels: ModuleType, shape: Shape, column: int) -> None:
    case = random_case(4, 3000)
    case.logits[1, column] = torch.nan
    case.logits[2, column] = torch.inf
    found = run(kernels, case, LossConfig(), shape)
    assert found.dlogits is not None
    assert found.losses.isnan().tolist() == [False, True, True, False]
    assert found.dlogits.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [PLAIN, *CLUSTERS], ids=str)
@pytest.mark.parametrize("used", [0, 1, 40])
def test_rows_of_weight_zero_give_zero_whatever_they_hold(kernels: ModuleType, shape: Shape, used: int) -> None:
    case = random_case(45, 600)
    skipped = torch.arange(45) >= used
    case = replace(
        case,
        logits=case.logits.masked_fill(skipped[:, None], torch.nan),
        targets=case.targets.masked_fill(skipped, -100),
        weights=case.weights.masked_fill(skipped, 0.0),
        old_logprobs=case.old_logprobs.masked_fill(skipped, -torch.inf),
    )
    found = run(kernels, case, LossConfig(beta=0.1), shape, entropy=True)
    for value in vars(found).values():
        assert not value[skipped].any()
    if used:
        assert found.dlogits is not None
        assert found.dlogits[:used].any(1).all()
        assert found.dlogits.isfinite().all()


@pytest.mark.parametrize("shape", [PLAIN, *CLUSTERS], ids=str)
@pytest.mark.parametrize("column", [0, 9, 66])
def test_the_gradient_of_advantage_zero_is_zero_whatever_the_logits(
    kernels: ModuleType, shape: Shape, column: int
) -> None:
    case = random_case(4, 67)
    case = replace(case, advantages=torch.zeros(4), logits=strided(case.logits, 1, 0))
    case.logits[0, column], case.logits[1, column] = torch.nan, torch.inf
    found = run(kernels, case, LossConfig(), shape)
    assert found.dlogits is not None
    assert not found.dlogits.any()


def test_segments_find_the_advantage_of_taken_out_rows(kernels: ModuleType) -> None:
    case = random_case(20, 300)
    generator = torch.Generator().manual_seed(3)
    ends = torch.sort(torch.randint(0, 200, (33,), generator=generator)).values
    ends[-1] = 200
    tokens = torch.randint(0, 200, (20,), generator=generator)
    values = torch.randn(33, generator=generator)
    per_token = torch.stack([values[(ends <= token).sum()] for token in tokens])
    expected = run(kernels, replace(case, advantages=per_token), LossConfig(), CLUSTERS[1])
    found = run(kernels, replace(case, advantages=SegmentedAdvantages(ends, values, tokens)), LossConfig(), CLUSTERS[1])
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.dlogits, expected.dlogits)


def test_without_old_logprobs_the_ratio_is_one(kernels: ModuleType) -> None:
    case = replace(random_case(6, 300), old_logprobs=None, ref_logprobs=None)
    for shape in (PLAIN, CLUSTERS[1]):
        assert_close(run(kernels, case, LossConfig(), shape), exact(case, LossConfig()), 1e-5)


@pytest.mark.parametrize("shared_bytes", [101_376, 166_912, 232_448])  # of a block: consumer Blackwell, A100, Hopper
@pytest.mark.parametrize("row_bytes", [2, 994, 16_384, 2 * 32_000, 2 * 151_936, 4 * 151_936, 2 * 262_144, 2 * 900_000])
def test_the_chosen_shape_fits(kernels: ModuleType, row_bytes: int, shared_bytes: int) -> None:
    blocks, warps, slots = kernels.cluster_shape(row_bytes, shared_bytes)
    if blocks == 0:
        assert 2 * row_bytes + 16 * kernels.chunk_bytes * 8 > 8 * shared_bytes - 8 * 10_000
        return
    assert blocks in (1, 2, 4, 8)
    assert slots > kernels.needed_slots(row_bytes, blocks, warps)
    assert kernels.shared_bytes(blocks, warps, slots) <= shared_bytes
    assert blocks * warps * slots * kernels.chunk_bytes > 2 * row_bytes


def test_gradients_that_begin_elsewhere_take_the_plain_kernel(kernels: ModuleType) -> None:
    case = random_case(5, 1001)
    padded = strided(case.logits, 0, 7)
    inputs = RowInputs(case.targets, **case.others)
    outputs = RowOutputs(
        *(torch.empty(5) for _ in range(2)), torch.empty(5, dtype=torch.bool), torch.empty(5), None, None
    )
    for dlogits, alike in [(padded, True), (None, True), (torch.empty(5, 1001), False), (padded[:, 1:], False)]:
        arguments = kernel_arguments(padded, inputs, LossConfig(), replace(outputs, dlogits=dlogits))
        assert kernels.is_aligned_alike(**arguments) == alike
    elsewhere = replace(outputs, dlogits=torch.empty(5, 1001))
    call(kernels, padded, inputs, LossConfig(), elsewhere, PLAIN, seed=0, haste=0.1)
    assert_close(elsewhere, exact(case, LossConfig()), 1e-5)


def test_no_two_threads_race(pytestconfig: pytest.Config) -> None:
    """ThreadSanitizer over the emulation: accesses that CUDA does not order, whatever the order of this run."""
    folder = pytestconfig.cache.mkdir("cuda_emulation")
    program = compiled(folder, "race_check.cpp", "race_check", "-O1", "-g", "-fsanitize=thread")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel's address layout")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "no race", done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.skipif(not getattr(extension(), "cuda_architectures", ()), reason="mrpo._C has no CUDA part")
def test_without_a_driver_cuda_says_so() -> None:
    nothing = torch.zeros(1, 1)
    outputs = RowOutputs(nothing[0], nothing[0], nothing[0] > 0, nothing[0], None, None)
    inputs = RowInputs(torch.zeros(1, dtype=torch.int64), nothing[0], nothing[0])
    arguments = kernel_arguments(nothing, inputs, LossConfig(), outputs)
    module = extension()
    assert module is not None
    with pytest.raises(RuntimeError, match=r"policy_loss \(CUDA\): .*(driver|device)"):
        module.policy_loss_cuda(dtype="float32", device=0, stream=0, **arguments)
    with use("cuda"), pytest.raises(RuntimeError, match="no CUDA driver"):
        implementation_of("policy_loss", torch.device("cuda", 0), torch.float32)
