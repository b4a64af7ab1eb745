"""The head with its policy loss, and the loss on logits alone: ours beside eager PyTorch and the peers.

The head's matrix products take 6NHV FLOPs (logits, their gradient times the weight, and times the hidden states); every
implementation is credited with these, whatever it computes again. The loss on logits must read them and write their
gradient: 2 x 4NV bytes in fp32. Both are compared with ceilings measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import matplotlib
import peers
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Agreement that an implementation must reach against eager fp32 before it is timed; half precision rounds logits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# (backbone, hidden size, vocabulary)
BACKBONES = (("Qwen3-VL-8B", 4096, 151_936), ("Qwen2.5-VL-7B", 3584, 152_064), ("InternVL3-8B", 3584, 151_674))


def run(out: Path, *, quick: bool) -> str:
    """Measures, writes OUT/kernels.{json,csv,png} and returns the Markdown table."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = {"size": 8192, "copy_bytes": 1 << 30} if on_gpu else {"size": 1024, "copy_bytes": 1 << 28}
    ceilings = harness.ceilings(dtype, **sizes)
    repeats = 3 if quick else 7
    results: list[dict[str, Any]] = []
    # On a CPU the hidden size is cut to 1/16: the loss then weighs as it does beside a GPU's faster products.
    for name, size, vocab in BACKBONES[: 1 if quick else None]:
        shape = (16, 512, size) if on_gpu else (4, 32, size // 16)
        results += _head(f"head, {name}", *shape, vocab, dtype, ceilings, repeats)
    rows = 4096 if on_gpu else 128
    results += _loss_on_logits(rows, BACKBONES[0][2], dtype, ceilings, repeats)
    harness.write_results(out, "kernels", results, {"ceilings": ceilings, "missing": peers.missing()})
    _draw(results, out / "kernels.png")
    return _markdown(results)


def _head(
    case: str,
    num_sequences: int,
    length: int,
    size: int,
    vocab: int,
    dtype: torch.dtype,
    ceilings: dict[str, float],
    repeats: int,
) -> list[dict[str, Any]]:
    problem = peers.HeadProblem.make(num_sequences, length, size, vocab, dtype=dtype, device=harness.device())
    steps = {name: partial(_forward_backward, problem, loss) for name, loss in peers.installed().items()}
    agreeing, errors = _agreeing(problem, steps, TOLERANCE[dtype])
    steps["three bare products"] = partial(_bare_products, problem)
    timed = {name: step for name, step in steps.items() if name in agreeing or name == "three bare products"}
    timings = harness.interleaved(timed, repeats=repeats)
    flops = 6 * num_sequences * length * size * vocab
    results = []
    for name, timing in timings.items():
        results.append(
            {
                "case": case,
                "implementation": name,
                "shape": f"N={num_sequences * length} H={size} V={vocab} {str(dtype).removeprefix('torch.')}",
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "share_of_ceiling": flops / timing.median / ceilings["flops"],
                "peak_mib": harness.peak_bytes(timed[name]) / 2**20,
                "error": errors.get(name),
            }
        )
    results += [{"case": case, "implementation": n, "error": e} for n, e in errors.items() if n not in agreeing]
    return results


def _loss_on_logits(
    rows: int, vocab: int, dtype: torch.dtype, ceilings: dict[str, float], repeats: int
) -> list[dict[str, Any]]:
    from mrpo.kernels import policy_loss
    from mrpo.kernels.dispatch import implementation_of, use

    where = harness.device()
    generator = torch.Generator(where).manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator, device=where).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator, device=where)
    tokens = {
        "advantages": torch.randn(rows, generator=generator, device=where),
        "weights": torch.ones_like(targets) / rows,
    }

    def step(implementation: str) -> torch.Tensor:
        logits.grad = None
        with use(implementation):
            loss = policy_loss(logits, targets, **tokens).loss
        loss.backward()
        assert logits.grad is not None
        return logits.grad

    ours = implementation_of("policy_loss", where, dtype)
    steps: dict[str, Callable[[], torch.Tensor]] = {
        f"ours ({ours})": partial(step, ours),
        "eager PyTorch": partial(step, "reference"),
    }
    error = harness.relative_error(step(ours).clone(), step("reference"))
    timings = harness.interleaved(steps, repeats=repeats)
    moved = 2 * rows * vocab * logits.element_size()
    return [
        {
            "case": "loss on logits",
            "implementation": name,
            "shape": f"N={rows} V={vocab} {str(dtype).removeprefix('torch.')}",
            "ms": 1e3 * timing.median,
            "ms_low": 1e3 * timing.low,
            "ms_high": 1e3 * timing.high,
            "share_of_ceiling": moved / timing.median / ceilings["copy"],
            "peak_mib": harness.peak_bytes(steps[name]) / 2**20,
            "error": error if name.startswith("ours") else 0.0,
        }
        for name, timing in timings.items()
    ]


def _forward_backward(problem: peers.HeadProblem, loss: peers.Loss) -> torch.Tensor:
    problem.hidden.grad = problem.weight.grad = None
    value = loss(problem)
    value.backward()
    return value.detach()


def _bare_products(problem: peers.HeadProblem) -> None:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden @ weight.t()
    logits @ weight
    logits.t() @ hidden


def _agreeing(
    problem: peers.HeadProblem, steps: dict[str, Callable[[], torch.Tensor]], tolerance: float
) -> tuple[set[str], dict[str, float]]:
    """The implementations whose gradients are eager's, and how far each is off."""
    steps["eager full logits"]()
    assert problem.hidden.grad is not None
    assert problem.weight.grad is not None
    expected = problem.hidden.grad.clone(), problem.weight.grad.clone()
    errors = {}
    for name, step in steps.items():
        step()
        found = problem.hidden.grad, problem.weight.grad
        errors[name] = max(harness.relative_error(a, b) for a, b in zip(found, expected, strict=True))
    return {name for name, error in errors.items() if error <= tolerance}, errors


def _draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    cases = list(dict.fromkeys(result["case"] for result in results))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.2), layout="constrained", squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        rows = [result for result in results if result["case"] == case and "ms" in result]
        names = [row["implementation"] for row in rows]
        colors = ["#2f6fb2" if name.startswith("ours") else "#9aa0ac" for name in names]
        axis.barh(names, [row["ms"] for row in rows], color=colors)
        axis.invert_yaxis()
        axis.set(title=case, xlabel="ms, forward and backward")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _markdown(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | implementation | shape | ms (low to high) | share of ceiling | peak MiB | error against eager |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in results:
        if "ms" not in row:
            lines.append(
                f"| {row['case']} | {row['implementation']} | disagrees, not timed | | | | {row['error']:.1e} |"
            )
            continue
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            f"| {row['case']} | {row['implementation']} | {row['shape']} | {row['ms']:.1f} ({row['ms_low']:.1f} to "
            f"{row['ms_high']:.1f}) | {100 * row['share_of_ceiling']:.0f} % | {row['peak_mib']:.0f} | {error} |"
        )
    return "\n".join(lines) + "\n"
