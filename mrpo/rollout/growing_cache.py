"""A key-value cache that is not copied for every token."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """A layer whose keys and values lie in buffers with room for more; transformers' own copies all of them each time.

    `keys` and `values`, (B, H, L, D), are views of the buffers up to the last token. There is never room for more than
    `limit` tokens.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, the new ones (B, H, T, D) last."""
        if self.keys is None or self.values is None or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            room = max(end, min(end + max(_LEAST_ROOM, end // 4), self._limit))
            self._buffers = (_with_room(self.keys, room), _with_room(self.values, room))
        keys, values = self._buffers
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._buffers = None

    def reset(self) -> None:
        super().reset()
        self._buffers = None


def growing_cache(limit: int) -> Cache:
    """An empty cache of `GrowingLayer`s for `limit` tokens a row."""
    return Cache(layer_class_to_replicate=cast(Any, partial(GrowingLayer, limit)))


def _with_room(states: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of (B, H, L, D) with place for `length` tokens."""
    buffer = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    buffer[..., : states.shape[-2], :] = states
    return buffer
