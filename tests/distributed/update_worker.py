"""Run under the launcher: one update on fixed completions for each ZeRO stage; rank 0 writes what came out.

usage: update_worker.py MODEL OUT BETA
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from mrpo.backbones import load_model, load_processor
from mrpo.batching import Row
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.policy import Policy
from mrpo.runtime import Runtime

NUM_ROWS = 8


def fixed_rows(policy: Policy) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, example in enumerate(PhantomDataset("train", size=NUM_ROWS)):
        tokens = policy.processor.encode_target(example.rationale or "", example.answer)[: 12 + 4 * i]
        advantages = torch.randn(len(tokens), generator=generator)
        weights = torch.full((len(tokens),), 1 / (len(tokens) * NUM_ROWS))
        rows.append(Row(policy.processor.encode_prompt(example), tokens, advantages, weights))
    return rows


def one_update(config: Config, runtime: Runtime) -> dict[str, Any]:
    policy = Policy(load_model(config.model), load_processor(config), config, runtime)
    share = NUM_ROWS // runtime.world_size
    rows = fixed_rows(policy)[runtime.rank * share :][:share]
    rows = policy.with_logprobs(rows, old=True)
    parameters = dict(policy.model.named_parameters())
    gradients: dict[str, torch.Tensor] = {}
    step = policy.engine.step

    def spy() -> None:
        for name, parameter in parameters.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                gradients[name] = gradient.clone()
        step()

    policy.engine.step = spy
    stats = policy.update(rows, lr=1e-3)
    weights = {n: _whole(p, config.deepspeed.zero_stage) for n, p in parameters.items()}
    sums = runtime.sum(stats.sums)
    return {"gradients": gradients, "weights": weights, "sums": sums, "norm": stats.grad_norm}


def _whole(parameter: torch.Tensor, stage: int) -> torch.Tensor:
    whole = safe_get_full_fp32_param(parameter) if stage else None
    return (parameter if whole is None else whole).detach().clone()


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    model, out, beta = arguments
    runtime = Runtime.start(seed=0)
    results = {}
    for stage in (0, 1, 2, 3):
        config = Config.model_validate(
            {
                "model": {"path": model},
                "loss": {"beta": float(beta)},
                "optim": {"micro_batch_size": 3, "max_grad_norm": 0.01},
                "deepspeed": {"zero_stage": stage},
            }
        )
        results[stage] = one_update(config, runtime)
    if runtime.is_main:
        torch.save(results, Path(out))
    runtime.finish()


if __name__ == "__main__":
    main()
