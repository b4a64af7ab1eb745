"""How far the sampler's log-probabilities of its own tokens stand from the trainer's.

An engine with kernels of its own samples from a slightly other distribution than the one that is trained. Every figure
is an estimate over the sampled tokens, so it needs no distribution but only the two log-probabilities of each token.
"""

from __future__ import annotations

import torch

# Everything but the largest difference is a sum, so that processes and micro-batches can be put together.
_SUMS = ("absolute", "kl", "weight", "weight_squared", "tokens")


def mismatch_row(trainer: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
    """(6,) float64 figures of (N,) tokens, to be stacked with those of other tokens for `mismatch_metrics`."""
    delta = trainer.double() - sampler.double()
    weight = delta.exp()
    largest = delta.abs().max() if len(delta) else delta.new_zeros(())
    sums = [delta.abs().sum(), (weight - delta - 1).sum(), weight.sum(), weight.square().sum()]
    return torch.stack([*sums, delta.new_tensor(float(len(delta))), largest])


def mismatch_metrics(rows: torch.Tensor) -> dict[str, float]:
    """Metrics over all tokens behind (n, 6) `rows` of `mismatch_row`; empty without any token.

    mismatch/mean, mismatch/max: |Δ log p| in nats; mismatch/kl: KL(sampler || trainer), k3 estimate, nats;
    mismatch/effective: effective sample share (Σw)² / (N Σw²) in (0, 1], w = p_trainer / p_sampler.
    """
    sums = dict(zip(_SUMS, rows[:, :-1].sum(dim=0).tolist(), strict=True))
    tokens = sums["tokens"]
    if tokens == 0:
        return {}
    return {
        "mismatch/mean": sums["absolute"] / tokens,
        "mismatch/max": rows[:, -1].max().item(),
        "mismatch/kl": sums["kl"] / tokens,
        "mismatch/effective": sums["weight"] ** 2 / (tokens * sums["weight_squared"]),
    }
