"""Plans of passes: nothing lost, nothing twice, within the budget, alike on all processes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo.packing import WORTH_MOVING, CostModel, GroupSize, plan_passes, split_evenly

COST = CostModel(token=10.0, pair=0.1, pixel=2.0)
lengths = st.integers(1, 60)
group = st.builds(GroupSize, st.integers(1, 80), st.lists(lengths, min_size=1, max_size=8).map(tuple))
processes = st.lists(st.lists(group, max_size=5), min_size=1, max_size=4)


@given(processes, st.integers(20, 300), st.booleans())
def test_every_completion_is_in_one_pass(sizes: list[list[GroupSize]], budget: int, move: bool) -> None:
    planned = plan_passes(sizes, COST, budget, move=move)
    found = Counter(
        (piece.home, piece.group, completion)
        for passes in planned
        for pieces in passes
        for piece in pieces
        for completion in piece.completions
    )
    expected = {
        (r, g, c) for r, groups in enumerate(sizes) for g, s in enumerate(groups) for c in range(len(s.completions))
    }
    assert found == Counter(expected)


@given(processes, st.integers(20, 300), st.booleans())
def test_passes_keep_the_budget_and_processes_keep_step(sizes: list[list[GroupSize]], budget: int, move: bool) -> None:
    planned = plan_passes(sizes, COST, budget, move=move)
    assert len({len(passes) for passes in planned}) == 1
    assert len(planned[0]) >= 1
    for passes in planned:
        tokens = [sum(piece.tokens for piece in pieces) for pieces in passes]
        assert tokens == sorted(tokens, reverse=True)
        for total, pieces in zip(tokens, passes, strict=True):
            # Only a completion that does not fit beside its prompt is above the budget, in a pass of its own.
            assert total <= budget or (len(pieces) == 1 and len(pieces[0].completions) == 1)
        for piece in (piece for pieces in passes for piece in pieces):
            size = sizes[piece.home][piece.group]
            assert piece.tokens == size.prompt + sum(size.completions[i] for i in piece.completions)


@given(processes, st.integers(20, 300))
def test_groups_stay_at_home_unless_they_may_move(sizes: list[list[GroupSize]], budget: int) -> None:
    planned = plan_passes(sizes, COST, budget, move=False)
    assert all(piece.home == rank for rank, passes in enumerate(planned) for pieces in passes for piece in pieces)


@given(processes, st.integers(20, 300))
def test_moving_never_makes_the_busiest_process_busier(sizes: list[list[GroupSize]], budget: int) -> None:
    def busiest(move: bool) -> float:
        planned = plan_passes(sizes, COST, budget, move=move)
        return max(sum(piece.cost for pieces in passes for piece in pieces) for passes in planned)

    assert busiest(move=True) <= busiest(move=False) * (1 + 1e-9)


def test_an_uneven_load_is_evened_out_and_an_almost_even_one_left_alone() -> None:
    cost, same = CostModel(token=1.0), GroupSize(10, (10,) * 9)
    uneven = plan_passes([[same] * 6, []], cost, 1000)
    assert [sum(len(pieces) for pieces in passes) for passes in uneven] == [3, 3]

    slightly = GroupSize(10, (10,) * 8 + (10 + int(100 * WORTH_MOVING),))
    kept = plan_passes([[slightly] * 2, [same] * 2], cost, 1000)
    assert all(piece.home == rank for rank, passes in enumerate(kept) for pieces in passes for piece in pieces)


def test_a_group_above_the_budget_is_split_into_few_and_even_pieces() -> None:
    [passes] = plan_passes([[GroupSize(40, (30,) * 6)]], CostModel(), 100)
    assert [piece.completions for pieces in passes for piece in pieces] == [(0, 3), (1, 4), (2, 5)]


def test_several_groups_share_a_pass_and_passes_are_about_as_long() -> None:
    groups = [GroupSize(10, (n,)) for n in (50, 40, 30, 20, 10)]  # 200 tokens
    [passes] = plan_passes([groups], CostModel(), 150)
    assert [[piece.tokens for piece in pieces] for pieces in passes] == [[60, 30, 20], [50, 40]]


@given(st.lists(lengths, max_size=12), st.integers(1, 5))
def test_split_evenly(values: list[int], parts: int) -> None:
    chosen = split_evenly(values, parts)
    assert sorted(i for indices in chosen for i in indices) == list(range(len(values)))
    sums = [sum(values[i] for i in indices) for indices in chosen]
    # No sum exceeds another by more than its own last addition.
    assert max(sums) - min(sums) <= max(values, default=0)


def test_costs_by_hand() -> None:
    size = GroupSize(prompt=4, completions=(2, 3), pixels=7)
    cost = CostModel(token=1000.0, pair=1.0, pixel=100.0, tile=1)
    # Pairs: 4·5/2 of the prompt, 2·3/2 and 3·4/2 of the completions themselves, 4·5 with the prompt.
    assert cost.packed(size) == 9_000 + (10 + 3 + 6 + 20) + 700
    assert CostModel(1000.0, 1.0, 100.0, tile=None).packed(size) == 9_000 + 81 + 700
    # Two rows of 7 tokens, every pair of a row, the image twice.
    assert cost.dense([size]) == 14_000 + 2 * 49 + 1_400


@pytest.mark.parametrize(("prompt", "completions", "packed_wins"), [(100, (50,) * 8, True), (20, (30,), False)])
def test_sharing_pays_with_a_group_and_not_for_a_short_single_row(
    prompt: int, completions: tuple[int, ...], packed_wins: bool
) -> None:
    size, cost = GroupSize(prompt, completions), CostModel(token=1000.0, pair=1.0, tile=128)
    assert (cost.packed(size) < cost.dense([size])) == packed_wins
