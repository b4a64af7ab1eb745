"""The head with its policy loss, and the loss on logits alone: ours beside eager PyTorch, TRL, Liger and Apple's CCE.

N tokens, H hidden size, V vocabulary. The head's products take 6NHV FLOPs (logits, their gradient times the weight, and
times the hidden states), 4NHV with a frozen head; every implementation is credited with these, whatever it computes
again. Its ceiling is the time of the bare products, of all rows at once, timed in turns with it: each by itself, and
beside that all in one go, as a head runs them, at the clocks that such a burst has. The loss on logits of s bytes must
read them and write their gradient: 2sNV bytes. Its ceiling is a copy of as many.

Peak memory counts from the inputs and the gradients that a run leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import kernel_plots
import peers
import torch
from harness import COPY, Candidate, Step
from peers import EAGER, LEAN, LIGER_FUSED, OURS, TRL, HeadProblem, Peer
from results import Case, Measured, Result
from tables import Table, Target, failure_cell, target_cell, two_cores

SOURCES = ("kernels", "csrc", "benchmarks/harness.py", "benchmarks/peers.py")

# Agreement with plain formulas in fp32 that is asked for before timing; half precision rounds logits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# (backbone, hidden size, vocabulary)
BACKBONES = (("Qwen3-VL-8B", 4096, 151_936), ("Qwen2.5-VL-7B", 3584, 152_064), ("InternVL3-8B", 3584, 151_674))
PRODUCTS = ("product: logits", "product: dhidden", "product: dweight")
IN_ONE_GO = "products in one go"
REFERENCE = "reference"  # dispatch's name of plain PyTorch
HEAD, FROZEN, VARIANTS = (
    f"head, {BACKBONES[0][0]}",
    f"frozen head, {BACKBONES[0][0]}",
    "chunks and accumulation of ours",
)

TARGETS = (
    Target(HEAD, OURS, "times bare products", "at most", 1.05, "x"),
    Target(HEAD, OURS, "faster than TRL", "at least", 1.4, "x"),
    Target(HEAD, OURS, "peak GiB", "at most", 2.6, "GiB"),
    Target(HEAD, LEAN, "times bare products", "at most", 1.10, "x"),
    Target(HEAD, LEAN, "peak GiB", "at most", 1.3, "GiB"),
    Target(FROZEN, OURS, "times bare products", "at most", 1.08, "x"),
    Target("loss on logits, 8192 rows", "cuda", "share of ceiling", "at least", 0.85, "%"),
    Target("loss on logits, 8192 rows", "cuda", "faster than Triton", "at least", 1.35, "x"),
    Target("loss on logits, 128 rows", "cpp", "faster than eager", "at least", 2.0, "x", two_cores),
)


def unfit() -> str | None:
    return None


def cases(quick: bool) -> list[Case]:
    """On a CPU the hidden size is cut to 1/16: the loss then weighs as it does beside a GPU's faster products."""
    return list(_gpu_cases(quick) if torch.cuda.is_available() else _cpu_cases(quick))


def _gpu_cases(quick: bool) -> Iterator[Case]:
    dtype, turns = torch.bfloat16, 5 if quick else 11
    yield ceiling_case(dtype)
    for name, size, vocab in BACKBONES[: 1 if quick else None]:
        yield head_case(f"head, {name}", 16, 512, size, vocab, dtype, turns=turns, lean=True)
    size, vocab = BACKBONES[0][1:]
    yield head_case(FROZEN, 16, 512, size, vocab, dtype, turns=turns, frozen=True)
    for rows in (8192,) if quick else (4096, 8192):
        yield rows_case(rows, vocab, dtype, turns=turns)
    yield variants_case(16, 512, size, vocab, dtype, turns=turns)
    turns = 3 if quick else 5
    for count in (2, 32) if quick else (2, 4, 8, 16, 32, 64, 128):
        yield head_case(f"N = {512 * count}", count, 512, size, vocab, dtype, turns=turns, sweep="tokens")
    for length in () if quick else (50, 128, 200, 512, 1024, 2048):
        yield head_case(f"length {length}", 16, length, size, vocab, dtype, turns=turns, sweep="length")


