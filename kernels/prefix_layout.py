"""Who sees whom in a packed row: groups `[prompt, completion 1 ... completion G]` one after the other, then padding.

A token sees an interval of its own part, up to itself, and if it belongs to a completion also its group's prompt. So
three numbers a token say everything; masks and the spans of variable-length kernels follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from .checks import require
from .transfer import send

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Spans:
    """Pairs of a stretch of queries and the stretch of keys that it sees, in order and without gaps.

    queries, keys: (S + 1,) int32, where each stretch begins and the last ends; a stretch may be empty.
    max_queries, max_keys: the longest stretch of each.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def make(cls, lengths: Sequence[tuple[int, int]], device: torch.device) -> Spans:
        """From the numbers of queries and keys of each pair."""
        queries, keys = zip(*lengths, strict=True)
        ends = send(torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32), device)
        return cls(ends[0], ends[1], max(queries), max(keys))


class FlashSpans(NamedTuple):
    """What two variable-length calls need of a layout.

    own: (S + 1,) int32, every part with itself; queries, keys: (S + 1,) int32, completions with their prompts, or (0,)
    where there are no completions; has_prefix: (L,) bool; longest: the longest stretch of each of the three.
    """

    own: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    has_prefix: torch.Tensor
    longest: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """One packed row of `length` tokens. Made by `make`; masks are built when first asked for and then kept.

    groups: prompt length and completion lengths of each group, in order;
    own_start: (L,) int32, where the part that a token belongs to begins (prompt, completion or padding);
    prefix_start, prefix_end: (L,) int32, the prompt that a completion's token sees; empty for others.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    length: int
    own_start: torch.Tensor
    prefix_start: torch.Tensor
    prefix_end: torch.Tensor

    @classmethod
    def make(
        cls, groups: Sequence[tuple[int, Sequence[int]]], length: int, device: torch.device | str = "cpu"
    ) -> PrefixLayout:
        """The layout of `groups`, each given as (prompt length, completion lengths); what they leave is padding.

        Raises:
            ValueError: a prompt is empty, a completion's length is negative, or the groups take more than `length`.
        """
        own, first, last, sizes = [], [], [], []
        place = 0
        for i, (prompt, completions) in enumerate(groups):
            require(prompt >= 1, f"group {i}: a prompt must have at least one token, not {prompt}")
            require(min(completions, default=0) >= 0, f"group {i}: completion lengths {list(completions)}")
            start = place
            for number, size in enumerate((prompt, *completions)):
                own.append(place)
                first.append(start if number else 0)
                last.append(start + prompt if number else 0)
                sizes.append(size)
                place += size
        require(place <= length, f"groups of {place} tokens do not fit a row of {length}")
        own, first, last, sizes = [*own, place], [*first, 0], [*last, 0], [*sizes, length - place]
        parts = torch.tensor([own, first, last], dtype=torch.int32)
        tokens = send(parts.repeat_interleave(torch.tensor(sizes), dim=1), torch.device(device))
        return cls(tuple((p, tuple(c)) for p, c in groups), length, *tokens)

    @property
    def device(self) -> torch.device:
        return self.own_start.device

    @cached_property
    def mask(self) -> torch.Tensor:
        """(L, L) bool: whether a query (row) sees a key (column)."""
        places = torch.arange(self.length, device=self.device)
        return self._sees(places[:, None], places[None, :])

    @cached_property
    def group_masks(self) -> tuple[tuple[slice, torch.Tensor], ...]:
        """The place of each group, and of padding, and its (l, l) bool mask: groups do not see one another."""
        lengths = [prompt + sum(completions) for prompt, completions in self.groups]
        ends = [*accumulate(lengths)]
        places = [*zip([0, *ends], [*ends, self.length], strict=True)]
        found = []
        for start, end in places:
            inside = torch.arange(start, end, device=self.device)
            if end > start:
                found.append((slice(start, end), self._sees(inside[:, None], inside[None, :])))
        return tuple(found)

    @cached_property
    def has_prefix(self) -> torch.Tensor:
        """(L,) bool: whether a token sees a prompt before its own part."""
        return self.prefix_end > 0

    @cached_property
    def own_spans(self) -> Spans:
        """Every part with itself, to be seen causally."""
        sizes = [size for prompt, completions in self.groups for size in (prompt, *completions)]
        sizes.append(self.length - sum(sizes))
        return Spans.make([(size, size) for size in sizes if size], self.device)

    @cached_property
    def prefix_spans(self) -> Spans | None:
        """The completions of every group with its prompt, to be seen in whole; None where there are no completions.

        Queries and keys are the same flat tokens, so prompts are stretches of queries without keys, completions
        stretches of keys without queries, and nothing needs to be gathered.
        """
        pairs: list[tuple[int, int]] = []
        for prompt, completions in self.groups:
            pairs += [(prompt, 0), (sum(completions), prompt), (0, sum(completions))]
        if not any(queries and keys for queries, keys in pairs):
            return None
        padding = self.length - sum(queries for queries, _ in pairs)
        pairs += [(padding, 0), (0, padding)]
        return Spans.make([pair for pair in pairs if any(pair)], self.device)

    @cached_property
    def flash_spans(self) -> FlashSpans:
        """Both kinds of spans in the form in which they pass through compiled layers."""
        own, prefix = self.own_spans, self.prefix_spans
        if prefix is None:
            none = own.queries.new_empty(0)
            return FlashSpans(own.queries, none, none, self.has_prefix, (own.max_queries, 0, 0))
        longest = (own.max_queries, prefix.max_queries, prefix.max_keys)
        return FlashSpans(own.queries, prefix.queries, prefix.keys, self.has_prefix, longest)

    def block_mask(self, block: int = 128) -> BlockMask:
        """The same as a FlexAttention mask of `block` x `block` tiles, from counts of visible keys, not from pairs."""
        cache: dict[int, BlockMask] = self.__dict__.setdefault("_block_masks", {})
        if block not in cache:
            cache[block] = self._make_block_mask(block)
        return cache[block]

    def _make_block_mask(self, block: int) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        own_start, prefix_start, prefix_end = self.own_start, self.prefix_start, self.prefix_end

        def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (key <= query) & (key >= own_start[query])
            return own | ((key >= prefix_start[query]) & (key < prefix_end[query]))

        visible = self._visible_per_block(block)
        kinds = ((visible > 0).any(1), (visible == block).all(1))
        partial, full = kinds[0] & ~kinds[1], kinds[1]
        return BlockMask.from_kv_blocks(
            *_listed(partial),
            *_listed(full),
            BLOCK_SIZE=block,
            mask_mod=sees,
            seq_lengths=(self.length, self.length),
        )

    def _visible_per_block(self, block: int) -> torch.Tensor:
        """(blocks, block, blocks) int32: how many keys of each block a query sees; queries past the end see none."""
        blocks = -(-self.length // block)
        starts = torch.arange(0, blocks * block, block, device=self.device, dtype=torch.int32)

        def overlap(first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            shared = torch.minimum(end[:, None], starts + block) - torch.maximum(first[:, None], starts)
            return shared.clamp_(min=0)

        ends = torch.arange(1, self.length + 1, device=self.device, dtype=torch.int32)
        visible = overlap(self.own_start, ends) + overlap(self.prefix_start, self.prefix_end)
        padded = torch.nn.functional.pad(visible, (0, 0, 0, blocks * block - self.length))
        return padded.view(blocks, block, blocks)

    def _sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key <= query) & (key >= self.own_start[query])
        return own | ((key >= self.prefix_start[query]) & (key < self.prefix_end[query]))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of (n, n) bool, how many are set, (1, 1, n) int32, and where, first, (1, 1, n, n) int32."""
    counts = blocks.sum(1, dtype=torch.int32)
    places = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], places[None, None]
