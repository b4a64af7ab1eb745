"""The cache with room against transformers' own, which copies itself for every token."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from mrpo.rollout.growing_cache import growing_cache


def test_it_holds_what_a_dynamic_cache_holds_and_seldom_moves() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = (5, *[1] * 200, 3, *[1] * 20)
    ours, theirs = growing_cache(sum(lengths)), DynamicCache()
    places: set[int] = set()
    batch = 3
    for length in lengths:
        for layer in range(2):
            new = [torch.randn(batch, 2, length, 4, generator=generator) for _ in range(2)]
            found, expected = ours.update(*new, layer), theirs.update(*new, layer)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert found[0].untyped_storage().nbytes() <= sum(lengths) * batch * 2 * 4 * 4
        places.add(found[0].data_ptr())
        assert ours.get_seq_length() == theirs.get_seq_length()
        if ours.get_seq_length() == 5:
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(2)
            batch *= 2
        if ours.get_seq_length() == 20:
            for cache in (ours, theirs):
                cache.batch_select_indices(torch.tensor([0, 2, 5]))
            batch = 3
        if ours.get_seq_length() == 30:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert len(places) < 8
