"""Figures of the distance between the sampler's and the trainer's log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from mrpo.mismatch import mismatch_metrics, mismatch_row


def test_figures_by_hand() -> None:
    # Differences of log 2 and -log 2: weights of 2 and 1/2.
    trainer = torch.tensor([-1.0, -2.0])
    sampler = trainer - torch.tensor([math.log(2), -math.log(2)])
    metrics = mismatch_metrics(mismatch_row(trainer, sampler)[None])
    assert metrics["mismatch/mean"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["mismatch/max"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["mismatch/kl"] == pytest.approx((2 - 1 + 0.5 - 1) / 2, rel=1e-6)
    assert metrics["mismatch/effective"] == pytest.approx(2.5**2 / (2 * 4.25), rel=1e-6)


def test_parts_put_together_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    trainer, sampler = (-torch.rand(30, generator=generator) for _ in range(2))
    whole = mismatch_metrics(mismatch_row(trainer, sampler)[None])
    cuts = [(0, 7), (7, 7), (7, 30)]
    parts = torch.stack([mismatch_row(trainer[a:b], sampler[a:b]) for a, b in cuts])
    assert mismatch_metrics(parts) == pytest.approx(whole)


def test_k3_estimates_the_kl_of_the_sampler_from_the_trainer() -> None:
    p, q = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    tokens = torch.repeat_interleave(torch.arange(3), torch.tensor([600, 300, 100]))  # exactly as p has it
    row = mismatch_row(q.log()[tokens], p.log()[tokens])
    assert mismatch_metrics(row[None])["mismatch/kl"] == pytest.approx((p * (p / q).log()).sum().item())


def test_no_tokens_have_no_figures() -> None:
    assert mismatch_metrics(torch.zeros(0, 6)) == {}
    assert mismatch_metrics(mismatch_row(torch.zeros(0), torch.zeros(0))[None]) == {}
