"""The row kernel in CUDA C++ (csrc/cluster_kernel.cuh), for Hopper and newer: a row is read from device memory once.

Bytes for N rows of V logits of s bytes: sNV read and, with a gradient, sNV written. Rows that no thread-block cluster
can hold, and gradients whose rows begin at other distances from a multiple of 16 bytes than those of the logits, take a
plain kernel that reads twice (csrc/block_kernel.cuh); so do older GPUs, where Triton's is the default.
"""

from __future__ import annotations

import torch

from .dispatch import extension
from .policy_loss_cpp import kernel_arguments
from .records import LossConfig, RowInputs, RowOutputs


def run_cuda(
    logits: torch.Tensor,
    inputs: RowInputs,
    config: LossConfig,
    outputs: RowOutputs,
    *,
    cluster: tuple[int, int, int] | None = None,
) -> None:
    """Fills `outputs` from logits [N, V] with contiguous rows and fp32 `inputs`, on a CUDA device's current stream.

    Args:
        logits: bf16, fp16 or fp32; `outputs.dlogits` has their dtype, and may be the logits.
        cluster: for measuring: blocks of a cluster, warps of a block, slots of a warp (csrc/cluster_kernel.cuh);
            (0, 0, 0) takes the plain kernel. None: the kernel's own choice.

    Raises:
        RuntimeError: the launch failed, or there is no machine code for this device; the message names the kernel.
    """
    module = extension()
    assert module is not None
    device = logits.device
    with torch.cuda.device(device):
        module.policy_loss_cuda(
            dtype=str(logits.dtype).removeprefix("torch."),
            device=torch.cuda.current_device(),
            stream=torch.cuda.current_stream(device).cuda_stream,
            cluster=cluster,
            **kernel_arguments(logits, inputs, config, outputs),
        )
