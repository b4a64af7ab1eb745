"""Which questions a step trains on: a pure function of seed and step, so that resuming needs no stored position."""

from __future__ import annotations

import math

import numpy as np

from mrpo.seeding import derive_seed


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the batch of `step` (0-based) in an endless row of shuffled passes over `num_examples`."""
    first = step * batch_size
    positions = range(first, first + batch_size)
    orders = {epoch: _shuffled(num_examples, epoch, seed) for epoch in {p // num_examples for p in positions}}
    return [int(orders[p // num_examples][p % num_examples]) for p in positions]


def steps_for(num_examples: int, batch_size: int, epochs: float) -> int:
    """Steps that show every example `epochs` times, rounded up."""
    return max(1, math.ceil(num_examples * epochs / batch_size))


def _shuffled(num_examples: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed("order", seed, epoch)).permutation(num_examples)
