"""The forward passes of an update or of log-probabilities: rows of all processes -> equally many passes on each.

ZeRO gathers weights and reduces gradients inside of a pass, module by module, so processes must run the same modules in
the same order. Where one has no work left, or no image where others have one, it runs a blank row of weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import torch

from mrpo.backbones import Family, Processor
from mrpo.batching import Row
from mrpo.config import Config, Packing
from mrpo.kernels.prefix_attention import choose_attention
from mrpo.packing import CostModel, GroupSize, PlannedPass, plan_passes, split_evenly
from mrpo.records import EncodedPrompt
from mrpo.runtime import Runtime

# Of the dense form's FLOPs: above this, sharing prompts saves less than its attention costs beside causal attention.
_WORTHWHILE = 0.95
TILE = 128  # keys and queries that FlexAttention and flash-attention compute at once


@dataclass(frozen=True)
class Pass:
    """Rows of one forward pass. `places`: of each among the rows that were planned, -1 for those from elsewhere."""

    rows: tuple[Row, ...]
    places: tuple[int, ...]
    packed: bool

    @property
    def tokens(self) -> int:
        """Tokens that the pass computes, without padding."""
        return sum(map(self._tokens_of, self._units()))

    def halves(self) -> tuple[Pass, Pass] | None:
        """The same rows in two passes of about the same length, prompts shared as far as may be; None for one row."""
        if len(self.rows) == 1:
            return None
        units = self._units()
        if len(units) == 1:
            units = [[i] for i in range(len(self.rows))]
        first, second = split_evenly([self._tokens_of(unit) for unit in units], 2)
        return self._part([i for u in first for i in units[u]]), self._part([i for u in second for i in units[u]])

    def _units(self) -> list[list[int]]:
        """Rows that share a prompt in the pass."""
        if not self.packed:
            return [[i] for i in range(len(self.rows))]
        return [list(group) for _, group in groupby(range(len(self.rows)), key=lambda i: id(self.rows[i].prompt))]

    def _tokens_of(self, unit: Sequence[int]) -> int:
        return len(self.rows[unit[0]].prompt.input_ids) + sum(len(self.rows[i].token_ids) for i in unit)

    def _part(self, indices: Sequence[int]) -> Pass:
        return Pass(tuple(self.rows[i] for i in indices), tuple(self.places[i] for i in indices), self.packed)


@dataclass(frozen=True)
class _Share:
    """What the other processes must know of one's rows: their groups, and the limits of a pass that it keeps."""

    sizes: list[GroupSize]
    images: bool
    budget: int
    micro_batch: int


class Planner:
    """Makes passes of rows. Every process calls it with its own rows, at the same time."""

    def __init__(self, config: Config, processor: Processor, runtime: Runtime, cost: CostModel) -> None:
        self._processor = processor
        self._runtime = runtime
        self._cost = cost
        self.packing: Packing = config.update.packing
        self._budget = config.update.token_budget
        self._micro_batch = config.optim.micro_batch_size
        self.messages: list[str] = []  # for the run's log

    def plan(self, rows: Sequence[Row], *, move: bool = False, images: bool | None = None) -> list[Pass]:
        """The passes of this process, at least one and as many as on the others. Rows without tokens are in none.

        Args:
            move: rows may go to other processes, where that evens the load out.
            images: whether any row has an image, even if it is not among `rows`; default: look at them.
        """
        groups = _groups(rows)
        if images is None:
            images = any(row.prompt.images for row in rows)
        own = _Share([_size(rows, group) for group in groups], images, self._budget, self._micro_batch)
        shares: list[_Share] = self._runtime.gather_objects(own)
        if self._is_packed(shares):
            passes = self._packed(rows, groups, shares, move=move)
        else:
            passes = self._dense(rows, groups, shares)
        blank_images = any(share.images for share in shares)
        return [self._filled(passed, blank_images) for passed in passes]

    def shrink(self, parts: Sequence[Pass]) -> None:
        """Keeps later passes as small as `parts` of one that did not fit the memory."""
        if parts[0].packed:
            self._budget = min(self._budget, max(part.tokens for part in parts))
        else:
            self._micro_batch = min(self._micro_batch, max(len(part.rows) for part in parts))

    def _is_packed(self, shares: Sequence[_Share]) -> bool:
        """What `update.packing` says. `auto` decides once, so that old and new log-probabilities come the same way."""
        if self.packing == "auto" and any(share.sizes for share in shares):
            planned = plan_passes([share.sizes for share in shares], self._cost, _budget(shares), move=False)
            packed = sum(piece.cost for passes in planned for passed in passes for piece in passed)
            dense = sum(self._cost.dense(chunk) for share in shares for chunk in _chunks(share.sizes, shares))
            self.packing = "shared_prefix" if packed <= _WORTHWHILE * dense else "dense"
            self.messages.append(f"update.packing=auto: {self.packing}, {packed / dense:.2f} of the dense form's FLOPs")
        return self.packing == "shared_prefix"

    def _packed(
        self, rows: Sequence[Row], groups: Sequence[Sequence[int]], shares: Sequence[_Share], *, move: bool
    ) -> list[Pass]:
        planned = plan_passes([share.sizes for share in shares], self._cost, _budget(shares), move=move)
        rank = self._runtime.rank
        incoming = self._exchange(rows, groups, planned) if _moves(planned) else None
        passes = []
        for pieces in planned[rank]:
            found: list[Row] = []
            places: list[int] = []
            for piece in pieces:
                if piece.home == rank:
                    chosen = [groups[piece.group][i] for i in piece.completions]
                    found += _with_one_prompt([rows[i] for i in chosen])
                    places += chosen
                elif incoming is not None:
                    moved = next(incoming[piece.home])
                    found += moved
                    places += [-1] * len(moved)
            passes.append(Pass(tuple(found), tuple(places), packed=True))
        return passes

    def _exchange(
        self, rows: Sequence[Row], groups: Sequence[Sequence[int]], planned: Sequence[Sequence[PlannedPass]]
    ) -> list[Iterator[list[Row]]]:
        """Sends this process's pieces to where they are planned; what comes from each process, in the plan's order."""
        rank = self._runtime.rank
        outgoing = [
            [
                _with_one_prompt([rows[groups[piece.group][i]].portable() for i in piece.completions])
                for pieces in passes
                for piece in pieces
                if piece.home == rank and receiver != rank
            ]
            for receiver, passes in enumerate(planned)
        ]
        return [iter(pieces) for pieces in self._runtime.exchange(outgoing)]

    def _dense(self, rows: Sequence[Row], groups: Sequence[Sequence[int]], shares: Sequence[_Share]) -> list[Pass]:
        places = [i for group in groups for i in group]
        size = min(share.micro_batch for share in shares)
        chunks = [places[i : i + size] for i in range(0, len(places), size)]
        count = max(1, *(len(_chunks(share.sizes, shares)) for share in shares))
        chunks += [[] for _ in range(count - len(chunks))]
        return [Pass(tuple(rows[i] for i in chunk), tuple(chunk), packed=False) for chunk in chunks]

    def _filled(self, passed: Pass, images: bool) -> Pass:
        """`passed` with a blank row, if it has no rows, or no image where others may have one."""
        images = images and self._runtime.world_size > 1
        if passed.rows and (not images or any(row.prompt.images for row in passed.rows)):
            return passed
        blank = _blank_row(self._processor.blank_prompt(image=images), like=passed.rows)
        return Pass((*passed.rows, blank), (*passed.places, -1), passed.packed)


