"""Without a GPU the kernels run interpreted; that they compile for one is shown here, up to machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mrpo.kernels import policy_loss_triton, prefix_join_triton, step_advantages_triton

INTEGERS = {"logits_stride", "dlogits_stride", "vocab", "num_segments", "count", "tokens_per_completion", "max_steps",
            "stride", "width", "blocks_per_row", "blocks", "length", "heads", "head_dim"}

def compile(kernel, capability, constants, dtype="bf16", **types):
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        if signature[name].startswith("*") or name in ("logits_stride", "dlogits_stride", "vocab"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert built.asm["cubin"]
    return built.asm["ptx"]

floats = dict.fromkeys(["weights", "advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs", "losses",
                        "logprobs", "kl", "entropy"], "*fp32")
others = dict.fromkeys(["targets", "segment_ends", "tokens"], "*i64") | {"clipped": "*i1"}
rows = policy_loss_triton._loss_row_kernel
everything = floats | others
for capability, dtype in ((80, "fp16"), (90, "bf16"), (100, "fp32")):
    ptx = compile(rows, capability, {"BLOCK": 4096}, logits="*" + dtype, dlogits="*" + dtype, **everything)
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx, "rows must move in 16-byte words"
    assert "ld.local" not in ptx and "st.local" not in ptx, "registers must not spill"
absent = dict.fromkeys(["dlogits", "segment_ends", "tokens", "old_logprobs", "ref_logprobs", "sampler_logprobs",
                        "entropy"])
compile(rows, 90, {"BLOCK": 4096, **absent}, logits="*bf16", **everything)
compile(policy_loss_triton._scale_kernel, 90, {"BLOCK": 4096}, x="*bf16", factor="*fp32")
shaping = {"answer_correct": "*i1", "step_valid": "*i1", "num_steps": "*i64", "completions": "*i64",
           "step_ids": "*i64", "weights": "*fp64"}
for dtype, penalty, absent in (("bf16", "exponential", "weights"), ("fp64", "linear", "weights"),
                               ("fp32", "table", "completions")):
    constants = {"PENALTY": penalty, "ROUND": True, "BLOCK": 512, absent: None}
    compile(step_advantages_triton._shape_kernel, 90, constants, advantages="*" + dtype, out="*" + dtype, **shaping)
lses = {"own_lse": "*fp32", "prefix_lse": "*fp32", "has_prefix": "*i1"}
for heads, head_dim in ((32, 128), (4, 64)):
    ptx = compile(prefix_join_triton._join_kernel, 90, {"HEADS": heads, "HEAD_DIM": head_dim}, own="*bf16",
                  prefix="*bf16", **lses)
    assert "ld.local" not in ptx and "st.local" not in ptx, "registers must not spill"
"""


def test_the_kernels_compile_for_three_generations_of_gpus(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
