"""Random arguments of the policy loss, run by each implementation where it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from mrpo.kernels import PolicyLoss, SegmentedAdvantages, policy_loss
from mrpo.kernels.dispatch import extension, triton_is_interpreted, use

needs_cpp = pytest.mark.skipif(extension() is None, reason="mrpo._C is not built")
needs_triton = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_is_interpreted()), reason="Triton needs a GPU or its interpreter"
)
CPP, TRITON = pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)
CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
every_implementation = pytest.mark.parametrize("implementation", [CPP, TRITON, *CUDA, "reference"])
every_kernel = pytest.mark.parametrize("implementation", [CPP, TRITON, *CUDA])


@dataclass(frozen=True)
class Case:
    """The arguments of one loss."""

    logits: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor | SegmentedAdvantages
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sampler_logprobs: torch.Tensor | None = None

    @property
    def others(self) -> dict[str, Any]:
        """The keyword arguments: all but logits and targets."""
        return {name: value for name, value in vars(self).items() if name not in ("logits", "targets")}

    def to(self, device: str, dtype: torch.dtype | None = None) -> Case:
        """On a device; floating tensors in `dtype`, if given."""

        def move(value: Any) -> Any:
            if isinstance(value, SegmentedAdvantages):
                return SegmentedAdvantages(*(None if part is None else move(part) for part in vars(value).values()))
            if value is None or not value.is_floating_point():
                return None if value is None else value.to(device)
            return value.to(device, dtype)

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})


def random_case(rows: int, vocab: int, *, seed: int = 0, spread: float = 2.0) -> Case:
    """fp32 values; old log-probabilities near enough the current ones that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    logits = spread * normal(rows, vocab)
    targets = torch.randint(vocab, (rows,), generator=generator)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return Case(
        logits=logits,
        targets=targets,
        advantages=normal(rows),
        weights=torch.rand(rows, generator=generator) / rows,
        old_logprobs=logprobs + 0.3 * normal(rows),
        ref_logprobs=logprobs + 0.3 * normal(rows),
    )


def device_of(implementation: str) -> str:
    """Where the tests run it."""
    return "cuda" if implementation in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def run(case: Case, implementation: str, dtype: torch.dtype, **options: Any) -> tuple[PolicyLoss, torch.Tensor]:
    """The loss and the gradient of the logits, on the CPU."""
    placed = case.to(device_of(implementation), dtype)
    leaf = placed.logits.detach().clone().requires_grad_()
    logits = leaf * 1.0 if options.get("inplace") else leaf  # a leaf must not be overwritten
    with use(implementation):
        result = policy_loss(logits, placed.targets, **placed.others, **options)
    result.loss.backward()
    assert leaf.grad is not None
    return PolicyLoss(*(None if value is None else value.cpu() for value in vars(result).values())), leaf.grad.cpu()


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Of the norms."""
    return ((value.double() - truth).norm() / truth.norm()).item()
