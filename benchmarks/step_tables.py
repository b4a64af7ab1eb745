"""What the step suite says of its results: figures, targets and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from results import Result
from step_setting import AHEAD, GRPO, MICRO_BATCH, MRPO, OURS, REFERENCE, REFERENCE_MICRO_BATCH, TRL
from tables import Table, Target, failure_cell, h200, target_cell, two_cores

SMALL, BIG = "phantom policy", "Qwen3-VL-8B"
MAIN_CPU = f"64 samples, {SMALL}"
MAIN_LORA, MAIN_FULL = f"64 samples, {BIG}, LoRA", f"64 samples, {BIG}, all parameters"
PAIR, SHAPING = "MRPO beside GRPO", "shaping, share of the step"
STAGES = ("rollout", "judge", "logprobs", "update", "sync")

TARGETS = (
    Target(MAIN_CPU, OURS, f"faster than {TRL}", "at least", 2.0, "x", two_cores),
    *(
        Target(case, name, f"faster than {rival}", "at least", limit, "x", h200)
        for case in (MAIN_LORA, MAIN_FULL)
        for name in (OURS, AHEAD)
        for rival, limit in ((TRL, 4.0), (REFERENCE, 40.0))
    ),
    Target(PAIR, MRPO, f"of {GRPO}", "at most", 1.01, "x", lambda machine: h200(machine) or two_cores(machine)),
    Target(PAIR, MRPO, SHAPING, "at most", 0.01, "%", lambda machine: h200(machine) or two_cores(machine)),
)


def figures(result: Result) -> dict[str, dict[str, float]]:
    """By way: seconds, samples and completion tokens a second, stages, peak memory, how much faster than whom."""
    settings, found = result.settings, {}
    samples = settings["prompts"] * settings["group"]
    for one in result.measured:
        if one.seconds is None or one.failure:
            continue
        mine = {"seconds": one.seconds, "samples/s": samples / one.seconds}
        mine["completion tokens/s"] = samples * settings["length"] / one.seconds
        if one.peak_bytes is not None:
            mine["peak GiB"] = one.peak_bytes / 2**30
        mine |= {name: value for name, value in one.values.items() if name.endswith(" s") or name == f"of {GRPO}"}
        for rival in (TRL, REFERENCE):
            other = result[rival]
            if rival != one.name and other.seconds is not None and not other.failure:
                mine[f"faster than {rival}"] = other.seconds / one.seconds
        if one.name == MRPO and (plain := result[GRPO]).seconds:
            mine[SHAPING] = (one.values["shaping s"] - plain.values["shaping s"]) / plain.seconds
        found[one.name] = mine
    return found


def summary(results: Sequence[Result]) -> list[Table]:
    shown = [result for result in results if result.measured and not result.settings["sweep"]]
    tables = [_main_table(result) for result in shown if result.settings["kind"] == "step"]
    return tables + [_pair_table(result) for result in shown if result.settings["kind"] == "pair"]


def details(results: Sequence[Result], machine: Mapping[str, Any]) -> list[Table]:
    shown = [result for result in results if result.measured and result.settings["kind"] == "step"]
    return [_detail_table(result, machine) for result in shown]


def _main_table(result: Result) -> Table:
    """What a step takes and where its time goes; ours and how many times faster it is."""
    found, rows = figures(result), []
    rivals = [name for name in (TRL, REFERENCE) if name in found]
    for one in result.measured:
        mine = found.get(one.name)
        if mine is None:
            rows.append([one.name, failure_cell(one.failure), *[""] * (3 + len(rivals) + len(STAGES))])
            continue
        ratios = [f"{mine[key]:.1f} x" if (key := f"faster than {rival}") in mine else "" for rival in rivals]
        stages = [f"{value:.2f}" if (value := mine.get(f"{stage} s")) is not None else "" for stage in STAGES]
        memory = f"{mine['peak GiB']:.1f}"
        speeds = [f"{mine['samples/s']:.1f}", f"{mine['completion tokens/s']:,.0f}"]
        rows.append([one.name, f"{mine['seconds']:.2f}", *ratios, *speeds, *stages, memory])
    header = ["way", "s", *(f"speed, {rival} = 1" for rival in rivals), "samples/s", "completion tokens/s"]
    header += [f"{stage}, s" for stage in STAGES] + ["peak, GiB"]
    return Table(f"A whole step: {result.name}", header, rows, _note(result))


def _note(result: Result) -> str:
    settings = result.settings
    median, tail = settings["latency"]
    ways = result.settings["ways"]
    rounds = settings["rounds"]
    samples = settings["prompts"] * settings["group"]
    part = ""
    if rounds:
        part = f" The {REFERENCE} was measured on {rounds * REFERENCE_MICRO_BATCH} samples and scaled to {samples}."
    ahead = ""
    if AHEAD in ways:
        ahead = f" `{AHEAD}` is rollout.ahead=1: completions are one update old, and logprobs are the old policy's."
    return (
        f"{settings['prompts']} prompts of {settings['image_tokens']} image tokens, {settings['group']} completions "
        f"each of {settings['length']} tokens. Judge: median {median:g} s, 99th percentile {tail:g} s; its column is "
        f"the time spent waiting for verdicts.{_conditions(result)}{ahead}{part}"
    )


def _conditions(result: Result) -> str:
    """On a CPU no way has vLLM."""
    on_cpu = f" Ours and {TRL} sample with transformers." if SMALL in result.name else ""
    return f"{on_cpu} Algorithm {GRPO}; {TRL}'s micro-batches hold {MICRO_BATCH} samples."


def _pair_table(result: Result) -> Table:
    one = result[MRPO]
    rows = []
    for name in (GRPO, MRPO):
        found = result[name]
        if found.seconds is None:
            rows.append([name, failure_cell(found.failure), "", "", ""])
            continue
        values = [found.values[key] for key in (f"of {GRPO}", "low", "high") if key in found.values]
        more, *bounds = [f"{100 * (value - 1):+.2f} %" for value in values] or [""]
        shaping = f"{1e3 * found.values['shaping s']:.1f}"
        rows.append([name, f"{found.seconds:.3f}", shaping, more, " to ".join(bounds)])
    note = (
        f"Same process, same completions, judge in the process; median of {one.runs} pairs. The two differ in how the "
        "advantages of completions become those of tokens, which is also timed alone."
    )
    header = ["algorithm", "s", "advantages of tokens, ms", f"more than {GRPO}", "95 % interval"]
    return Table(f"{PAIR}: {result.settings['prompts'] * result.settings['group']} samples", header, rows, note)


def _detail_table(result: Result, machine: Mapping[str, Any]) -> Table:
    found, rows = figures(result), []
    for one in result.measured:
        mine = found.get(one.name, {})
        error = "" if one.error is None else f"{one.error:.1e}"
        if not mine or one.low is None or one.high is None:
            rows.append([one.name, failure_cell(one.failure), *[""] * 8, error, ""])
            continue
        stages = [f"{value:.3g}" if (value := mine.get(f"{stage} s")) is not None else "" for stage in STAGES]
        target = target_cell(TARGETS, machine, result.name, one.name, mine)
        spread = f"{one.low:.3g} to {one.high:.3g}"
        speeds = [f"{mine['completion tokens/s']:,.0f}", f"{mine['peak GiB']:.2f}"]
        rows.append([one.name, f"{one.seconds:.3g}", spread, *speeds, *stages, error, target])
    header = ["way", "s", "fastest to slowest", "completion tokens/s", "peak, GiB"]
    header += [f"{stage}, s" for stage in STAGES] + ["error", ""]
    return Table(result.name, header, rows)
