"""Run under the launcher: one update on fixed completions in several settings; rank 0 writes what came out.

usage: update_worker.py FOLDER OUT, FOLDER holding a model of each family
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

sys.path.insert(0, str(Path(__file__).parents[1]))
from grouped_rows import make_groups, randomize_adapters
from tiny_models import TINY_FAMILIES

from mrpo.backbones import load_model, load_processor
from mrpo.batching import Row
from mrpo.config import Config
from mrpo.policy import Policy
from mrpo.runtime import Runtime

SHARES = {1: ((0, 1, 2, 3, 4),), 2: ((0, 2, 3, 4), (1,))}  # groups by process: of two, one has but text
PARTS = 6
Failure = Literal["forward", "backward"]


def settings(world_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings of the updates: `family`, `lora`, `fails` and `in_parts` are read here, the rest is config."""
    yield "lora zero 0", {"lora": True}
    for stage in (0, 1, 2, 3):
        yield f"qwen3_vl zero {stage}", {"deepspeed.zero_stage": stage}
    for stage in (0, 1):
        for fails in ("forward", "backward"):
            yield f"qwen3_vl zero {stage} fails {fails}", {"deepspeed.zero_stage": stage, "fails": fails}
    for stage in (0, 1, 2, 3):
        yield f"qwen3_vl zero {stage} in parts", {"deepspeed.zero_stage": stage, "in_parts": True}
    for stage in (0, 1):
        setting = {"deepspeed.zero_stage": stage, "in_parts": True, "fails": "backward"}
        yield f"qwen3_vl zero {stage} in parts fails backward", setting
    yield from alone() if world_size == 1 else together()


def alone() -> Iterator[tuple[str, dict[str, Any]]]:
    """What the others are compared with, and what needs one process only."""
    yield "lora dense", {"update.packing": "dense", "lora": True}
    for family in TINY_FAMILIES:
        yield f"{family} dense", {"family": family, "update.packing": "dense"}
    for stage in (0, 1):
        bf16 = {"model.dtype": "bfloat16", "deepspeed.zero_stage": stage}
        yield f"bf16 zero {stage}", bf16
        yield f"bf16 zero {stage} fails backward", bf16 | {"fails": "backward"}


def together() -> Iterator[tuple[str, dict[str, Any]]]:
    """What differs where weights are sharded."""
    sharded = {"deepspeed.zero_stage": 3}
    yield "qwen2_5_vl zero 3", {"family": "qwen2_5_vl"} | sharded
    yield "internvl zero 3", {"family": "internvl"} | sharded
    yield "qwen3_vl dense zero 3", {"update.packing": "dense"} | sharded
    yield "qwen3_vl offloaded reference", {"loss.reference_offload": True} | sharded
    yield "lora zero 3", {"lora": True} | sharded


def one_update(folder: Path, runtime: Runtime, setting: dict[str, Any]) -> dict[str, Any]:
    family, lora = setting.pop("family", "qwen3_vl"), setting.pop("lora", False)
    fails, in_parts = setting.pop("fails", None), setting.pop("in_parts", False)
    config = make_config(folder / family, setting | ({"model.lora_rank": 2, "model.lora_alpha": 4.0} if lora else {}))
    model = load_model(config.model)
    randomize_adapters(model)
    policy = Policy(model, load_processor(config), config, runtime)
    groups = make_groups(policy.processor)
    rows = [row for i in SHARES[runtime.world_size][runtime.rank] for row in groups[i]]
    rows = policy.with_logprobs(rows, old=True)
    if fails and runtime.rank == 0:
        fail_once(policy, fails)
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    gradients = spy_on_gradients(policy, parameters)
    run: list[int] = []  # passes, when each part was asked for
    stats = policy.update_in_parts(parts(policy, rows, run), lr=1e-3) if in_parts else policy.update(rows, lr=1e-3)
    return {
        "passes before parts": run,
        "gradients": gradients,
        "weights": {n: whole(p, config.deepspeed.zero_stage) for n, p in parameters.items()},
        "sums": runtime.sum(stats.sums),
        "work": runtime.sum(stats.work),
        "norm": stats.grad_norm,
        "logprobs": merged_logprobs(runtime, rows),
        "messages": stats.messages,
    }


def make_config(folder: Path, fields: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": str(folder)},
        "loss": {"beta": 0.05},
        "optim": {"micro_batch_size": 3, "max_grad_norm": 0.01},
        "update": {"packing": "shared_prefix", "token_budget": 330},
    }
    for key, value in fields.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


def parts(policy: Policy, rows: list[Row], run: list[int]) -> Iterator[tuple[list[Row], bool]]:
    """Rows of one prompt after the other; on two processes some parts are empty, one of them on both."""
    count = 0

    def passed(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = policy.model.lm_head.register_forward_hook(passed)
    found = {id(row.prompt): row.prompt for row in rows}.values()
    *prompts, last = [[row for row in rows if row.prompt is prompt] for prompt in found]
    shares = [*prompts[:1], *[[]] * (PARTS - len(found)), *prompts[1:], last]
    for i, share in enumerate(shares):
        run.append(count)
        yield share, i == len(shares) - 1
    handle.remove()


def fail_once(policy: Policy, where: Failure) -> None:
    """Lets the first pass run out of memory behind its forward pass, or the last one amid its backward pass."""
    failed = False

    def fail(*_: Any) -> None:
        nonlocal failed
        if not failed and (where == "forward" or policy.engine.is_gradient_accumulation_boundary()):
            failed = True
            raise torch.OutOfMemoryError("injected")

    if where == "backward":
        policy.model.model.language_model.layers[1].mlp.gate_proj.weight.register_hook(fail)
    else:
        policy.model.lm_head.register_forward_hook(fail)


def spy_on_gradients(policy: Policy, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients that the step will see."""
    gradients: dict[str, torch.Tensor] = {}
    step = policy.engine.step

    def spy() -> None:
        for name, parameter in parameters.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                gradients[name] = gradient.clone().view(getattr(parameter, "ds_shape", parameter.shape))
        step()

    policy.engine.step = spy
    return gradients


def whole(parameter: torch.Tensor, stage: int) -> torch.Tensor:
    found = safe_get_full_fp32_param(parameter) if stage else None
    return (
        (parameter if found is None else found).detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    )


def merged_logprobs(runtime: Runtime, rows: list[Row]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Old and reference log-probabilities of every group, over all processes."""
    mine = [(row.old_logprobs, row.ref_logprobs) for row in rows]
    shares = SHARES[runtime.world_size]
    sizes = [sum((8, 3, 4, 1, 5)[i] for i in share) for share in shares]
    assert len(mine) == sizes[runtime.rank]
    found: dict[int, Any] = {}
    for share, pairs in zip(shares, runtime.gather_objects(mine), strict=True):
        for i in share:
            count = (8, 3, 4, 1, 5)[i]
            found[i] = tuple(torch.cat([pair[side] for pair in pairs[:count]]) for side in (0, 1))
            pairs = pairs[count:]
    return found


def main() -> None:
    folder, out = [Path(a) for a in sys.argv[1:] if not a.startswith("--local_rank")]
    runtime = Runtime.start(seed=0)
    results = {name: one_update(folder, runtime, setting) for name, setting in settings(runtime.world_size)}
    if runtime.is_main:
        torch.save(results, out)
    runtime.finish()


if __name__ == "__main__":
    main()
