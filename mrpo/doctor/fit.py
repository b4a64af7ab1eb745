"""Whether the estimated memory fits the machine, and if not, which settings make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from mrpo.config import Config
from mrpo.doctor.check import Check, gib
from mrpo.doctor.machine import Machine
from mrpo.doctor.memory import (
    Estimate,
    ModelSize,
    PromptSize,
    Term,
    engine_share,
    estimate,
    least_engine,
    loading,
    prompts_per_step,
    total,
)

CUDA_RUNTIME = 2**30  # bytes per process: CUDA context, cuBLAS workspaces, NCCL buffers
CPU_RUNTIME = 700 * 2**20  # bytes per process: the interpreter and the libraries it loads, measured
MOST_PROCESSES = 64


def check_memory(
    config: Config, machine: Machine, model: ModelSize, prompt: PromptSize, num_processes: int
) -> list[Check]:
    """Free memory against what the configuration needs: of the GPUs, and of the machine.

    `missing`: weights, gradients and optimizer states alone do not fit. `warning`: they do, but not beside the largest
    batch that the configuration allows.
    """

    def fits(changed: Config, processes: int) -> bool:
        need = estimate(changed, model, prompt, processes, on_gpu=bool(machine.gpus), card=card)
        if not machine.gpus:
            return processes * (need.peak + total(need.host) + CPU_RUNTIME) <= machine.free_memory
        host = _host_memory(changed, model, need, processes) if processes == num_processes else 0  # of another machine
        if engine_share(changed) * card < least_engine(changed, model):
            return False
        return need.peak + CUDA_RUNTIME <= free and host <= machine.free_memory

    card = min((gpu.total for gpu in machine.gpus[:num_processes]), default=0)
    need = estimate(config, model, prompt, num_processes, on_gpu=bool(machine.gpus), card=card)
    if machine.gpus:
        name, runtime = "GPU memory", Term("CUDA and NCCL", "allowance", CUDA_RUNTIME)
        free = min(gpu.free for gpu in machine.gpus[:num_processes])
    else:
        name, runtime = "memory", Term("interpreter and libraries", "allowance", CPU_RUNTIME)
        free = machine.free_memory // num_processes - total(need.host)
    if num_processes > 1:
        name += " of each process"
    check = _compare(name, need, runtime, free, prompt)
    if check.state != "ok":
        check = replace(check, remedy=_mend(config, num_processes, fits, more=bool(machine.gpus)))
    if not machine.gpus:
        return [check]
    checks = [check, _check_host(config, machine, model, need, num_processes)]
    if engine_share(config):
        checks.append(_check_engine(config, model, card, num_processes, fits))
    return checks


def _compare(name: str, need: Estimate, runtime: Term, free: int, prompt: PromptSize) -> Check:
    largest = ", ".join(f"{gib(total(terms))} in {phase}" for phase, terms in need.phases.items() if terms)
    details = (
        *(str(term) for term in (*need.standing, runtime)),
        *(f"in {phase}, {term}" for phase, terms in need.phases.items() for term in terms),
        f"sum: {gib(total(need.standing) + runtime.size)} + the largest of {largest} = {gib(need.peak + runtime.size)}",
        *(f"in main memory, {term}" for term in need.host),
        f"prompts of {prompt.tokens} tokens and {prompt.patches:,} image patches ({prompt.source})",
    )
    fact = f"takes about {gib(need.peak + runtime.size)}, {gib(free)} are free"
    if need.fixed + runtime.size > free:
        fact = f"takes at least {gib(need.fixed + runtime.size)} whatever the batch, {gib(free)} are free"
        return Check(name, "missing", fact, None, details)
    if need.peak + runtime.size > free:
        return Check(name, "warning", f"{fact}: the largest batch may not fit", None, details)
    return Check(name, "ok", fact, None, details)


def _check_engine(
    config: Config, model: ModelSize, card: int, num_processes: int, fits: Callable[[Config, int], bool]
) -> Check:
    """Whether the share of a GPU that a vLLM engine takes has room for its weights."""
    share, least = engine_share(config), least_engine(config, model)
    parallel = config.rollout.tensor_parallel
    details = (f"its weights: {gib(least)}" + (f", one of {parallel} parts" if parallel > 1 else ""),)
    fact = f"takes {share:g} x {gib(card)} = {gib(share * card)}"
    if share * card >= least:
        return Check("vLLM engine", "ok", fact, None, details)
    larger = (step / 20 for step in range(1, 20) if step / 20 > share)
    remedies = [("rollout.gpu_memory", value) for value in larger] if share == config.rollout.gpu_memory else []
    remedies += [
        ("rollout.tensor_parallel", n) for n in range(parallel + 1, num_processes + 1) if num_processes % n == 0
    ]
    found = (f"{key}={value:g}" for key, value in remedies if _possible(config, {key: value}, num_processes, fits))
    return Check("vLLM engine", "missing", f"{fact}, its weights alone {gib(least)}", next(found, None), details)


def _host_memory(config: Config, model: ModelSize, need: Estimate, num_processes: int) -> int:
    """Main memory beside GPUs: every process loads the whole model there first; later it holds what is offloaded."""
    return num_processes * (max(loading(config, model), total(need.host)) + CPU_RUNTIME)


def _check_host(config: Config, machine: Machine, model: ModelSize, need: Estimate, num_processes: int) -> Check:
    taken = _host_memory(config, model, need, num_processes)
    details = (
        f"{num_processes} x (the larger of {gib(loading(config, model))} while loading and {gib(total(need.host))} "
        f"offloaded, + {gib(CPU_RUNTIME)} for interpreter and libraries)",
    )
    fact = f"takes about {gib(taken)}, {gib(machine.free_memory)} are free"
    if taken > machine.free_memory:
        remedy = "fewer processes: mrpo train --num-gpus N" if num_processes > 1 else None
        return Check("main memory", "missing", fact, remedy, details)
    return Check("main memory", "ok", fact, None, details)


def _mend(config: Config, num_processes: int, fits: Callable[[Config, int], bool], *, more: bool) -> str | None:
    """Settings that make the run fit, none of them idle, cheapest first; else the number of GPUs that does."""
    changes: dict[str, Any] = {}
    for key, value in _savings(config, num_processes):
        changes[key] = value
        if _possible(config, changes, num_processes, fits):
            for idle in list(changes):
                fewer = {key: value for key, value in changes.items() if key != idle}
                if _possible(config, fewer, num_processes, fits):
                    changes = fewer
            return " ".join(f"{key}={_text(value)}" for key, value in changes.items())
    sharded = _with(config, {"deepspeed.zero_stage": 3})
    for processes in range(num_processes + 1, MOST_PROCESSES + 1) if more else ():
        if prompts_per_step(config) % processes == 0 and fits(sharded, processes):
            return f"a machine with {processes} such GPUs, and deepspeed.zero_stage=3"
    return None


def _possible(
    config: Config, changes: Mapping[str, Any], num_processes: int, fits: Callable[[Config, int], bool]
) -> bool:
    try:
        return fits(_with(config, changes), num_processes)
    except ValidationError:  # some settings need others, as offloading needs a ZeRO stage
        return False


def _savings(config: Config, num_processes: int) -> Iterator[tuple[str, Any]]:
    """Settings that save memory, cheapest first; a key comes again with a smaller value."""
    if config.update.checkpointing != "all":
        yield "update.checkpointing", "all"
    if engine_share(config) and config.rollout.sleep_level == 0:
        yield "rollout.sleep_level", 2
    if config.update.packing != "dense":
        for size in _halves(config.update.token_budget, config.rollout.max_tokens):
            yield "update.token_budget", size
    if config.update.packing != "shared_prefix":
        for size in _halves(config.optim.micro_batch_size, 1):
            yield "optim.micro_batch_size", size
    for size in _halves(config.rollout.batch_size, config.rollout.group_size):
        yield "rollout.batch_size", size
    if engine_share(config):
        for share in (0.3, 0.2, 0.15, 0.1):
            if share < config.rollout.gpu_memory:
                yield "rollout.gpu_memory", share
    if num_processes > 1 and config.deepspeed.zero_stage < 3:
        yield "deepspeed.zero_stage", 3
    if config.model.dtype == "float32":
        yield "model.dtype", "bfloat16"
    if not config.deepspeed.offload_optimizer:
        if config.deepspeed.zero_stage == 0 and num_processes == 1:
            yield "deepspeed.zero_stage", 2
        yield "deepspeed.offload_optimizer", True


def _halves(size: int, least: int) -> Iterator[int]:
    while size > least:
        size = max(least, size // 2)
        yield size


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    tree = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return Config.model_validate(tree)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
