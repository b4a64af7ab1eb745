"""Launch shapes of the row kernels on this GPU: `python benchmarks/tune_rows.py [--only cuda|triton] [--rows N] ...`.

Every shape is checked against plain PyTorch before it is timed; the table is sorted by time. Triton: columns of a
block, warps, pipeline stages. CUDA: blocks of a cluster, warps of a block, slots of a warp (csrc/cluster_kernel.cuh).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import harness
import torch
from harness import COPY, Step
from tables import Table, failure_cell

CHUNK_BYTES, SHARED_BYTES = 2048, 232_448  # of a lane group's copy; of a multiprocessor of Hopper for one block


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/tune_rows.py", description=__doc__)
    parser.add_argument("--only", choices=("cuda", "triton"), help="default: both; Triton compiles every shape")
    parser.add_argument("--rows", type=int, default=8192, metavar="N")
    parser.add_argument("--vocab", type=int, default=151_936, metavar="V")
    parser.add_argument("--turns", type=int, default=5, metavar="N")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    from mrpo.kernels.records import LossConfig, RowInputs, RowOutputs

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (options.rows, options.vocab)
    logits = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    targets = torch.randint(options.vocab, shape[:1], generator=generator, device="cuda")
    advantages = torch.randn(options.rows, generator=generator, device="cuda")
    inputs = RowInputs(targets, advantages, torch.full_like(advantages, 1.0 / options.rows))
    one, clipped = torch.empty_like(advantages), torch.empty_like(targets, dtype=torch.bool)
    gradient = torch.empty_like(logits)
    outputs = RowOutputs(one, one.clone(), clipped, one.clone(), None, gradient)
    truth = logits.float().softmax(-1)
    truth[torch.arange(options.rows, device="cuda"), targets] -= 1.0
    truth *= (inputs.advantages * inputs.weights)[:, None]

    def step(run: Callable[..., None]) -> list[torch.Tensor]:
        run(logits, inputs, LossConfig(), outputs)
        return [gradient]

    def copy() -> Step:
        return harness.uncompared(lambda: gradient.copy_(logits))

    shapes = {"cuda": cuda_shapes(options.vocab * logits.element_size()), "triton": triton_shapes()}
    runs = {name: run for kind, found in shapes.items() if options.only in (None, kind) for name, run in found}
    candidates = {name: partial(partial, step, run) for name, run in runs.items()}
    measured = harness.measure({**candidates, COPY: copy}, truth=[truth], tolerance=5e-2, turns=options.turns)
    copied = next(one.seconds for one in measured if one.name == COPY)
    moved = 2 * logits.nbytes
    rows = []
    for found in sorted(measured, key=lambda one: (one.seconds is None, one.seconds)):
        if found.seconds is None or copied is None or found.failure:
            rows.append([found.name, failure_cell(found.failure), "", ""])
            continue
        share = f"{100 * copied / found.seconds:.0f} %"
        rows.append([found.name, f"{1e3 * found.seconds:.3f}", f"{moved / found.seconds / 1e12:.2f}", share])
    title = f"Row kernels, N = {options.rows}, V = {options.vocab}, bfloat16, {torch.cuda.get_device_name()}"
    print(Table(title, ["launch shape", "ms", "TB/s", "share of copy"], rows).markdown())


def triton_shapes() -> Iterator[tuple[str, Callable[..., None]]]:
    from mrpo.kernels import policy_loss_triton as module

    kernel, shape_of = module._loss_row_kernel, module._launch_shape

    class Staged:
        """The kernel with another number of stages."""

        def __init__(self, stages: int) -> None:
            self._stages = stages

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return partial(kernel[grid], num_stages=self._stages)

    def run(block: int, warps: int, stages: int, *arguments: Any) -> None:
        module._launch_shape, module._loss_row_kernel = lambda vocab: (block, warps), Staged(stages)
        try:
            module.run_triton(*arguments)
        finally:
            module._launch_shape, module._loss_row_kernel = shape_of, kernel

    for block, warps, stages in product((1024, 2048, 4096, 8192, 16_384), (4, 8, 16, 32), (1, 2, 3, 4)):
        if 4 <= block // (32 * warps) <= 64:  # elements of a thread
            yield f"Triton {block} columns, {warps} warps, {stages} stages", partial(run, block, warps, stages)


def cuda_shapes(row_bytes: int) -> Iterator[tuple[str, Callable[..., None]]]:
    from mrpo.kernels.policy_loss_cuda import run_cuda

    yield "CUDA, its own choice", run_cuda
    yield "CUDA, plain blocks", partial(run_cuda, cluster=(0, 0, 0))
    for blocks, warps in product((1, 2, 4, 8), (4, 8, 12, 16)):
        chunks = -(-row_bytes // (CHUNK_BYTES * blocks * warps))
        least, most = 2 * chunks + 2, SHARED_BYTES // (warps * CHUNK_BYTES) - 1
        for slots in sorted({least, least + 1, least + chunks, most}):
            if least <= slots <= most:
                yield (
                    f"CUDA {blocks} blocks, {warps} warps, {slots} slots",
                    partial(run_cuda, cluster=(blocks, warps, slots)),
                )


if __name__ == "__main__":
    main()