def _cpu_cases(quick: bool) -> Iterator[Case]:
    dtype, turns = torch.float32, 3 if quick else 7
    leave_out = {LIGER_FUSED: "left out of --quick on a CPU: it compiles for half a minute"} if quick else {}
    yield ceiling_case(dtype)
    for name, size, vocab in BACKBONES[: 1 if quick else None]:
        yield head_case(f"head, {name}", 4, 32, size // 16, vocab, dtype, turns=turns, lean=True, leave_out=leave_out)
    size, vocab = BACKBONES[0][1] // 16, BACKBONES[0][2]
    yield head_case(FROZEN, 4, 32, size, vocab, dtype, turns=turns, frozen=True, leave_out=leave_out)
    yield rows_case(128, vocab, dtype, turns=turns)
    for count in () if quick else (1, 2, 4, 8, 16):
        yield head_case(f"N = {32 * count}", count, 32, size, vocab, dtype, turns=3, sweep="tokens")
    for length in () if quick else (8, 16, 32, 64, 128):
        yield head_case(f"length {length}", 4, length, size, vocab, dtype, turns=3, sweep="length")


def ceiling_case(dtype: torch.dtype) -> Case:
    size, elements = harness.ceiling_sizes()

    def run(skip: Mapping[str, str]) -> list[Measured]:
        return harness.measure(harness.ceilings(dtype), turns=11, skip=skip)

    flops, moved = 2 * size**3, 2 * elements * dtype.itemsize
    return Case("ceilings", {"kind": "ceilings", "dtype": _name(dtype), "flops": flops, "bytes": moved}, run)


def head_case(
    name: str,
    num_sequences: int,
    length: int,
    size: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    turns: int,
    frozen: bool = False,
    lean: bool = False,
    sweep: str = "",
    leave_out: Mapping[str, str] | None = None,
) -> Case:
    """Forward and backward of every head there is; `lean`: ours also with little memory."""
    leaned = [Peer(LEAN, partial(peers.ours, chunk_rows=2048, weight_grad_dtype=dtype), "mrpo", "mrpo")] if lean else []
    heads = [peers.HEADS[0], *leaned, *peers.HEADS[1:]]
    make = partial(HeadProblem.make, num_sequences, length, size, vocab, dtype=dtype, frozen=frozen)
    settings = _head_settings(num_sequences * length, size, vocab, dtype, turns, frozen=frozen)
    settings |= {"sweep": sweep, "sequences": num_sequences, "length": length}
    return Case(name, settings, partial(_run_heads, heads, make, turns, dict(leave_out or {})))


def variants_case(num_sequences: int, length: int, size: int, vocab: int, dtype: torch.dtype, *, turns: int) -> Case:
    heads = list(peers.variants_of_ours(dtype))
    make = partial(HeadProblem.make, num_sequences, length, size, vocab, dtype=dtype)
    settings = _head_settings(num_sequences * length, size, vocab, dtype, turns, frozen=False)
    return Case(VARIANTS, {**settings, "sweep": "variants"}, partial(_run_heads, heads, make, turns, {}))


def _head_settings(rows: int, size: int, vocab: int, dtype: torch.dtype, turns: int, *, frozen: bool) -> dict[str, Any]:
    flops = (4 if frozen else 6) * rows * size * vocab
    shape = {"N": rows, "H": size, "V": vocab, "dtype": _name(dtype)}
    return {"kind": "head", **shape, "frozen": frozen, "turns": turns, "flops": flops}


def _run_heads(
    heads: Sequence[Peer],
    make: Callable[..., HeadProblem],
    turns: int,
    leave_out: dict[str, str],
    skip: Mapping[str, str],
) -> list[Measured]:
    problem = make(device=harness.device())
    missing = {peer.name: reason for peer in heads if (reason := peer.missing())}
    candidates: dict[str, Candidate] = {peer.name: partial(_head_step, problem, peer.loss) for peer in heads}
    candidates |= _bare_products(problem)
    tolerance = TOLERANCE[problem.hidden.dtype]
    truth = problem.true_gradients()
    return harness.measure(
        candidates, truth=truth, tolerance=tolerance, turns=turns, skip={**missing, **leave_out, **skip}
    )


def _head_step(problem: HeadProblem, loss: peers.Loss) -> Step:
    return partial(problem.gradients, loss)


def _bare_products(problem: HeadProblem) -> dict[str, Candidate]:
    """The products of all rows, unchunked; the one of the weight's gradient only where that is wanted."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    wanted = problem.weight.requires_grad

    def logits() -> Step:
        return harness.uncompared(lambda: hidden @ weight.t())

    def dhidden() -> Step:
        dlogits = hidden @ weight.t()
        return harness.uncompared(lambda: dlogits @ weight)

    def dweight() -> Step:
        dlogits = hidden @ weight.t()
        return harness.uncompared(lambda: dlogits.t() @ hidden)

    def in_one_go() -> Step:
        def run() -> None:
            dlogits = hidden @ weight.t()
            _ = dlogits @ weight
            if wanted:
                _ = dlogits.t() @ hidden

        return run

    products = dict(zip(PRODUCTS, (logits, dhidden, dweight), strict=True))
    return {name: products[name] for name in PRODUCTS[: 3 if wanted else 2]} | {IN_ONE_GO: in_one_go}


def rows_case(rows: int, vocab: int, dtype: torch.dtype, *, turns: int) -> Case:
    """`policy_loss`, forward and backward, by every implementation that dispatch has for this device."""
    shape = {"N": rows, "V": vocab, "dtype": _name(dtype)}
    settings = {"kind": "rows", **shape, "turns": turns, "bytes": 2 * rows * vocab * dtype.itemsize}
    return Case(f"loss on logits, {rows} rows", settings, partial(_run_rows, rows, vocab, dtype, turns))


def _run_rows(rows: int, vocab: int, dtype: torch.dtype, turns: int, skip: Mapping[str, str]) -> list[Measured]:
    from mrpo.kernels import policy_loss
    from mrpo.kernels.dispatch import implementation_of, use

    where = harness.device()
    generator = torch.Generator(where).manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator, device=where).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator, device=where)
    advantages = torch.randn(rows, generator=generator, device=where)
    weights = torch.full((rows,), 1.0 / rows, device=where)

    def gradient(implementation: str) -> list[torch.Tensor]:
        logits.grad = None
        with use(implementation):
            policy_loss(logits, targets, advantages=advantages, weights=weights).loss.backward()
        assert logits.grad is not None
        return [logits.grad]

    def copy() -> Step:
        target = torch.empty_like(logits)
        return harness.uncompared(lambda: target.copy_(logits.detach()))

    missing = {}
    names = ("cuda", "triton", REFERENCE) if where.type == "cuda" else ("cpp", REFERENCE)
    for name in names:
        try:
            with use(name):
                implementation_of("policy_loss", where, dtype)
        except RuntimeError as error:
            missing[name] = str(error)
    candidates: dict[str, Candidate] = {name: partial(partial, gradient, name) for name in names}
    truth = logits.detach().float().softmax(-1)
    truth[torch.arange(rows, device=where), targets] -= 1.0
    truth *= (advantages * weights)[:, None]
    return harness.measure(
        {**candidates, COPY: copy}, truth=[truth], tolerance=TOLERANCE[dtype], turns=turns, skip={**missing, **skip}
    )


def figures(result: Result) -> dict[str, dict[str, float]]:
    """By candidate: TFLOP/s or TB/s, share of the ceiling, how much faster than whom, peak in GiB."""
    settings, ceiling = result.settings, _ceiling(result)
    rivals = {"TRL": TRL, "eager": REFERENCE if settings["kind"] == "rows" else EAGER, "Triton": "triton"}
    found: dict[str, dict[str, float]] = {}
    for one in result.measured:
        if one.seconds is None or one.failure:
            continue
        mine = found[one.name] = {}
        if one.name not in PRODUCTS:
            if "flops" in settings and one.name != COPY:
                mine["TFLOP/s"] = settings["flops"] / one.seconds / 1e12
            if "bytes" in settings and one.name != harness.PRODUCT:
                mine["TB/s"] = settings["bytes"] / one.seconds / 1e12
            if ceiling is not None:
                mine["share of ceiling"] = ceiling / one.seconds
                mine["times bare products"] = one.seconds / ceiling
        elif settings["kind"] == "head":
            mine["TFLOP/s"] = 2 * settings["N"] * settings["H"] * settings["V"] / one.seconds / 1e12
        for rival, name in rivals.items():
            if (seconds := result[name].seconds) is not None and not result[name].failure:
                mine[f"faster than {rival}"] = seconds / one.seconds
        if one.peak_bytes is not None:
            mine["peak GiB"] = one.peak_bytes / 2**30
    return found


def _ceiling(result: Result) -> float | None:
    """Seconds of the bare products, or of the copy, of the same case."""
    if result.settings["kind"] == "rows":
        return result[COPY].seconds
    parts = [result[name].seconds for name in PRODUCTS[: 2 if result.settings.get("frozen") else 3]]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def summary(results: Sequence[Result]) -> list[Table]:
    """One line a head, one column a backbone; and the loss on logits."""
    heads = [result for result in results if _is_head(result, "") and result.measured]
    tables = []
    if heads:
        ceilings = (*PRODUCTS, IN_ONE_GO)
        names = list(dict.fromkeys(one.name for result in heads for one in result.measured if one.name not in ceilings))
        header = ["forward and backward, ms", *(result.name for result in heads), "peak, GiB"]
        rows = [[name, *(_milliseconds(result[name]) for result in heads), _peak(heads[0][name])] for name in names]
        bare = [_ceiling(result) for result in heads]
        rows.append(["*the bare products, unchunked*", *("" if s is None else f"{1e3 * s:.1f}" for s in bare), ""])
        if any(result[IN_ONE_GO].runs for result in heads):
            rows.append([f"*the bare {IN_ONE_GO}*", *(_milliseconds(result[IN_ONE_GO]) for result in heads), ""])
        note = f"{_shape(heads[0])}. Peak: of the first column, above inputs and gradients."
        tables.append(Table("Head and policy loss", header, rows, note))
    logits = [result for result in results if result.settings["kind"] == "rows" and result.measured]
    if logits:
        names = list(dict.fromkeys(one.name for result in logits for one in result.measured))
        header = ["forward and gradient, ms (share of a copy's bandwidth)", *(result.name for result in logits)]
        rows = [[_row_name(name), *(_with_share(result, name) for result in logits)] for name in names]
        tables.append(Table("Policy loss from logits", header, rows, f"{_shape(logits[-1])}."))
    return tables


def details(results: Sequence[Result], machine: Mapping[str, Any]) -> list[Table]:
    header = ["implementation", "ms", "low to high", "TFLOP/s or TB/s", "share of ceiling", "peak, GiB", "error", ""]
    tables = []
    for result in results:
        found = figures(result)
        rows = []
        for one in result.measured:
            mine = found.get(one.name, {})
            rows.append([*_detail(one, mine), target_cell(TARGETS, machine, result.name, one.name, mine)])
        tables.append(Table(f"{result.name}: {_shape(result)}", header, rows))
    return tables


def _detail(one: Measured, found: Mapping[str, float]) -> list[str]:
    if one.failure or one.seconds is None or one.low is None or one.high is None:
        error = "" if one.error is None else f"{one.error:.1e}"
        return [_row_name(one.name), failure_cell(one.failure), *[""] * 4, error]
    rate = found.get("TFLOP/s", found.get("TB/s"))
    share = found.get("share of ceiling")
    return [
        _row_name(one.name),
        f"{1e3 * one.seconds:.2f}",
        f"{1e3 * one.low:.2f} to {1e3 * one.high:.2f}",
        "" if rate is None else f"{rate:.3g}",
        "" if share is None else f"{100 * share:.0f} %",
        _peak(one),
        "" if one.error is None else f"{one.error:.1e}",
    ]


def plots(results: Sequence[Result], out: Path) -> list[Path]:
    return kernel_plots.draw(results, figures, out)


def _is_head(result: Result, sweep: str) -> bool:
    return result.settings["kind"] == "head" and result.settings["sweep"] == sweep


def _shape(result: Result) -> str:
    return " ".join(
        [*(f"{key} = {result.settings[key]}" for key in "NHV" if key in result.settings), result.settings["dtype"]]
    )


def _row_name(name: str) -> str:
    return {**kernel_plots.LABELS, COPY: "*copy*"}.get(name, name)


def _milliseconds(one: Measured) -> str:
    if one.failure or one.seconds is None:
        return failure_cell(one.failure, 24)
    return f"{1e3 * one.seconds:.1f}" if one.seconds >= 0.01 else f"{1e3 * one.seconds:.2f}"


def _with_share(result: Result, name: str) -> str:
    share = figures(result).get(name, {}).get("share of ceiling")
    return _milliseconds(result[name]) + ("" if share is None or name == COPY else f" ({100 * share:.0f} %)")


def _peak(one: Measured) -> str:
    return "" if one.peak_bytes is None or one.failure else f"{one.peak_bytes / 2**30:.2f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
