"""The vision towers' inputs, and the towers of packed rows: all images in one call, and nothing read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_rows import make_groups
from plain_varlen import PlainVarlen
from tiny_models import TINY_FAMILIES
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_interpolation_indices_and_weights

from mrpo.backbones import attention, batch_images, load_model, load_processor
from mrpo.backbones.packed import use_packed_rows
from mrpo.batching import collate, pack
from mrpo.config import Config
from mrpo.efficiency import vision_layers
from mrpo.kernels import prefix_flash
from mrpo.kernels.prefix_attention import compilations

CPU = torch.device("cpu")
Features = tuple[torch.Tensor, ...]


class Towers:
    """A family's tower as transformers runs it and as packed rows do, and images of different sizes."""

    def __init__(self, folder: Path) -> None:
        config = Config.model_validate({"model": {"path": str(folder)}})
        self.processor = load_processor(config)
        self.family = self.processor.family
        self.plain, self.ours = (load_model(config.model).train() for _ in range(2))
        use_packed_rows(self.ours, self.family)
        self.prompts = [rows[0].prompt for rows in make_groups(self.processor) if rows[0].prompt.images]
        self.take(0)

    def take(self, first: int) -> None:
        """From now on the images from the prompt `first` on."""
        self.images = batch_images(self.prompts[first:], CPU, torch.float32)
        self.plan = self.family.vision_plan(self.ours.model, self.prompts[first:])

    def features(self, model: Any, plan: dict[str, Any]) -> Features:
        found = self.family.image_features(model.model, self.images, plan)
        return (found.embeddings, *found.deepstack)


@pytest.fixture(params=TINY_FAMILIES)
def towers(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Towers:
    return Towers(tiny_folder(request.param))


def gradients(model: Any, features: Features) -> dict[str, torch.Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("planned", [False, True])
def test_features_and_gradients_are_those_of_transformers(towers: Towers, planned: bool) -> None:
    truth = towers.features(towers.plain, {})
    found = towers.features(towers.ours, towers.plan if planned else {})
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    expected, ours = gradients(towers.plain, truth), gradients(towers.ours, found)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_variable_length_call_gives_the_same(
    towers: Towers, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Counted(PlainVarlen):
        def forward(self, *args: Any, **options: Any) -> Any:
            calls.append(options)
            return super().forward(*args, **options)  # type: ignore[no-untyped-call]

    truth = towers.features(towers.plain, {})
    monkeypatch.setattr(attention, "takes_flash", lambda *_: True)
    monkeypatch.setattr(prefix_flash, "default_primitive", Counted)
    if checkpointing:
        towers.ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = towers.features(towers.ours, towers.plan)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    vision = towers.ours.config.vision_config
    layers = vision.depth if towers.family.ragged_vision else 0
    assert len(calls) == layers  # InternVL's tiles are of one size: they are a batch for SDPA
    assert not any(call["causal"] for call in calls)
    expected, gradient = gradients(towers.plain, truth), gradients(towers.ours, found)
    for name in expected:
        assert (gradient[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_a_compiled_layer_is_one_graph_for_all_images(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "takes_flash", lambda *_: True)
    monkeypatch.setattr(prefix_flash, "default_primitive", PlainVarlen)
    for layer in vision_layers(towers.ours):
        # InternVL's own attention breaks the graph in some versions of transformers.
        layer.compile(dynamic=True, backend="eager", fullgraph=towers.family.ragged_vision)
    counts = []
    for first in (0, 3, 1, 2):  # several images of different sizes, one alone, then others
        towers.take(first)
        truth = towers.features(towers.plain, {})
        for ours, theirs in zip(towers.features(towers.ours, towers.plan), truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        counts.append(compilations())
    assert counts[1] == counts[-1]  # a batch of one tile may be another graph
    torch._dynamo.reset()


def test_deepstack_features_are_added_where_masks_say(tiny_folder: Callable[[str], Path]) -> None:
    towers = Towers(tiny_folder("qwen3_vl"))  # which alone has them
    text = towers.ours.model.language_model
    generator = torch.Generator().manual_seed(4)
    hidden, features = (torch.randn(*shape, generator=generator) for shape in ((1, 9, 5), (3, 5)))
    places = torch.tensor([1, 2, 7])
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, places] = True
    truth = towers.plain.model.language_model._deepstack_process(hidden, mask, features)
    assert torch.equal(text._deepstack_process(hidden, mask, features), truth)
    assert torch.equal(text._deepstack_process(hidden, places, features), truth)


def test_a_plan_is_that_of_transformers_whatever_was_planned_before(tiny_folder: Callable[[str], Path]) -> None:
    towers = Towers(tiny_folder("qwen3_vl"))
    tower = towers.ours.model.visual
    for first in (0, 2, 0):
        towers.take(first)
        grids = towers.images["image_grid_thw"]
        options = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        places, weights = get_vision_interpolation_indices_and_weights(
            grids, tower.num_grid_per_side, **options, spatial_merge_size=tower.spatial_merge_size
        )
        starts = get_vision_cu_seqlens(grids)
        for name, truth in {"interp_indices": places, "interp_weights": weights, "cu_seqlens": starts}.items():
            assert towers.plan[name].dtype == truth.dtype
            assert torch.equal(towers.plan[name], truth)
        assert towers.plan["max_seqlen"] == starts.diff().max()
        towers.plan["interp_weights"].fill_(0.0)  # a plan is its owner's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_images_kept_in_the_dtype_of_the_model_change_no_bit(
    family: str, dtype: torch.dtype, tiny_folder: Callable[[str], Path]
) -> None:
    model_options = {"path": str(tiny_folder(family))}
    full = load_processor(Config.model_validate({"model": model_options}))
    config = Config.model_validate({"model": model_options | {"dtype": str(dtype).removeprefix("torch.")}})
    processor, model = load_processor(config), load_model(config.model)
    rows, kept = ([row for group in make_groups(p) for row in group] for p in (full, processor))
    assert {t.dtype for row in kept for t in row.prompt.images.values() if t.is_floating_point()} == {dtype}
    prompts = list({id(row.prompt): row.prompt for row in rows if row.prompt.images}.values())
    pixels = torch.cat([prompt.images["pixel_values"] for prompt in prompts])
    batch = pack(kept, processor, model.model, CPU, dtype).row
    assert torch.equal(batch.images["pixel_values"], pixels.to(dtype))
    dense, truth = collate(kept, processor, CPU, dtype).inputs, collate(rows, full, CPU, dtype).inputs
    assert dense.keys() == truth.keys()
    assert all(torch.equal(dense[name], truth[name]) for name in truth)
    with torch.no_grad():
        found, expected = (
            processor.family.image_features(model.model, {**batch.images, "pixel_values": values}, batch.vision_plan)
            for values in (batch.images["pixel_values"], pixels)
        )
    assert torch.equal(found.embeddings, expected.embeddings)


def test_a_tower_with_its_plan_reads_nothing_back(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    # A meta tensor has no values: who reads one is refused.
    monkeypatch.setattr(attention, "takes_flash", lambda *_: True)
    towers.ours.to("meta")
    towers.images = {name: tensor.to("meta") for name, tensor in towers.images.items()}
    plan = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in towers.plan.items()}
    assert all(feature.is_meta for feature in towers.features(towers.ours, plan))
    if towers.family.ragged_vision:  # without the plan it would read the sizes of images
        with pytest.raises(RuntimeError, match="meta tensor"):
            towers.features(towers.ours, {})
