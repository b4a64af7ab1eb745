"""What the rollout suite says of its results: figures, targets and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from results import Measured, Result
from rollout_setting import HF, OURS, REFERENCE, TRL
from tables import Table, Target, failure_cell, target_cell

SMALL, BIG = "phantom policy", "Qwen3-VL-8B"
MAIN_CPU, MAIN_GPU, MANY = f"64 samples, {SMALL}", f"64 samples, {BIG}", f"256 samples, {BIG}"
SYNC, SLEEP, START = "weight sync", "sleep", "engine start"
SPEED, SHARE, BEST_SHARE = "completion tokens/s", "memory given back", "memory given back, best level"

TARGETS = (
    Target(MAIN_GPU, OURS, SPEED, "at least", 6000.0, "/s"),
    Target(SYNC, OURS, "seconds", "at most", 0.2, "s"),
    Target(SLEEP, OURS, BEST_SHARE, "at least", 0.9, "%"),
)


def figures(result: Result) -> dict[str, dict[str, float]]:
    """By way that was measured: what its kind of case tells."""
    kinds = {"rollout": _rollout_figures, "sync": _sync_figures, "sleep": _sleep_figures, "start": _start_figures}
    count = kinds[result.settings["kind"]]
    return {one.name: count(one, result) for one in result.measured if one.seconds is not None and not one.failure}


def _rollout_figures(one: Measured, result: Result) -> dict[str, float]:
    """Samples and completion tokens a second, peak memory, start, and how much faster than whom."""
    assert one.seconds is not None
    settings = result.settings
    samples = settings["prompts"] * settings["group"]
    mine = {"seconds": one.seconds, "samples/s": samples / one.seconds}
    mine[SPEED] = samples * settings["length"] / one.seconds
    mine |= _peak(one) | {key: one.values[key] for key in ("start s",) if key in one.values}
    for rival in (TRL, HF, REFERENCE):
        other = result[rival]
        if rival != one.name and other.seconds is not None and not other.failure:
            mine[f"faster than {rival}"] = other.seconds / one.seconds
    return mine


def _sync_figures(one: Measured, result: Result) -> dict[str, float]:
    assert one.seconds is not None
    speed = one.values["bytes"] / one.seconds / 1e9
    return {"seconds": one.seconds, "parameters": one.values["parameters"], "GB/s": speed} | _peak(one)


def _sleep_figures(one: Measured, result: Result) -> dict[str, float]:
    """The share of the engine's memory that it gives back, its own and that of the better level."""
    assert one.seconds is not None
    timed = {key: one.values[key] for key in ("sleep s", "wake s", "start s")}
    best = max(_share(other) for other in result.measured if other.seconds is not None and not other.failure)
    freed = (one.values["awake"] - one.values["asleep"]) / 2**30
    return {"ready s": one.seconds, **timed, "given back GiB": freed, SHARE: _share(one), BEST_SHARE: best}


def _share(one: Measured) -> float:
    values = one.values
    return (values["awake"] - values["asleep"]) / (values["started"] - values["before"])


def _start_figures(one: Measured, result: Result) -> dict[str, float]:
    assert one.seconds is not None
    return {"seconds": one.seconds}


def _peak(one: Measured) -> dict[str, float]:
    return {} if one.peak_bytes is None else {"peak GiB": one.peak_bytes / 2**30}


def summary(results: Sequence[Result]) -> list[Table]:
    shown = [result for result in results if result.measured and not result.settings["sweep"]]
    tables = {"rollout": _main_table, "sync": _sync_table, "sleep": _sleep_table, "start": _start_table}
    return [tables[result.settings["kind"]](result) for result in shown]


def details(results: Sequence[Result], machine: Mapping[str, Any]) -> list[Table]:
    return [_detail_table(result, machine) for result in results if result.measured]


