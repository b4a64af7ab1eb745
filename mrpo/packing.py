"""Which completions share a forward pass: groups -> passes of packed rows `[prompt, completion 1 ... completion G]`.

Only lengths are looked at here, so a plan is a pure function of the lengths of all processes, and every process makes
the same one without asking. All processes run equally many passes, because ZeRO communicates inside of them. The
longest pass of each process comes first: like stands beside like, and what does not fit the memory shows at once.

The loss of a token depends on its own row and weight alone, so any plan gives the same gradient, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

# Below this share of the mean load, an uneven load costs less than sending prompts to another process.
WORTH_MOVING = 0.05


@dataclass(frozen=True)
class GroupSize:
    """A prompt of `prompt` tokens with images of `pixels` values, and its completions' lengths, each at least 1."""

    prompt: int
    completions: tuple[int, ...]
    pixels: int = 0


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward and backward pass.

    token: of a token's products in the decoder; pair: of its attention, per query and key that meet; pixel: of the
    vision tower, per value of an image; tile: keys that packed attention computes at once, seen or not; None: all of a
    group.
    """

    token: float = 1.0
    pair: float = 0.0
    pixel: float = 0.0
    tile: int | None = 1

    def packed(self, size: GroupSize) -> float:
        """A prompt once, and behind it its completions."""
        own = [size.prompt, *size.completions]
        tokens = sum(own)
        pairs: float = tokens**2
        if self.tile is not None:
            pairs = sum(n * (n + self.tile) / 2 for n in own) + size.prompt * sum(size.completions)
        return self.token * tokens + self.pair * pairs + self.pixel * size.pixels

    def dense(self, sizes: Sequence[GroupSize]) -> float:
        """A micro-batch: every completion behind a prompt of its own, padded to the longest, all pairs computed."""
        lengths = [size.prompt + completion for size in sizes for completion in size.completions]
        tokens = len(lengths) * max(lengths)
        pixels = sum(size.pixels * len(size.completions) for size in sizes)
        return self.token * tokens + self.pair * tokens * max(lengths) + self.pixel * pixels


@dataclass(frozen=True)
class Piece:
    """Completions of one group that share a pass: `completions` of group number `group` of process `home`."""

    home: int
    group: int
    completions: tuple[int, ...]
    tokens: int
    cost: float


PlannedPass: TypeAlias = tuple[Piece, ...]


def plan_passes(
    sizes: Sequence[Sequence[GroupSize]], cost: CostModel, budget: int, *, move: bool = True
) -> list[list[PlannedPass]]:
    """The passes of every process, for the groups that each brings: equally many, at least one, some perhaps empty.

    Args:
        budget: tokens of a pass. A group above it is split, its prompt repeated; a completion that does not fit
            beside its prompt gets a pass of its own.
        move: whether groups may go to another process where that evens the load out.
    """
    loads = [_pieces(home, groups, cost, budget) for home, groups in enumerate(sizes)]
    if move:
        loads = _even_out(loads)
    filled = [_first_fit(pieces, budget) for pieces in loads]
    count = max(1, *map(len, filled))
    return [_spread(pieces, passes, count, budget) for pieces, passes in zip(loads, filled, strict=True)]


def split_evenly(lengths: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Indices into `lengths` in `parts` sets of about the same sum; a set is empty only if there are too few."""
    sums, chosen = [0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(range(parts), key=lambda part: (sums[part], len(chosen[part])))
        sums[least] += lengths[i]
        chosen[least].append(i)
    return [tuple(sorted(indices)) for indices in chosen]


def _pieces(home: int, groups: Sequence[GroupSize], cost: CostModel, budget: int) -> list[Piece]:
    pieces = []
    for number, size in enumerate(groups):
        for chosen in _split_group(size, budget):
            lengths = tuple(size.completions[i] for i in chosen)
            part = GroupSize(size.prompt, lengths, size.pixels)
            pieces.append(Piece(home, number, chosen, size.prompt + sum(lengths), cost.packed(part)))
    return pieces


def _split_group(size: GroupSize, budget: int) -> list[tuple[int, ...]]:
    """As few sets of completions as fit the budget behind their prompt."""
    room = max(1, budget - size.prompt)
    count = len(size.completions)
    for parts in range(min(count, -(-sum(size.completions) // room)), count):
        chosen = split_evenly(size.completions, parts)
        if all(sum(size.completions[i] for i in indices) <= room for indices in chosen):
            return chosen
    return [(i,) for i in range(count)]


def _even_out(loads: list[list[Piece]]) -> list[list[Piece]]:
    """Moves pieces from the busiest process to the idlest while that is worth it."""
    loads = [list(pieces) for pieces in loads]
    mean = sum(piece.cost for pieces in loads for piece in pieces) / len(loads)
    while True:
        sums = [sum(piece.cost for piece in pieces) for pieces in loads]
        busiest, idlest = sums.index(max(sums)), sums.index(min(sums))
        gap = sums[busiest] - sums[idlest]
        # The larger of the two loads is least after a move of half the gap.
        best = min(loads[busiest], key=lambda piece: abs(piece.cost - gap / 2), default=None)
        if best is None or min(best.cost, gap - best.cost) <= WORTH_MOVING * mean:
            return loads
        loads[busiest].remove(best)
        loads[idlest].append(best)


def _first_fit(pieces: Sequence[Piece], budget: int) -> list[list[Piece]]:
    """First fit, longest first."""
    passes: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.tokens, piece.home, piece.group, piece.completions)):
        fitting = (p for p in passes if sum(other.tokens for other in p) + piece.tokens <= budget)
        found = next(fitting, None)
        if found is None:
            passes.append(found := [])
        found.append(piece)
    return passes


def _spread(pieces: Sequence[Piece], fitted: list[list[Piece]], count: int, budget: int) -> list[PlannedPass]:
    """`count` passes of about the same length, if they fit the budget; else the fitted ones and empty ones."""
    even = [[pieces[i] for i in indices] for indices in split_evenly([piece.tokens for piece in pieces], count)]
    tokens = [sum(piece.tokens for piece in passed) for passed in even]
    # A piece above the budget stands alone in either form.
    fits = all(total <= budget or len(passed) == 1 for total, passed in zip(tokens, even, strict=True))
    passes = even if fits else fitted + [[] for _ in range(count - len(fitted))]
    ordered = sorted(passes, key=lambda passed: -sum(piece.tokens for piece in passed))
    return [tuple(passed) for passed in ordered]
