"""From the advantage of a completion to those of its tokens: MRPO's shaping, or telescoped credit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mrpo.algorithms import telescoped_credits
from mrpo.config import Config
from mrpo.kernels import step_advantages
from mrpo.records import ScoredCompletion, Verdict
from mrpo.steps import step_ids


def token_advantages(
    config: Config, scored: Sequence[ScoredCompletion], advantages: torch.Tensor
) -> list[torch.Tensor]:
    """(T,) float32 advantages of each completion's tokens: its own for GRPO and GDPO, shaped by verdicts for MRPO.

    Args:
        scored: B completions, group by group.
        advantages: (B,) of the completions, compared within their groups.
    """
    if config.algorithm != "mrpo":
        lengths = [len(item.completion.token_ids) for item in scored]
        return [value.expand(length) for value, length in zip(advantages.float(), lengths, strict=True)]
    if config.advantage.credit == "telescoped":
        return _telescoped(scored, advantages, config.rollout.group_size)
    return _shaped(config, scored, advantages)


def _shaped(config: Config, scored: Sequence[ScoredCompletion], advantages: torch.Tensor) -> list[torch.Tensor]:
    """The paper's: tokens of a wrong answer are rewarded or punished by their step's verdict and place."""
    lengths = [len(item.completion.token_ids) for item in scored]
    width, length = max(1, *(len(item.steps) for item in scored)), max(lengths)
    validity = [item.verdict.validity if isinstance(item.verdict, Verdict) else () for item in scored]
    shaped = step_advantages(
        advantages.float(),
        torch.tensor([item.rewards.answer > config.advantage.tau for item in scored]),
        torch.tensor([step_ids(item.steps, length) for item in scored]),
        torch.tensor([[*valid, *[False] * (width - len(valid))] for valid in validity]),
        torch.tensor([len(valid) for valid in validity]),
        penalty=config.advantage.penalty,
        round_weights=config.advantage.round_weights,
    )
    return [row[:length] for row, length in zip(shaped, lengths, strict=True)]


def _telescoped(scored: Sequence[ScoredCompletion], advantages: torch.Tensor, group_size: int) -> list[torch.Tensor]:
    """Each step's tokens get the step's credit, all others what is left."""
    histories = [item.verdict.validity if isinstance(item.verdict, Verdict) else None for item in scored]
    rows = []
    for first in range(0, len(scored), group_size):
        group = slice(first, first + group_size)
        for item, credits in zip(
            scored[group], telescoped_credits(advantages[group].tolist(), histories[group]), strict=True
        ):
            # The last credit is that of tokens outside every step, whose number is -1.
            ids = torch.tensor(step_ids(item.steps, len(item.completion.token_ids)), dtype=torch.long)
            rows.append(torch.tensor(credits)[ids.clamp(max=len(credits) - 1)])
    return rows
