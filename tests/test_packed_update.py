"""Packed rows against dense ones and against an independent fp64 objective, for every family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_rows import make_groups, randomize_adapters, with_old_and_reference
from tiny_models import TINY_FAMILIES, build_tiny_model

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.backbones.packed import use_packed_rows
from mrpo.batching import Row, collate, pack
from mrpo.config import Config, LossConfig
from mrpo.packing import CostModel, GroupSize, plan_passes
from mrpo.policy_module import PolicyModule

LOSS = LossConfig(epsilon_low=0.1, epsilon_high=0.3, beta=0.05, importance_cap=1.2)
CPU = torch.device("cpu")
LORA = {"lora_rank": 2, "lora_alpha": 4.0, "lora_vision": True}


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return load_processor(_config(folder))


@pytest.fixture(scope="module")
def exact(folder: Path) -> Any:
    model = load_model(_config(folder).model).double()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def groups(processor: Processor, exact: Any) -> list[list[Row]]:
    """Old, reference and sampler log-probabilities on both sides of the exact ones."""
    groups = make_groups(processor)
    with torch.no_grad():
        logprobs = [_exact_logprobs(exact, processor, row) for rows in groups for row in rows]
    rows = iter(with_old_and_reference([row for rows in groups for row in rows], logprobs))
    return [[next(rows) for _ in group] for group in groups]


def _config(folder: Path, **model: Any) -> Config:
    return Config.model_validate({"model": {"path": str(folder), **model}})


def _module(model: Any, processor: Processor) -> PolicyModule:
    use_packed_rows(model, processor.family)
    return PolicyModule(model, processor.family, LOSS, temperature=0.8)


def _passes(groups: Sequence[Sequence[Row]], budget: int) -> list[list[Row]]:
    """Rows of the passes that a budget gives."""
    sizes = [GroupSize(len(rows[0].prompt.input_ids), tuple(len(row.token_ids) for row in rows)) for rows in groups]
    planned = plan_passes([sizes], CostModel(), budget)[0]
    return [[groups[piece.group][i] for piece in pieces for i in piece.completions] for pieces in planned]


def _packed(module: PolicyModule, processor: Processor, passes: Sequence[Sequence[Row]], **options: Any) -> tuple:
    """The loss, and (row, log-probabilities) of every row; gradients go to the parameters."""
    core, dtype = module.model.model, module.model.dtype
    batches = [pack(rows, processor, core, CPU, dtype, **options) for rows in passes]
    return _run(module, batches, passes)


def _dense(module: PolicyModule, processor: Processor, rows: Sequence[Row]) -> tuple:
    return _run(module, [collate(rows, processor, CPU, module.model.dtype)], [rows])


def _run(module: PolicyModule, batches: Sequence[Any], passes: Sequence[Sequence[Row]]) -> tuple:
    module.zero_grad()
    total, found = 0.0, {}
    for batch, rows in zip(batches, passes, strict=True):
        loss, *_ = module(batch)
        loss.backward()
        total += loss.item()
        with torch.no_grad():
            logprobs = module(batch, only_logprobs=True)[0]
        found |= {
            id(row): part for row, part in zip(rows, logprobs.split([len(r.token_ids) for r in rows]), strict=True)
        }
    return total, found, {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def _exact_logprobs(model: Any, processor: Processor, row: Row) -> torch.Tensor:
    """One unpadded row, full logits, eager attention, fp64."""
    ids = torch.cat([row.prompt.input_ids, torch.tensor(row.token_ids)])[None]
    types = torch.cat([row.prompt.token_type_ids, torch.zeros(len(row.token_ids), dtype=torch.long)])[None]
    images = {k: v.double() if v.is_floating_point() else v for k, v in row.prompt.images.items()}
    logits = model(input_ids=ids, **processor.family.forward_inputs(types), **images).logits[0] / 0.8
    start = len(row.prompt.input_ids)
    return logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]


def _exact_loss(logprobs: torch.Tensor, row: Row) -> torch.Tensor:
    """The objective written out. The sampler's correction is a constant weight of the policy term."""
    old, reference, sampler = (v.double() for v in (row.old_logprobs, row.ref_logprobs, row.sampler_logprobs))
    ratio = (logprobs - old).exp()
    advantages = row.advantages.double()
    bounded = ratio.clamp(1 - LOSS.epsilon_low, 1 + LOSS.epsilon_high)
    surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    correction = (old - sampler).exp().clamp(max=LOSS.importance_cap)
    gap = reference - logprobs
    return ((-correction * surrogate + LOSS.beta * (gap.exp() - gap - 1)) * row.weights.double()).sum()


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name].double() - gradient.double()).norm()
        # Some gradients are zero in exact arithmetic (a bias that shifts every key alike): noise is all they hold.
        assert error <= 1e-5 * gradient.double().norm() + 1e-7 * scale, name


def test_equals_full_logits_in_fp64(folder: Path, processor: Processor, groups: list[list[Row]], exact: Any) -> None:
    rows = [row for group in groups for row in group]
    exact.zero_grad()
    expected_logprobs = {id(row): _exact_logprobs(exact, processor, row) for row in rows}
    expected = torch.stack([_exact_loss(expected_logprobs[id(row)], row) for row in rows]).sum()
    expected.backward()
    gradients = {f"model.{name}": parameter.grad for name, parameter in exact.named_parameters()}

    module = _module(load_model(_config(folder).model), processor)
    for budget in (10_000, 90):  # all groups in one row; groups of more than 90 tokens split
        loss, logprobs, found = _packed(module, processor, _passes(groups, budget))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for row in rows:
            torch.testing.assert_close(logprobs[id(row)].double(), expected_logprobs[id(row)], rtol=1e-5, atol=1e-5)
        _assert_close(found, gradients)


@pytest.mark.parametrize(
    "options", [{}, {"freeze_vision": True}, {"lora_rank": 2, "lora_alpha": 4.0, "lora_vision": True}], ids=str
)
def test_equals_the_dense_form(
    folder: Path, processor: Processor, groups: list[list[Row]], options: dict[str, Any]
) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft")
    model = load_model(_config(folder, **options).model)
    randomize_adapters(model)
    module = _module(model, processor)
    rows = [row for group in groups for row in group]
    loss, logprobs, gradients = _dense(module, processor, rows)
    for budget in (10_000, 120):
        packed_loss, packed_logprobs, packed_gradients = _packed(module, processor, _passes(groups, budget))
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        for row in rows:
            torch.testing.assert_close(packed_logprobs[id(row)], logprobs[id(row)], rtol=1e-5, atol=1e-5)
        _assert_close(packed_gradients, gradients)
    if "freeze_vision" in options:
        assert not any("visual" in name or "vision_tower" in name for name in gradients)


def test_padding_changes_nothing(folder: Path, processor: Processor, groups: list[list[Row]]) -> None:
    module = _module(load_model(_config(folder).model), processor)
    loss, logprobs, gradients = _packed(module, processor, _passes(groups, 10_000))
    padded_loss, padded_logprobs, padded_gradients = _packed(module, processor, _passes(groups, 10_000), multiple=128)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    for key, values in logprobs.items():
        torch.testing.assert_close(padded_logprobs[key], values, rtol=1e-5, atol=1e-5)
    _assert_close(padded_gradients, gradients)
