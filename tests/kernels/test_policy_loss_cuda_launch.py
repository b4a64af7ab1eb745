"""How csrc/policy_loss_cuda.cu launches its kernels, over an emulation of the CUDA runtime and its rules."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_rows import DTYPES, assert_close, exact, full_case, poisoned, rounding, strided
from loss_cases import Case

from mrpo.kernels.policy_loss_cpp import kernel_arguments
from mrpo.kernels.records import LossConfig, RowInputs


def launched(
    kernels: ModuleType, case: Case, *, entropy: bool = False, dlogits: torch.Tensor | None = None, **options: Any
) -> int:
    """A call as the trainer makes it, whose results must be right; the blocks of its clusters, 0: the plain kernel."""
    outputs = poisoned(case.logits, "new", entropy)
    outputs = outputs if dlogits is None else replace(outputs, dlogits=dlogits)
    arguments = kernel_arguments(case.logits, RowInputs(case.targets, **case.others), LossConfig(), outputs)
    dtype = str(case.logits.dtype).removeprefix("torch.")
    blocks = kernels.launch_kernel(dtype=dtype, **options, **arguments)
    assert_close(outputs, exact(case, LossConfig()), rounding(case.logits.dtype))
    return blocks


@pytest.mark.parametrize("sizes", [(9, 9, 9), (9, 4, 9), (4, 9, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_and_shapes_may_follow_each_other(
    kernels: ModuleType, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """What one call asks of the device holds for every kernel and must not stand in the way of the next call."""
    case = full_case(3, 1001, dtype)
    warps = {torch.float32: 3, torch.bfloat16: 4, torch.float16: 5}[dtype]  # shapes that no other test has asked for
    for entropy in (False, True):
        for size in sizes:
            cluster = (2, warps, size)
            assert (kernels.shared_bytes(*cluster) > 48 << 10) == (size > 4)
            assert launched(kernels, case, entropy=entropy, cluster=cluster, clusters=2) == 2


def test_the_device_and_the_rows_decide_which_kernel_runs(kernels: ModuleType) -> None:
    case = full_case(4, 1003, torch.float32)
    assert launched(kernels, case) == kernels.cluster_shape(4 * 1003, 232_448)[0] > 0
    assert launched(kernels, case, cluster=(4, 1, 4)) == 4
    assert launched(kernels, case, device=1) == 0  # before Hopper
    assert launched(kernels, case, cluster=(0, 0, 0)) == 0
    assert launched(kernels, case, dlogits=strided(case.logits, 1, 0)) == 0  # aligned otherwise
    long = full_case(2, 500_001, torch.float32)
    assert launched(kernels, long) == 0  # no cluster holds a row


def test_what_cannot_be_launched_is_told(kernels: ModuleType) -> None:
    case = full_case(4, 9001, torch.float32)
    for cluster in [(1, 1, 2), (16, 1, 8), (1, 8, 1000)]:  # too few slots, too large a cluster, too much memory
        with pytest.raises(RuntimeError, match="invalid"):
            launched(kernels, case, cluster=cluster)
