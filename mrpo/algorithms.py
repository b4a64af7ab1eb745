"""From rewards to advantages: one number per completion, compared within its group of G completions.

Every function sees the global batch, all P prompts of a step, so advantages do not depend on the number of processes.
NaN marks the process reward of an unjudged completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Literal

import torch

from mrpo.config import Config

EPSILON = 1e-4


def advantages(config: Config, answer: torch.Tensor, process: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The advantages of `config.algorithm`, before step-wise shaping.

    `mrpo` and `grpo` compare the weighted sum of the rewards; `gdpo` compares each reward alone first. `sft` samples
    nothing, and has none.

    Args:
        answer, process, length: (P, G) rewards; process is NaN where unjudged.

    Returns:
        (P, G) in the dtype of `answer`, finite.

    Raises:
        ValueError: the algorithm has no advantages.
    """
    weights = (config.reward.answer_weight, config.reward.process_weight, config.reward.length_weight)
    if config.algorithm == "gdpo":
        return gdpo_advantages(torch.stack((answer, process, length)), torch.tensor(weights))
    if config.algorithm not in ("mrpo", "grpo"):
        raise ValueError(f"algorithm {config.algorithm!r} has no advantages here")
    parts = torch.stack((answer, fill_unjudged(process), length))
    total = torch.einsum("n,npg->pg", torch.tensor(weights).to(parts), parts)
    return group_advantages(total, normalize=config.advantage.normalize)


def fill_unjudged(process: torch.Tensor) -> torch.Tensor:
    """Gives each unjudged completion the mean process reward of its group, so that it neither gains nor loses by it.

    The others keep their distance from the group's mean, which a verdict of "all steps invalid" would shift.

    Args:
        process: (P, G), NaN where unjudged.

    Returns:
        (P, G) without NaN; 0 in a group without any judged completion.
    """
    mean = _mean(process.double(), dim=1).nan_to_num(nan=0.0)
    return torch.where(process.isnan(), mean.to(process.dtype), process)


def group_advantages(rewards: torch.Tensor, *, normalize: Literal["group_std", "group_mean"]) -> torch.Tensor:
    """(R - mean) / (std + 1e-4) within each group, std with Bessel's correction, or R - mean alone.

    Groups of equal rewards give exact zeros. A NaN takes no part in its group's statistics and becomes 0. Computed in
    float64. GRPO: arXiv 2402.03300; without std: Dr. GRPO, arXiv 2503.20783.

    Args:
        rewards: (P, G).

    Returns:
        (P, G) in the dtype of `rewards`.
    """
    return _standardized(rewards, dim=1, scale=normalize == "group_std")


def gdpo_advantages(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """GDPO (arXiv 2601.05242): rewards normalised one by one in their groups, summed, then normalised over the batch.

    An unjudged completion takes no part in its group's statistics of that reward and adds 0 to its own sum.

    Args:
        parts: (N, P, G) rewards, NaN where there is none.
        weights: (N,).

    Returns:
        (P, G) in the dtype of `parts`.
    """
    scores = _standardized(parts, dim=2, scale=True)
    summed = torch.einsum("n,npg->pg", weights.to(scores), scores)
    return _standardized(summed.flatten(), dim=0, scale=True).view_as(summed)


def telescoped_credits(advantages: Sequence[float], histories: Sequence[tuple[bool, ...] | None]) -> list[list[float]]:
    """Which step of each completion of a group earned how much of its advantage, as far as verdicts tell.

    The value of a history of verdicts is the mean advantage of those completions of the group whose verdicts begin with
    it. A step earns the value of the history with it minus that without it, and what follows the last step the
    completion's advantage minus the value of its whole history. So the credits of a completion add up to its advantage
    (minus the mean of the judged ones), those of the completions that share a history average to zero at its next
    step, and a step where no verdict sets them apart earns nothing. These are the TD errors of a value function over
    histories. VinePPO (arXiv 2410.01679) finds such values by further rollouts; here verdicts tell states apart, and
    the group is all there is.

    Args:
        advantages: of the G completions.
        histories: whether each step is valid, in order; None: not judged, and left out of the values.

    Returns:
        For each completion the credits of its K steps, then of the tokens outside them: K + 1 numbers; of one that was
        not judged, its advantage alone.
    """
    sharing: dict[tuple[bool, ...], list[float]] = {}
    for advantage, history in zip(advantages, histories, strict=True):
        if history is not None:
            for k in range(len(history) + 1):
                sharing.setdefault(history[:k], []).append(advantage)
    value = {history: fmean(found) for history, found in sharing.items()}
    credits = []
    for advantage, history in zip(advantages, histories, strict=True):
        if history is None:
            credits.append([advantage])
        else:
            path = [*(value[history[:k]] for k in range(len(history) + 1)), advantage]
            credits.append([after - before for before, after in pairwise(path)])
    return credits


def _standardized(values: torch.Tensor, *, dim: int, scale: bool) -> torch.Tensor:
    exact = values.double()
    centered = (exact - _mean(exact, dim)).nan_to_num(nan=0.0)
    if scale:
        count = (~exact.isnan()).sum(dim, keepdim=True)
        variance = centered.square().sum(dim, keepdim=True) / (count - 1).clamp_min(1)
        centered = centered / (variance.sqrt() + EPSILON)
    return centered.to(values.dtype)


def _mean(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The mean without NaN, kept within the values' range, since rounding would set equal rewards apart."""
    missing = values.isnan()
    low = values.masked_fill(missing, torch.inf).amin(dim, keepdim=True)
    high = values.masked_fill(missing, -torch.inf).amax(dim, keepdim=True)
    return torch.where(missing.all(dim, keepdim=True), torch.nan, values.nanmean(dim, keepdim=True).clamp(low, high))
