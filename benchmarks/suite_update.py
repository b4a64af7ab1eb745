"""The gradient of one optimizer step: shared prefixes beside dense rows, TRL's way and the way of the paper's code.

One image, one prompt, G completions; the same random weights, prompts and completions for all. FLOPs are those of the
form that a way computes, recomputation not counted, so that shares of the ceiling tell how well a form runs and seconds
tell which form to run. Peak memory counts from weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import torch
import update_plots
from harness import PRODUCT, Candidate, Step
from results import Case, Measured, Result, slug, write_whole
from tables import Table, Target, failure_cell, target_cell

if TYPE_CHECKING:
    from update_ways import Shape, Ways

SOURCES = (
    "kernels",
    "csrc",
    "mrpo/backbones",
    "mrpo/batching.py",
    "mrpo/efficiency.py",
    "mrpo/packing.py",
    "mrpo/passes.py",
    "mrpo/pass_runner.py",
    "mrpo/policy_module.py",
    "benchmarks/harness.py",
    "benchmarks/peers.py",
    "benchmarks/random_models.py",
    "benchmarks/update_ways.py",
)

OURS, OUR_DENSE = "ours", "ours, dense"
TRL, TRL_PLAIN, REFERENCE = "TRL's way", "TRL's way, no checkpointing", "reference's way"

# Of log-probabilities and gradients, against plain dense rows in the same precision.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
NEEDED_GIB = 100
BIG, SMALL = "Qwen3-VL-8B", "small Qwen3-VL"
# Ours with other options of `update`, on a GPU: whether a default should be another.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours, flash attention": {"attention": "flash"},
    "ours, 10,240 tokens a pass": {"token_budget": 10_240},
}
PROFILE_ROWS = 40
MAIN, AGREEMENT = f"64 samples, {BIG}", f"agreement in bf16, {BIG}"

TARGETS = (
    Target(MAIN, OURS, "seconds", "at most", 1.75, "s"),
    Target(MAIN, OURS, f"faster than {TRL}", "at least", 6.0, "x"),
    Target(MAIN, OURS, f"faster than {REFERENCE}", "at least", 8.0, "x"),
    Target(MAIN, OURS, "share of ceiling", "at least", 0.65, "%"),
    Target("16 samples, Qwen2.5-VL-7B", OURS, f"faster than {REFERENCE}", "at least", 5.0, "x"),
    Target("16 samples, InternVL3-8B", OURS, f"faster than {REFERENCE}", "at least", 5.0, "x"),
    # The same passes as dense rows have: what is left is noise.
    Target("G = 1", OURS, f"faster than {OUR_DENSE}", "at least", 0.97, "x"),
    Target(AGREEMENT, OURS, "log p error of dense", "at most", 1.05, "x"),
)


def unfit() -> str | None:
    if find_spec("deepspeed") is None:
        return "the trainer's modules need deepspeed, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < NEEDED_GIB * 2**30:
        return f"8 billion parameters with gradients and activations need a GPU of {NEEDED_GIB} GiB"
    return None


def cases(quick: bool) -> list[Case]:
    """With the whole grid on a GPU, cases of several backbones come one backbone after the other."""
    return list(_gpu_cases(quick) if torch.cuda.is_available() else _cpu_cases(quick))


def _gpu_cases(quick: bool) -> Iterator[Case]:
    from update_ways import Shape

    small = Shape(prompts=2, group=8, image_tokens=784, text_tokens=60, length=200)
    # Most of what a minute on a GPU can tell.
    yield update_case(MAIN, BIG, replace(small, prompts=8), seconds=10.0, variants=tuple(VARIANTS))
    yield agreement_case(BIG, replace(small, prompts=1, group=4))
    yield update_case(f"16 samples, {BIG}", BIG, small)
    if quick:
        return
    yield from _sweeps(BIG, small, (1, 2, 4, 8, 16), (196, 400, 784, 1024), (50, 100, 200, 512))
    for backbone in ("Qwen2.5-VL-7B", "InternVL3-8B"):
        yield update_case(f"16 samples, {backbone}", backbone, small)


def _cpu_cases(quick: bool) -> Iterator[Case]:
    from update_ways import Shape

    small = Shape(prompts=2, group=8, image_tokens=144, text_tokens=20, length=32)
    yield update_case(f"16 samples, {SMALL}", SMALL, small, seconds=5.0)
    if not quick:
        yield from _sweeps(SMALL, small, (1, 2, 4, 8, 16), (16, 64, 144, 256), (8, 32, 128))


def _sweeps(
    backbone: str, shape: Shape, groups: Sequence[int], image_tokens: Sequence[int], lengths: Sequence[int]
) -> Iterator[Case]:
    for group in groups:
        yield update_case(f"G = {group}", backbone, replace(shape, group=group), sweep="group")
    for tokens in image_tokens:
        yield update_case(f"{tokens} image tokens", backbone, replace(shape, image_tokens=tokens), sweep="image_tokens")
    for length in lengths:
        yield update_case(f"{length} tokens a completion", backbone, replace(shape, length=length), sweep="length")


def update_case(
    name: str, backbone: str, shape: Shape, *, sweep: str = "", seconds: float = 3.0, variants: Sequence[str] = ()
) -> Case:
    settings = {"kind": "update", "backbone": backbone, **asdict(shape), "sweep": sweep, "dtype": _name(_dtype())}
    settings |= {"variants": list(variants)}
    return Case(name, settings, partial(_run, backbone, shape, sweep, seconds, variants))


def agreement_case(backbone: str, shape: Shape) -> Case:
    settings = {"kind": "agreement", "backbone": backbone, **asdict(shape), "sweep": "", "dtype": _name(_dtype())}
    return Case(f"agreement in bf16, {backbone}", settings, partial(_run_agreement, backbone, shape))


@lru_cache(maxsize=1)
def _ways(backbone: str) -> Ways:
    from random_models import CONFIGS, build
    from update_ways import Ways

    harness.free_memory()  # of the backbone before
    return Ways(build(CONFIGS[backbone](), harness.device(), _dtype()), harness.device(), _dtype())


def _by_name(
    ways: Ways, *, packing: str = "auto", variants: Sequence[str] = ()
) -> dict[str, Callable[..., torch.Tensor]]:
    return {
        OURS: partial(ways.ours, packing=packing),
        **{name: partial(ways.ours, **VARIANTS[name]) for name in variants},
        OUR_DENSE: partial(ways.ours, packing="dense"),
        TRL: ways.trl,
        TRL_PLAIN: partial(ways.trl, checkpointed=False),
        REFERENCE: ways.reference,
    }


def _skipped(sweep: str) -> dict[str, str]:
    missing = {} if find_spec("trl") else dict.fromkeys((TRL, TRL_PLAIN), "not installed (pip install trl)")
    return missing | ({TRL_PLAIN: "left out of sweeps"} if sweep else {})


def _run(
    backbone: str, shape: Shape, sweep: str, seconds: float, variants: Sequence[str], skip: Mapping[str, str]
) -> list[Measured]:
    from update_ways import make_rows

    ways = _ways(backbone)
    rows = make_rows(ways.plain.config, shape, ways.dtype)
    truth = [tensor.clone() for tensor in ways.gradients(ways.truth, rows)]
    steps = {name: partial(ways.gradients, way, rows) for name, way in _by_name(ways, variants=variants).items()}
    candidates: dict[str, Candidate] = {name: partial(_ready, step) for name, step in steps.items()}
    candidates[PRODUCT] = harness.ceilings(_dtype())[PRODUCT]
    ways.messages.clear()
    measured = harness.measure(
        candidates,
        truth=truth,
        tolerance=TOLERANCE[_dtype()],
        turns=5,
        seconds=seconds,
        skip={**_skipped(sweep), **skip},
    )
    # The main case alone: what a profiler hooks into may slow down those behind it.
    is_profiled = torch.cuda.is_available() and bool(variants) and measured[0].failure is None
    profile = profile_of(steps[OURS]) if is_profiled else ""
    ways.plain.zero_grad(set_to_none=True)
    packed = any("shared_prefix" in message for message in ways.messages)
    flops = {
        **dict.fromkeys((OURS, *variants), ways.flops(shape, rows, packed=packed)),
        **dict.fromkeys((OUR_DENSE, TRL, TRL_PLAIN), ways.flops(shape, rows, packed=False)),
        REFERENCE: ways.flops(shape, rows, packed=False, full_logits=True),
        PRODUCT: 2.0 * harness.ceiling_sizes()[0] ** 3,
    }
    said = "; ".join(dict.fromkeys((ways.efficiency, *ways.messages)))
    more = {OURS: {"said": said, **({"profile": profile} if profile else {})}}
    return [replace(one, values={"flops": flops[one.name], **more.get(one.name, {})}) for one in measured]


def profile_of(step: Step) -> str:
    """What a step spends its time with, by operator and kernel, the longest first; or why that cannot be told."""
    from torch.profiler import profile

    try:
        with profile() as found:
            step()
            harness.synchronize()
        return found.key_averages().table(
            sort_by="self_device_time_total", row_limit=PROFILE_ROWS, max_name_column_width=100
        )
    except Exception as error:  # the case is measured by now, and must not be lost for want of a profile
        return f"{type(error).__name__}: {error}"


def _ready(step: Step) -> Step:
    """A candidate that has nothing to make."""
    return step


def _run_agreement(backbone: str, shape: Shape, skip: Mapping[str, str]) -> list[Measured]:
    """How far each way in bf16 is from plain dense rows in fp32 of the same weights."""
    from update_ways import make_rows

    ways = _ways(backbone)
    rows = make_rows(ways.plain.config, shape)
    with ways.in_fp32():
        truth = [tensor.clone() for tensor in ways.gradients(ways.truth, rows)]
    found = []
    for name, way in _by_name(ways, packing="shared_prefix").items():
        candidate = partial(_ready, partial(ways.gradients, way, rows))
        one = harness.measure(
            {name: candidate},
            truth=truth,
            tolerance=TOLERANCE[_dtype()],
            turns=1,
            skip={**_skipped("agreement"), **skip},
        )[0]
        values = {}
        if one.failure is None:
            off = ways.gradients(way, rows)[0] - truth[0]
            values = {"mean |d log p|": off.abs().mean().item(), "max |d log p|": off.abs().max().item()}
        found.append(replace(one, values=values))
    ways.plain.zero_grad(set_to_none=True)
    return found


def figures(result: Result) -> dict[str, dict[str, float]]:
    """By way: seconds, completion tokens a second, TFLOP/s, share of the ceiling, how much faster than whom."""
    settings = result.settings
    product = result[PRODUCT]
    found: dict[str, dict[str, float]] = {}
    for one in result.measured:
        if one.seconds is None or one.failure:
            continue
        mine = found[one.name] = {"seconds": one.seconds}
        if flops := one.values.get("flops"):
            mine["TFLOP/s"] = flops / one.seconds / 1e12
            if product.seconds is not None:
                mine["share of ceiling"] = (flops / one.seconds) / (product.values["flops"] / product.seconds)
        if one.name == PRODUCT:
            continue
        mine["completion tokens/s"] = settings["prompts"] * settings["group"] * settings["length"] / one.seconds
        if one.peak_bytes is not None:
            mine["peak GiB"] = one.peak_bytes / 2**30
        for rival in (OUR_DENSE, TRL, TRL_PLAIN, REFERENCE):
            if (seconds := result[rival].seconds) is not None and not result[rival].failure:
                mine[f"faster than {rival}"] = seconds / one.seconds
        error, dense = (each.values.get("mean |d log p|") for each in (one, result[OUR_DENSE]))
        if error and dense:
            mine["log p error of dense"] = error / dense
    return found


def summary(results: Sequence[Result]) -> list[Table]:
    """One line a way, one column a case that is no part of a sweep."""
    shown = [result for result in results if result.settings["kind"] == "update" and not result.settings["sweep"]]
    shown = [result for result in shown if result.measured]
    if not shown:
        return []
    measured = {one.name for result in shown for one in result.measured}
    variants = [name for name in VARIANTS if name in measured]
    names = (OURS, *variants, OUR_DENSE, TRL, TRL_PLAIN, REFERENCE)
    rows = [[name, *(_seconds_and_ratio(result, name) for result in shown)] for name in names]
    first = shown[0].settings
    note = (
        f"Prompts of {first['image_tokens']} image and {first['text_tokens']} text tokens, 8 completions each of "
        f"{first['length']}, {first['dtype']}. TRL's way: dense rows, its chunked log-probabilities of completions, "
        "micro-batches of 8. Reference's way: logits of prompt and completion, micro-batches of 2. Both with gradient "
        "checkpointing; where that is off, micro-batches of 4. Ours checkpoints as memory asks "
        "for, on a CPU not at all: compare it there with TRL's way without."
    )
    header = ["forward and backward, s (ours is so many times faster)", *(result.name for result in shown)]
    return [Table("The gradient of an optimizer step", header, rows, note)]


def _seconds_and_ratio(result: Result, name: str) -> str:
    one = result[name]
    if one.failure or one.seconds is None:
        return failure_cell(one.failure, 24)
    ratio = figures(result).get(OURS, {}).get(f"faster than {name}")
    return f"{one.seconds:.3g}" + ("" if ratio is None else f" ({ratio:.1f} x)")


def details(results: Sequence[Result], machine: Mapping[str, Any]) -> list[Table]:
    return [
        _agreement_table(result, machine) if _is_agreement(result) else _table(result, machine) for result in results
    ]


def _is_agreement(result: Result) -> bool:
    return result.settings["kind"] == "agreement"


def _table(result: Result, machine: Mapping[str, Any]) -> Table:
    header = ["way", "s", "fastest to slowest", "completion tokens/s", "TFLOP", "share of ceiling", "peak, GiB"]
    rows, found = [], figures(result)
    for one in result.measured:
        mine = found.get(one.name, {})
        if not mine or one.low is None or one.high is None:
            rows.append([one.name, failure_cell(one.failure), *[""] * 5, "", ""])
            continue
        rows.append(
            [
                one.name if one.name != PRODUCT else "*matrix product*",
                f"{one.seconds:.3g}",
                f"{one.low:.3g} to {one.high:.3g}",
                f"{mine['completion tokens/s']:,.0f}" if "completion tokens/s" in mine else "",
                f"{one.values['flops'] / 1e12:,.4g}",
                f"{100 * mine['share of ceiling']:.0f} %" if "share of ceiling" in mine else "",
                f"{mine['peak GiB']:.2f}" if "peak GiB" in mine else "",
                "" if one.error is None else f"{one.error:.1e}",
                target_cell(TARGETS, machine, result.name, one.name, mine),
            ]
        )
    said = str(result[OURS].values.get("said", ""))
    return Table(f"{result.name}: {_shape(result)}", [*header, "error", ""], rows, f"Ours: {said}." if said else "")


def _agreement_table(result: Result, machine: Mapping[str, Any]) -> Table:
    rows, found = [], figures(result)
    for one in result.measured:
        error = "" if one.error is None else f"{one.error:.2e}"
        values = [f"{one.values[key]:.4f}" if key in one.values else "" for key in ("mean |d log p|", "max |d log p|")]
        target = target_cell(TARGETS, machine, result.name, one.name, found.get(one.name, {}))
        rows.append([one.name, *values, error, target or failure_cell(one.failure)])
    header = ["way", "mean abs. error of log p, nats", "largest", "worst gradient, relative", ""]
    return Table(f"{result.name}, against fp32: {_shape(result)}", header, rows)


def plots(results: Sequence[Result], out: Path) -> list[Path]:
    return [*update_plots.draw(results, figures, out), *_profiles(results, out)]


def _profiles(results: Sequence[Result], out: Path) -> Iterator[Path]:
    """Writes the profiles of the cases that have one."""
    for result in results:
        if text := result[OURS].values.get("profile"):
            path = out / f"update-profile-{slug(result.name)}.txt"
            write_whole(path, text)
            yield path


def _shape(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['backbone']}, {settings['prompts']} prompts of {settings['image_tokens']} image and "
        f"{settings['text_tokens']} text tokens, {settings['group']} completions each of {settings['length']}"
    )


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
