"""The row kernel: loss and gradient of rows of logits, without autograd, by whatever implementation fits.

It is what `policy_loss` and the linear operators are made of. Arguments are not checked here:
`RowInputs.check` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from . import reference
from .dispatch import implementation_of, is_installed
from .policy_loss_cpp import run_cpp
from .policy_loss_cuda import run_cuda
from .records import LossConfig, RowInputs, RowOutputs, SegmentedAdvantages

__all__ = ["LossConfig", "RowInputs", "RowOutputs", "SegmentedAdvantages", "loss_rows", "times_upstream"]

Gradient = Literal["none", "inplace", "new"]


def loss_rows(
    logits: torch.Tensor,  # [n, V]
    inputs: RowInputs,
    *,
    config: LossConfig,
    entropy: bool = False,
    gradient: Gradient = "none",
) -> RowOutputs:
    """Loss, log-probabilities and, if asked for, entropy and gradient of n rows of logits; see `policy_loss`.

    Args:
        logits: any floating dtype and strides; rows are best contiguous. Computed in fp32, or fp64 for fp64.
        inputs: of the same n rows. `RowInputs(...)[positions]` takes rows out, segments included.
        gradient: "none"; "new", in a new tensor; "inplace": it overwrites the logits, whose version counter is
            increased, and `dlogits` is another view of them. They must not overlap themselves.

    Raises:
        RuntimeError: `dispatch.use` forces an implementation that cannot run here.
    """
    implementation = implementation_of("policy_loss", logits.device, logits.dtype)
    inputs = inputs.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        if implementation == "reference":
            return reference.loss_rows(logits, inputs, config, entropy, gradient)
        source = logits.float() if implementation == "cpp" else logits
        source = source if source.stride(1) == 1 else source.contiguous()
        # A copy made on the way in is ours to overwrite.
        overwrite = gradient == "inplace" or source is not logits
        dlogits = None if gradient == "none" else source if overwrite else source.new_empty(source.shape)
        outputs = _empty_outputs(inputs.weights, entropy, dlogits)
        _run(implementation)(source, inputs, config, outputs)
        if dlogits is None:
            return outputs
        if gradient == "new":
            return replace(outputs, dlogits=dlogits.to(logits.dtype))
        if source is logits:
            torch.autograd.graph.increment_version(logits)
        else:
            logits.detach().copy_(dlogits)
        return replace(outputs, dlogits=logits.detach())


def _empty_outputs(like: torch.Tensor, entropy: bool, dlogits: torch.Tensor | None) -> RowOutputs:
    return RowOutputs(
        losses=torch.empty_like(like),
        logprobs=torch.empty_like(like),
        clipped=torch.empty_like(like, dtype=torch.bool),
        kl=torch.empty_like(like),
        entropy=torch.empty_like(like) if entropy else None,
        dlogits=dlogits,
    )


def _run(implementation: str) -> Callable[[torch.Tensor, RowInputs, LossConfig, RowOutputs], None]:
    if implementation == "triton":  # imported where it runs: it is not everywhere
        from .policy_loss_triton import run_triton

        return run_triton
    return {"cpp": run_cpp, "cuda": run_cuda}[implementation]


def times_upstream(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """A gradient computed in the forward pass times the scalar that arrives in the backward pass, [].

    Almost always that scalar is 1. On the CPU looking at it is free. Elsewhere that would wait for the device: there
    a kernel looks, and returns at once or scales `gradient` in place, unless the graph is kept for another backward
    pass, which then needs the gradient as it is.
    """
    if gradient.device.type == "cpu":
        return gradient if upstream.item() == 1.0 else gradient * upstream
    implementation = implementation_of("policy_loss", gradient.device, gradient.dtype)
    rows_are_contiguous = gradient.is_contiguous() or (gradient.dim() == 2 and gradient.stride(1) == 1)
    if (
        implementation not in ("cuda", "triton")
        or not is_installed("triton")
        or not rows_are_contiguous
        or torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        return gradient * upstream
    from .policy_loss_triton import scale_unless_one

    return scale_unless_one(gradient, upstream)
