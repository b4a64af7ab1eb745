"""What a step tells of itself: metrics of the score table and of the update."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from mrpo.config import Config
from mrpo.mismatch import mismatch_metrics
from mrpo.runtime import Runtime
from mrpo.scoring import PARTS, mean_reward, total_reward
from mrpo.update_stats import STAT_NAMES, UpdateStats, work_metrics

# metric: column of the score table
_MEANS = {
    "reward/answer": "answer",
    "reward/process": "process",
    "reward/length": "length",
    "answer/correct": "correct",
    "failures/early": "early",
    "failures/mid": "mid",
    "failures/late": "late",
    "far": "far",
    "valid_steps": "valid_steps",
    "num_steps": "num_steps",
    "completion/tokens": "tokens",
    "completion/truncated": "truncated",
    "unjudged": "unjudged",
}


def score_metrics(table: Mapping[str, torch.Tensor], config: Config) -> dict[str, float]:
    """Means over the completions of all processes; NaN where none has the value."""
    reward = total_reward(table, config)
    group_std = reward.view(-1, config.rollout.group_size).std(dim=1).mean()
    means = {name: values.nanmean().item() for name, values in table.items()}
    parts = {f"answer/{name}": means[name] for name in PARTS if not math.isnan(means[name])}
    totals = {"reward": mean_reward(table, config), "reward/std": group_std.item()}
    totals["completion/tokens_total"] = table["tokens"].sum().item()
    return totals | {name: means[column] for name, column in _MEANS.items()} | parts


def update_metrics(stats: UpdateStats, lr: float, runtime: Runtime) -> dict[str, float]:
    """Means over the tokens of all processes that the loss was computed for. Every process must call this."""
    sums = dict(zip(STAT_NAMES, runtime.sum(stats.sums).tolist(), strict=True))
    tokens = max(1.0, sums.pop("tokens"))
    weighted = {name: sums.pop(name) for name in ("loss", "nll")}
    metrics = weighted | {name: value / tokens for name, value in sums.items()}
    metrics |= {"grad_norm": stats.grad_norm, "lr": lr}
    if torch.cuda.is_available():
        metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    metrics |= work_metrics(runtime.sum(stats.work), runtime.world_size)
    return metrics | mismatch_metrics(torch.cat(runtime.gather_objects(stats.mismatch)))
