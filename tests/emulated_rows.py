"""Rows of logits for the CUDA kernels' own source, compiled for the CPU, and what should come of them.

See kernels/cuda_emulation/cuda_primitives.cuh for the emulation.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from loss_cases import Case, random_case, relative_error

from mrpo.kernels import SegmentedAdvantages, reference
from mrpo.kernels.records import LossConfig, RowInputs, RowOutputs

TESTS = Path(__file__).parent
HERE, CSRC = TESTS / "kernels" / "cuda_emulation", TESTS.parent / "csrc"
EMULATED = set(HERE.iterdir())
SOURCES = EMULATED | {path for path in CSRC.iterdir() if path.name != "cuda_primitives.cuh"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compiled(folder: Path, source: str, output: str, *options: str) -> Path:
    """Compiles a source of the emulation against csrc/, unless the same was compiled there before."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    contents = b"".join(path.read_bytes() for path in sorted(SOURCES))
    target = folder / hashlib.sha256(contents + repr(options).encode()).hexdigest()[:16] / output
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=folder) as work:  # another process may compile the same
            for path in SOURCES:  # side by side: a header's own folder is searched first
                shutil.copy(path, work)
            command = [compiler, "-std=c++17", "-Wall", "-Werror", "-Wno-unknown-pragmas", *options]
            files = ["-o", f"{work}/{output}", f"{work}/{source}"]
            done = subprocess.run([*command, *files], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            Path(work, output).replace(target)
    return target


def poisoned(logits: torch.Tensor, gradient: str, entropy: bool) -> RowOutputs:
    """Memory for what a kernel writes, full of NaN and nonsense; a new gradient is laid out like the logits."""

    def fresh(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((len(logits),), True if dtype == torch.bool else torch.nan, dtype=dtype)

    dlogits = {
        "none": None,
        "inplace": logits,
        "new": strided(torch.full_like(logits, torch.nan), *layout_of(logits)),
    }[gradient]
    return RowOutputs(fresh(), fresh(), fresh(torch.bool), fresh(), fresh() if entropy else None, dlogits)


def exact(case: Case, config: LossConfig) -> RowOutputs:
    """The same by the definition in fp64."""
    case = case.to("cpu", torch.float64)
    return reference.loss_rows(case.logits, RowInputs(case.targets, **case.others), config, True, "new")


def assert_close(found: RowOutputs, truth: RowOutputs, gradient_error: float) -> None:
    for name in ("losses", "logprobs", "kl"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(truth, name), rtol=2e-5, atol=2e-6)
    assert torch.equal(found.clipped, truth.clipped)
    if found.entropy is not None:
        torch.testing.assert_close(found.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-5)
    if found.dlogits is not None:
        assert truth.dlogits is not None
        assert found.dlogits.isfinite().all()
        if truth.dlogits.any():
            assert relative_error(found.dlogits, truth.dlogits) < gradient_error


def rounding(dtype: torch.dtype) -> float:
    """How far a gradient may be from fp64, of the norm."""
    return max(1e-5, torch.finfo(dtype).eps / 2)


def strided(logits: torch.Tensor, offset: int, padding: int) -> torch.Tensor:
    """The same values, rows `padding` further apart, `offset` elements behind a multiple of 16 bytes."""
    rows, vocab = logits.shape
    memory = torch.full((offset + rows * (vocab + padding),), 7.0, dtype=logits.dtype)
    view = memory[offset:].view(rows, vocab + padding)[:, :vocab]
    return view.copy_(logits)


def layout_of(logits: torch.Tensor) -> tuple[int, int]:
    """The offset and padding of `strided`."""
    return logits.data_ptr() % 16 // logits.element_size(), max(logits.stride(0) - logits.shape[1], 0)


def full_case(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """With everything that a loss can depend on: segments, a sampler, rows of weight 0 and of advantage 0."""
    case = random_case(rows, vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    assert case.old_logprobs is not None
    ends = torch.tensor([rows // 4, rows // 4, rows // 2, rows])
    return replace(
        case,
        logits=case.logits.to(dtype),
        advantages=SegmentedAdvantages(ends, torch.tensor([1.0, 5.0, -2.0, 0.5])),
        weights=case.weights.masked_fill(torch.arange(rows) % 5 == 2, 0.0),
        sampler_logprobs=case.old_logprobs + 0.3 * torch.randn(rows, generator=generator),
    )
