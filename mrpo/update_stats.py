"""What an update tells of itself: sums over tokens, the work it took, how far sampler and trainer stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mrpo.batching import Row
from mrpo.kernels.prefix_attention import compilations
from mrpo.mismatch import mismatch_row
from mrpo.passes import Pass


@dataclass(frozen=True)
class UpdateStats:
    """Sums over this process's tokens in one update, and the gradient norm of all.

    sums: float64 of loss, nll (both weighted), kl, clipped low, clipped high, entropy, and the number of tokens that
    these were computed for: those that the loss depends on. work: float64 of passes, tokens that they computed, padding
    among these, passes split for want of memory, and graphs compiled since the process began. mismatch: (n, 6) rows of
    `mismatch_row`, n = 0 if the sampler told no log-probabilities. messages: for the run's log.
    """

    sums: torch.Tensor
    work: torch.Tensor
    grad_norm: float
    mismatch: torch.Tensor
    messages: tuple[str, ...] = ()


STAT_NAMES = ("loss", "nll", "kl", "clip/low", "clip/high", "entropy", "tokens")


def work_metrics(work: torch.Tensor, world_size: int) -> dict[str, float]:
    """Metrics of `UpdateStats.work` summed over processes: means per process, the padding's share of tokens, splits."""
    passes, tokens, padding, splits, graphs = work.tolist()
    return {
        "update/passes": passes / world_size,
        "update/tokens": tokens / world_size,
        "update/padding": padding / max(1.0, tokens),
        "update/splits": splits,
        "update/compilations": graphs / world_size,
    }


@dataclass(frozen=True)
class PassResult:
    """What a pass gave: tokens computed, padding included; its loss, []; of its N completion tokens, values, [N]."""

    size: int
    loss: torch.Tensor
    logprobs: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor


def computed_tokens(row: Row) -> torch.Tensor:
    """(T,) bool: the tokens that the loss depends on; the head drops the others."""
    return (row.weights != 0) & ((row.advantages != 0) | (row.ref_logprobs is not None))


def stat_sums(results: Sequence[tuple[Pass, PassResult]]) -> torch.Tensor:
    """`UpdateStats.sums`."""
    return torch.stack([_pass_sums(passed, result) for passed, result in results]).sum(dim=0)


def work(results: Sequence[tuple[Pass, PassResult]], splits: int) -> torch.Tensor:
    """`UpdateStats.work`."""
    tokens = sum(result.size for _, result in results)
    padding = tokens - sum(passed.tokens for passed, _ in results)
    return torch.tensor([len(results), tokens, padding, splits, compilations()], dtype=torch.float64)


def _pass_sums(passed: Pass, result: PassResult) -> torch.Tensor:
    """Sums of one pass. What the clip cut is low or high by the sign of the advantage."""
    weights = torch.cat([row.weights for row in passed.rows]).double()
    advantages = torch.cat([row.advantages for row in passed.rows])
    clipped = result.clipped.cpu()
    sums = {
        "loss": result.loss.cpu(),
        "nll": -(result.logprobs.cpu().double() * weights).sum(),
        "kl": result.kl.cpu().double().sum(),
        "clip/low": (clipped & (advantages < 0)).sum(),
        "clip/high": (clipped & (advantages > 0)).sum(),
        "entropy": result.entropy.cpu().double().sum(),
        "tokens": torch.cat([computed_tokens(row) for row in passed.rows]).sum(),
    }
    return torch.stack([sums[name].double() for name in STAT_NAMES])


def mismatch(results: Sequence[tuple[Pass, PassResult]]) -> torch.Tensor:
    """`UpdateStats.mismatch`: one row over all computed tokens that have the sampler's log-probabilities, if any."""
    trainer: list[torch.Tensor] = []
    sampler: list[torch.Tensor] = []
    for passed, result in results:
        own = result.logprobs.cpu().split([len(row.token_ids) for row in passed.rows])
        for row, values in zip(passed.rows, own, strict=True):
            if row.sampler_logprobs is not None:
                computed = computed_tokens(row)
                trainer.append((values if row.old_logprobs is None else row.old_logprobs)[computed])
                sampler.append(row.sampler_logprobs[computed])
    if not trainer:
        return torch.zeros(0, 6, dtype=torch.float64)
    return mismatch_row(torch.cat(trainer), torch.cat(sampler))[None]