def padding_multiple(config: Config, device: torch.device) -> int:
    """What the length of a packed row is a multiple of: whole tiles, and few lengths to compile for, on a GPU."""
    return config.update.pad_multiple or (TILE if device.type == "cuda" else 1)


def cost_model(model: Any, family: Family, config: Config, device: torch.device) -> CostModel:
    """FLOPs of a forward and backward pass by the sizes of a Hugging Face model; a frozen vision tower has no backward.

    A product costs 2 FLOPs a weight and token forward, 4 backward; attention 4 D Hq a pair forward, 10 D Hq backward.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    weights = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tower = [parameter for name in family.vision_modules for parameter in getattr(model.model, name).parameters()]
    trained = any(parameter.requires_grad for parameter in tower)
    sides = vision.patch_size if isinstance(vision.patch_size, (list, tuple)) else [vision.patch_size] * 2
    values = 3 * prod(sides) * getattr(vision, "temporal_patch_size", 1)
    name = config.update.attention
    if name == "auto":
        name = choose_attention(device, head_dim, getattr(torch, config.model.dtype))
    return CostModel(
        token=6.0 * weights,
        pair=14.0 * text.num_hidden_layers * text.num_attention_heads * head_dim,
        pixel=(6.0 if trained else 2.0) * sum(parameter.numel() for parameter in tower) / values,
        tile=None if name == "sdpa" else TILE,
    )


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows with tokens, those of one prompt together."""
    by_object: dict[int, list[int]] = {}
    by_tokens: dict[bytes, list[list[int]]] = {}
    for i, row in enumerate(rows):
        if not row.token_ids:
            continue
        group = by_object.get(id(row.prompt))
        if group is None:
            alike = by_tokens.setdefault(row.prompt.input_ids.numpy().tobytes(), [])
            group = next((group for group in alike if _same_images(rows[group[0]].prompt, row.prompt)), None)
            if group is None:
                alike.append(group := [])
            by_object[id(row.prompt)] = group
        group.append(i)
    return [group for alike in by_tokens.values() for group in alike]


def _same_images(one: EncodedPrompt, other: EncodedPrompt) -> bool:
    return one.images.keys() == other.images.keys() and all(
        torch.equal(tensor, other.images[name]) for name, tensor in one.images.items()
    )


def _with_one_prompt(rows: Sequence[Row]) -> list[Row]:
    """`rows` of equal prompts with the same one."""
    return [row if row.prompt is rows[0].prompt else replace(row, prompt=rows[0].prompt) for row in rows]


def _size(rows: Sequence[Row], group: Sequence[int]) -> GroupSize:
    prompt = rows[group[0]].prompt
    pixels = prompt.images["pixel_values"].numel() if prompt.images else 0
    return GroupSize(len(prompt.input_ids), tuple(len(rows[i].token_ids) for i in group), pixels)


def _budget(shares: Sequence[_Share]) -> int:
    return min(share.budget for share in shares)


def _chunks(sizes: Sequence[GroupSize], shares: Sequence[_Share]) -> list[list[GroupSize]]:
    """The sizes of the rows of each dense micro-batch."""
    single = [GroupSize(size.prompt, (length,), size.pixels) for size in sizes for length in size.completions]
    count = min(share.micro_batch for share in shares)
    return [single[i : i + count] for i in range(0, len(single), count)]


def _moves(planned: Sequence[Sequence[PlannedPass]]) -> bool:
    return any(piece.home != rank for rank, passes in enumerate(planned) for pieces in passes for piece in pieces)


def _blank_row(prompt: EncodedPrompt, like: Sequence[Row]) -> Row:
    """A row of one token that counts for nothing, with the log-probabilities that the rows beside it have."""
    zero = torch.zeros(1)
    names = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
    same = {name: zero for name in names if like and getattr(like[0], name) is not None}
    return Row(prompt, (int(prompt.input_ids[-1]),), zero, zero, **same)