def _main_table(result: Result) -> Table:
    """What a round takes, and how many times faster than its rivals each way is."""
    found, settings = figures(result), result.settings
    rivals = [name for name in (TRL, HF, REFERENCE) if name in found]
    rows = []
    for one in result.measured:
        mine = found.get(one.name)
        if mine is None:
            rows.append([one.name, failure_cell(one.failure), *[""] * (len(rivals) + 4)])
            continue
        ratios = [f"{mine[key]:.1f} x" if (key := f"faster than {rival}") in mine else "" for rival in rivals]
        start = f"{mine['start s']:.1f}" if "start s" in mine else ""
        speeds = [f"{mine[SPEED]:,.0f}", f"{mine['samples/s']:,.1f}"]
        rows.append([one.name, f"{mine['seconds']:.2f}", *speeds, *ratios, f"{mine['peak GiB']:.1f}", start])
    header = ["way", "s", SPEED, "samples/s", *(f"speed, {rival} = 1" for rival in rivals)]
    part = settings["measured_prompts"]
    note = (
        f"{settings['prompts']} prompts of {settings['image_tokens']} image tokens, pictures not seen before, "
        f"{settings['group']} completions each of {settings['length']} tokens, temperature 1. Ours samples with "
        "seeds, so that a completion depends on nothing else; TRL's sets none."
    )
    if REFERENCE in settings["ways"] and 0 < part < settings["prompts"]:
        note += f" The {REFERENCE} was measured on {part} of the prompts and scaled to all."
    if settings["model"] == BIG:
        note += f" The engine of {OURS} can sleep, as in training; TRL's cannot."
    return Table(f"A rollout: {result.name}", [*header, "peak, GiB", "engine start, s"], rows, note)


def _sync_table(result: Result) -> Table:
    rows, found, note = [], figures(result), _runs(result)
    for one in result.measured:
        if one.name not in found:
            rows.append([one.name, "failed", "", "", ""])
            note += f" {one.name}: {one.failure}."
            continue
        mine = found[one.name]
        size = [f"{mine['parameters'] / 1e6:,.1f}", f"{one.values['bytes'] / 1e9:.3g}"]
        rows.append([one.name, f"{one.seconds:.3g}", *size, f"{mine['GB/s']:,.3g}"])
    header = ["way", "s", "million parameters", "GB", "GB/s"]
    return Table("Weight sync: all parameters, from the trainer to the engine", header, rows, note)


def _sleep_table(result: Result) -> Table:
    rows, found = [], figures(result)
    for one in result.measured:
        if one.name not in found:
            rows.append([one.name, failure_cell(one.failure), "", "", "", ""])
            continue
        mine = found[one.name]
        timed = [f"{mine[key]:.2f}" for key in ("sleep s", "wake s", "ready s")]
        rows.append([one.name, f"{100 * mine[SHARE]:.1f} %", f"{mine['given back GiB']:.1f}", *timed])
    header = ["way", SHARE, "GiB", "to sleep, s", "to wake, s", "until weights are back, s"]
    note = f"{_runs(result)} {OURS}: level 2, the trainer's default, in the process that sampled before."
    return Table("Sleep: of the memory that the engine took", header, rows, note)


def _start_table(result: Result) -> Table:
    rows = [
        [one.name, failure_cell(one.failure) if one.failure or one.seconds is None else f"{one.seconds:.1f}"]
        for one in result.measured
    ]
    note = "The next start is another process that finds what the first one compiled."
    return Table("Engine start", ["way", "s"], rows, note)


def _runs(result: Result) -> str:
    return f"Median of {max(one.runs for one in result.measured)}."


def _detail_table(result: Result, machine: Mapping[str, Any]) -> Table:
    found, rows = figures(result), []
    keys = list(dict.fromkeys(key for mine in found.values() for key in mine if key != "seconds"))
    checks = list(dict.fromkeys(key for one in result.measured for key in one.values if key.startswith("off by")))
    for one in result.measured:
        mine = found.get(one.name)
        if mine is None or one.low is None or one.high is None:
            rows.append([one.name, failure_cell(one.failure), *[""] * (len(keys) + len(checks) + 2)])
            continue
        cells = [f"{mine[key]:,.4g}" if key in mine else "" for key in keys]
        errors = [f"{one.values[key]:.1e}" if key in one.values else "" for key in checks]
        spread = f"{one.low:.3g} to {one.high:.3g}"
        target = target_cell(TARGETS, machine, result.name, one.name, mine)
        rows.append([one.name, f"{one.seconds:.3g}", spread, *cells, *errors, target])
    return Table(result.name, ["way", "s", "fastest to slowest", *keys, *checks, ""], rows)
