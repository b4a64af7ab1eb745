from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_FAMILIES
from torch.utils.checkpoint import checkpoint

from mrpo import efficiency
from mrpo.backbones import liger, load_model
from mrpo.backbones.attention import use_prefix_attention
from mrpo.config import Config
from mrpo.doctor.memory import PromptSize, estimate, size_of, total
from mrpo.errors import UserError
from mrpo.kernels.prefix_attention import PrefixLayout, compilations
from mrpo.runtime import Runtime
from mrpo.settings import load_config

CPU = Runtime(0, 1, torch.device("cpu"))
GIB = 2**30


def settings(*overrides: str) -> Config:
    return load_config(None, list(overrides))


def load(folder: Path, **options: Any) -> Any:
    return load_model(settings().model.model_copy(update={"path": str(folder), **options}))


def run(model: Any, groups: list[tuple[int, list[int]]], length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of a packed row and the gradients of all weights of the language model."""
    text = model.model.language_model
    embeddings = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(length))
    axes = 1 if model.config.model_type == "internvl" else 3
    positions = torch.arange(length)[None].expand(axes, 1, length) if axes == 3 else torch.arange(length)[None]
    # As on a GPU: on a CPU the default goes group by group, for which layers are not meant to be compiled.
    layout = PrefixLayout.make(groups, length)
    arguments = {"attention_mask": layout.mask[None, None], "prefix_attention": "sdpa"}
    hidden = text(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **arguments).last_hidden_state
    used = sum(prompt + sum(completions) for prompt, completions in groups)
    hidden[:, :used].square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in text.named_parameters() if p.grad is not None}
    text.zero_grad()
    return hidden[:, :used].detach(), gradients


CASES = [([(10, [3] * 4)], 24), ([(10, [6] * 4), (5, [9])], 56), ([(20, [2] * 3)], 48), ([(30, [2]), (1, [5] * 4)], 80)]


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler's front end alone: it decides how often to compile, and needs no C++ compiler."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: plain(function, backend="eager", **options))
    torch._dynamo.reset()
    efficiency._compiled_class.cache_clear()
    yield
    torch._dynamo.reset()
    efficiency._compiled_class.cache_clear()


@pytest.mark.parametrize(("family", "checkpointing"), list(zip(TINY_FAMILIES, ("none", "2", "all"), strict=True)))
def test_compiled_and_checkpointed_layers_change_no_number_and_new_lengths_need_no_compilation(
    family: str, checkpointing: str, tiny_folder: Callable[[str], Path], eager_compiler: None
) -> None:
    plain, fast = load(tiny_folder(family)), load(tiny_folder(family))
    for model in (plain, fast):
        use_prefix_attention(model)
    made = efficiency.make_efficient(fast, settings("update.compile=on", f"update.checkpointing={checkpointing}"), CPU)
    assert made.compiled
    counts = []
    for groups, length in CASES:
        hidden, gradients = run(plain, groups, length)
        hidden_fast, gradients_fast = run(fast, groups, length)
        counts.append(compilations())
        torch.testing.assert_close(hidden_fast, hidden, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == gradients_fast.keys()
        for name, gradient in gradients.items():
            assert (gradients_fast[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert counts[0] == counts[-1]


def test_a_copy_of_a_compiled_model_runs_its_own_weights(
    tiny_folder: Callable[[str], Path], eager_compiler: None
) -> None:
    model = load(tiny_folder("qwen3_vl"))
    use_prefix_attention(model)
    efficiency.make_efficient(model, settings("update.compile=on"), CPU)
    frozen = copy.deepcopy(model)
    before, _ = run(model, *CASES[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after, _ = run(model, *CASES[0])
    kept, _ = run(frozen, *CASES[0])
    assert torch.equal(kept, before)
    assert not torch.allclose(after, before)


def test_generation_is_not_compiled(tiny_folder: Callable[[str], Path], eager_compiler: None) -> None:
    model = load(tiny_folder("qwen3_vl"))
    efficiency.make_efficient(model, settings("update.compile=on"), CPU)
    before = compilations()
    model.generate(torch.arange(1, 8)[None], max_new_tokens=4, do_sample=False)
    assert compilations() == before


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize(
    ("setting", "expected", "vision"),
    [("none", 0, False), ("1", 1, False), ("0.5", 2, False), ("9", 3, False), ("all", 3, True), ("auto", 0, False)],
)
def test_the_first_layers_recompute(
    family: str, setting: str, expected: int, vision: bool, tiny_folder: Callable[[str], Path]
) -> None:
    model = load(tiny_folder(family))
    made = efficiency.make_efficient(model, settings(f"update.checkpointing={setting}"), CPU)
    assert (made.checkpointed, made.layers, made.vision_checkpointed) == (expected, 3, vision)
    layers = model.model.language_model.layers
    recomputed = [False] * len(layers)
    for number, layer in enumerate(layers):

        def counting(*args: Any, number: int = number, **kwargs: Any) -> Any:
            recomputed[number] = True
            return checkpoint(*args, use_reentrant=False, **kwargs)

        if layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = counting
    use_prefix_attention(model)
    run(model, *CASES[0])
    assert recomputed == [True] * expected + [False] * (3 - expected)
    towers = [module for name, module in model.named_modules() if ".language_model" not in name]
    assert any(getattr(module, "gradient_checkpointing", False) for module in towers) == vision


def test_a_frozen_vision_tower_is_neither_recomputed_nor_part_of_the_graph(tiny_folder: Callable[[str], Path]) -> None:
    pictures = torch.randn(2, 3, 32, 32)
    for frozen in (False, True):
        model = load(tiny_folder("internvl"), freeze_vision=frozen)
        made = efficiency.make_efficient(model, settings("update.checkpointing=all"), CPU)
        assert made.vision_checkpointed == (not frozen)
        features = model.model.get_image_features(pixel_values=pictures, return_dict=True).pooler_output
        assert features.requires_grad == (not frozen)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_features_of_a_frozen_tower_have_no_graph(family: str, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder(family), freeze_vision=True)
    efficiency.make_efficient(model, settings(), CPU)
    features = model.model.visual(torch.randn(16, 3 * 2 * 8 * 8), grid_thw=torch.tensor([[1, 4, 4]]))
    assert not features.pooler_output.requires_grad


def test_auto_recomputes_as_few_layers_as_memory_allows(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("qwen3_vl"))
    size, config = size_of(model), settings("prompt.max_tokens=512", "update.packing=shared_prefix")
    prompt = PromptSize(512, 4 * 512, "")

    def need(setting: str) -> float:
        terms = estimate(settings(*shared, f"update.checkpointing={setting}"), size, prompt, 1, on_gpu=True)
        return (total(terms.standing) + total(terms.update)) / efficiency.FILL

    shared = ["prompt.max_tokens=512", "update.packing=shared_prefix"]
    for setting, choice in (("none", 0), ("1", 1), ("2", 2)):
        assert efficiency.choose_checkpointing(config, model, 1, int(need(setting)) + 1, 0) == choice
        assert efficiency.choose_checkpointing(config, model, 1, int(need(setting)) - 1, 0) != choice
    # All but one keep as much at once as all: the last one, when it computes again.
    assert efficiency.choose_checkpointing(config, model, 1, int(need("2")) - 1, 0) == "all"
    assert efficiency.choose_checkpointing(config, model, 1, 0, 0) == "all"
    card = 10 * int(need("none"))
    for level, taken in ((2, 0.0), (0, 0.5 * card)):  # of an engine that will be there during updates
        beside = settings(*shared, "rollout.engine=vllm", "rollout.gpu_memory=0.5", f"rollout.sleep_level={level}")
        free = int(need("none") + taken / efficiency.FILL)
        assert efficiency.choose_checkpointing(beside, model, 1, free + 1, card) == 0
        assert efficiency.choose_checkpointing(beside, model, 1, free - 1, card) != 0


def test_liger_that_is_asked_for_must_be_possible(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder("qwen3_vl"))
    monkeypatch.setattr(liger, "liger_is_installed", lambda: True)
    with pytest.raises(UserError, match=r"model\.liger=on needs a GPU"):
        efficiency.make_efficient(model, settings("model.liger=on"), CPU)
    monkeypatch.setattr(liger, "liger_is_installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'mrpo\[liger\]'"):
        efficiency.make_efficient(model, settings("model.liger=on"), CPU)
    assert not efficiency.make_efficient(model, settings(), CPU).liger


def test_what_was_set_is_told_in_words(tiny_folder: Callable[[str], Path]) -> None:
    made = efficiency.Efficiency(liger=True, compiled=False, checkpointed=12, layers=36, vision_checkpointed=False)
    assert str(made) == "12 of 36 layers recompute their activations, liger-kernel's RMSNorm, SwiGLU and RoPE"
    made = efficiency.Efficiency(liger=False, compiled=True, checkpointed=0, layers=36, vision_checkpointed=False)
    assert str(made) == "none of 36 layers recompute their activations, layers are compiled"
