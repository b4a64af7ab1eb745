"""Passes of rows on several processes, which are threads here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_rows import MIXED, GroupPlan, make_groups
from thread_processes import Meeting, ThreadRuntime
from tiny_models import TINY_FAMILIES, build_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.batching import Row
from mrpo.config import Config
from mrpo.packing import CostModel
from mrpo.passes import TILE, Pass, Planner, cost_model, padding_multiple

CPU = torch.device("cpu")
COST = CostModel(token=1000.0, pair=1.0)
TEXT = GroupPlan(images=(), words=4, completions=2)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = build_tiny_model("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))
    return load_processor(Config.model_validate({"model": {"path": str(folder)}}))


def plan(
    processor: Processor, shares: Sequence[Sequence[Row]], *, move: bool = True, **options: Any
) -> list[tuple[Planner, list[Pass]]]:
    """The passes of each process that brings one of `shares`."""
    micro_batch = options.pop("micro_batch_size", 4)
    config = Config.model_validate(
        {"update": {"token_budget": 200} | options, "optim": {"micro_batch_size": micro_batch}}
    )
    meeting = Meeting(len(shares))

    def one(rank: int) -> tuple[Planner, list[Pass]]:
        planner = Planner(config, processor, ThreadRuntime(rank, meeting, CPU), COST)  # type: ignore[arg-type]
        return planner, planner.plan(shares[rank], move=move)

    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(one, range(len(shares))))


def flat(groups: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for group in groups for row in group]


def real(passes: Sequence[Pass]) -> list[Row]:
    return [row for passed in passes for row in passed.rows if len(row.prompt.input_ids) > 2]


@pytest.mark.parametrize("packing", ["shared_prefix", "dense"])
def test_places_lead_back_to_the_rows(processor: Processor, packing: str) -> None:
    rows = flat(make_groups(processor))
    [(_, passes)] = plan(processor, [rows], packing=packing)
    placed = {place: row for passed in passes for place, row in zip(passed.places, passed.rows, strict=True)}
    assert sorted(placed) == list(range(len(rows)))
    assert all(placed[i] is row for i, row in enumerate(rows))
    assert all(passed.packed == (packing == "shared_prefix") for passed in passes)


def test_equal_prompts_are_shared_and_different_images_are_not(processor: Processor) -> None:
    [first], [again] = (make_groups(processor, [replace(MIXED[0], completions=1), TEXT])[:1] for _ in range(2))
    other = make_groups(processor, [TEXT, replace(MIXED[0], completions=1)])[1]  # other pixels, the same question
    other = [replace(other[0], prompt=replace(other[0].prompt, input_ids=first[0].prompt.input_ids))]
    [(_, [passed])] = plan(processor, [[first[0], again[0], other[0]]], packing="shared_prefix", token_budget=1000)
    prompts = {id(row.prompt) for row in passed.rows}
    assert len(prompts) == 2
    assert passed.tokens == 2 * len(first[0].prompt.input_ids) + sum(len(r.token_ids) for r in passed.rows)


def test_rows_move_to_an_idle_process_with_their_tensors(processor: Processor) -> None:
    groups = make_groups(processor, [replace(MIXED[0], completions=2)] * 4)
    (_, mine), (_, moved) = plan(processor, [flat(groups), []], packing="shared_prefix")
    assert len(real(moved)) == len(real(mine)) == 4
    known = {row.token_ids + tuple(row.prompt.input_ids.tolist()): row for row in flat(groups)}
    for row in real(moved):
        original = known[row.token_ids + tuple(row.prompt.input_ids.tolist())]
        torch.testing.assert_close(row.advantages, original.advantages)
        torch.testing.assert_close(row.prompt.images["pixel_values"], original.prompt.images["pixel_values"])
    assert all(place == -1 for passed in moved for place in passed.places)
    # Sharing a prompt survives the way.
    assert all(len({id(row.prompt) for row in passed.rows}) <= 2 for passed in moved)


def test_nothing_moves_for_log_probabilities(processor: Processor) -> None:
    rows = flat(make_groups(processor, [MIXED[0], TEXT]))
    (_, mine), (_, idle) = plan(processor, [rows, []], move=False, packing="shared_prefix")
    assert len(real(mine)) == len(rows)
    assert not real(idle)
    assert len(mine) == len(idle)


@pytest.mark.parametrize("packing", ["shared_prefix", "dense"])
def test_where_one_process_has_images_every_pass_of_all_has_one(processor: Processor, packing: str) -> None:
    images, text = make_groups(processor, [MIXED[0], TEXT])
    text = [replace(row, old_logprobs=torch.zeros(len(row.token_ids))) for row in text]
    (_, mine), (_, other) = plan(processor, [images, text], move=False, packing=packing)
    assert len(mine) == len(other)
    for passed in (*mine, *other):
        assert any(row.prompt.images for row in passed.rows)
    blanks = [row for passed in other for row in passed.rows if len(row.prompt.input_ids) <= 2]
    assert len(blanks) == len(other)
    for blank in blanks:
        assert blank.weights.tolist() == blank.advantages.tolist() == [0.0]
    assert blanks[0].old_logprobs is not None


def test_no_image_is_invented_where_nobody_has_one(processor: Processor) -> None:
    found = plan(processor, [flat(make_groups(processor, [TEXT, TEXT])), []], move=False, packing="shared_prefix")
    assert not any(row.prompt.images for _, passes in found for passed in passes for row in passed.rows)
    assert all(passed.rows for _, passes in found for passed in passes)


def test_rows_without_tokens_are_in_no_pass(processor: Processor) -> None:
    row = make_groups(processor, [TEXT, TEXT])[0][0]
    empty = Row(row.prompt, (), torch.zeros(0), torch.zeros(0))
    [(_, passes)] = plan(processor, [[empty, row]], packing="shared_prefix")
    assert [passed.places for passed in passes] == [(1,)]


@pytest.mark.parametrize(
    ("plans", "tile", "choice"),
    [
        ([MIXED[0], MIXED[2]], 128, "shared_prefix"),
        # Nothing is shared, and the dense form has nothing to pad.
        ([replace(TEXT, completions=1)] * 2, 128, "dense"),
        ([replace(TEXT, completions=1)] * 2, None, "dense"),  # the same FLOPs, by a dearer attention
    ],
)
def test_auto_chooses_the_cheaper_form_and_says_so_once(
    processor: Processor, plans: list[GroupPlan], tile: int | None, choice: str
) -> None:
    rows = flat(make_groups(processor, plans))
    rows = [replace(row, token_ids=row.token_ids[:1] * 6, weights=torch.ones(6)) for row in rows]
    planner = Planner(Config(), processor, ThreadRuntime(0, Meeting(1), CPU), replace(COST, tile=tile))  # type: ignore[arg-type]
    assert all(passed.packed == (choice == "shared_prefix") for passed in planner.plan(rows))
    planner.plan(rows)
    [message] = planner.messages
    assert message.startswith(f"update.packing=auto: {choice}")


@pytest.mark.parametrize("packing", ["shared_prefix", "dense"])
def test_halves_hold_the_same_rows_and_later_passes_are_smaller(processor: Processor, packing: str) -> None:
    rows = make_groups(processor)[0]
    [(planner, [passed])] = plan(processor, [rows], packing=packing, token_budget=1000, micro_batch_size=8)
    halves = passed.halves()
    assert halves is not None
    assert sorted(i for half in halves for i in half.places) == sorted(passed.places)
    assert all(half.packed == passed.packed and half.rows for half in halves)
    assert halves[0]._part([0]).halves() is None

    planner.shrink(halves)
    later = planner.plan(rows)
    assert len(later) == 2
    assert max(part.tokens for part in later) < passed.tokens


def test_halves_of_several_groups_keep_each_group_together(processor: Processor) -> None:
    rows = flat(make_groups(processor))
    [(_, [passed])] = plan(processor, [rows], packing="shared_prefix", token_budget=10_000)
    halves = passed.halves()
    assert halves is not None
    assert sum(half.tokens for half in halves) == passed.tokens


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_costs_are_the_flops_that_pytorch_counts(family: str, frozen: bool, tmp_path: Path) -> None:
    folder = build_tiny_model(family, tmp_path)
    settings = {"model": {"path": str(folder), "freeze_vision": frozen}, "update": {"attention": "sdpa"}}
    config = Config.model_validate(settings)
    model, processor = load_model(config.model), load_processor(config)
    cost = cost_model(model, processor.family, config, CPU)
    assert cost.tile is None
    text = model.config.get_text_config()
    length = 64
    embeddings = torch.randn(1, length, text.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.model.language_model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    attention = counts[torch.ops.aten.bmm]
    assert cost.pair * length**2 == attention * 14 / 12  # it keeps the scores, others compute them again
    assert cost.token * length == pytest.approx(sum(counts.values()) - attention, rel=0.02)  # norms do not multiply
    row = make_groups(processor)[0][0]  # with one image
    pixels = row.prompt.images["pixel_values"]
    with FlopCounterMode(display=False) as counter:
        features = model.model.get_image_features(**row.prompt.images).pooler_output
        if not frozen:
            torch.cat(list(features)).sum().backward()
    # The model leaves attention out, and takes it that every patch meets every weight, mergers and positions included.
    assert 0.5 < cost.pixel * pixels.numel() / counter.get_total_flops() < 3.0


def test_rows_are_padded_to_whole_tiles_on_a_gpu_alone() -> None:
    gpu = torch.device("cuda")
    assert (padding_multiple(Config(), gpu), padding_multiple(Config(), CPU)) == (TILE, 1)
    chosen = Config.model_validate({"update": {"pad_multiple": 7}})
    assert (padding_multiple(chosen, gpu), padding_multiple(chosen, CPU)) == (7, 7)
