"""The row kernel in C++ (csrc/policy_loss_cpu.cpp): fp32 on the CPU, rows spread over PyTorch's threads.

Bytes for N rows of V logits: 4NV read and, with a gradient, 4NV written.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import extension
from .records import LossConfig, RowInputs, RowOutputs, SegmentedAdvantages


def run_cpp(logits: torch.Tensor, inputs: RowInputs, config: LossConfig, outputs: RowOutputs) -> None:
    """Fills `outputs` from fp32 logits [N, V] with contiguous rows and fp32 `inputs`, all on the CPU."""
    module = extension()
    assert module is not None
    module.policy_loss_cpu(num_threads=torch.get_num_threads(), **kernel_arguments(logits, inputs, config, outputs))


def kernel_arguments(
    logits: torch.Tensor, inputs: RowInputs, config: LossConfig, outputs: RowOutputs
) -> dict[str, Any]:
    """What every row kernel of the compiled module takes: addresses, 0 for none, sizes and the numbers of the loss."""
    advantages, dlogits = inputs.advantages, outputs.dlogits
    tensors = {"logits": logits, "segment_ends": None, "tokens": None, **vars(inputs), **vars(outputs)}
    if isinstance(advantages, SegmentedAdvantages):
        tensors |= {"advantages": advantages.values, "segment_ends": advantages.ends, "tokens": advantages.tokens}
    return {
        **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        **vars(config),
        "rows": logits.shape[0],
        "vocab": logits.shape[1],
        "logits_stride": logits.stride(0),
        "dlogits_stride": 0 if dlogits is None else dlogits.stride(0),
        "num_segments": len(advantages.ends) if isinstance(advantages, SegmentedAdvantages) else 0,
    }
