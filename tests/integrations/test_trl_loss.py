"""Loss and gradients of MRPO in TRL against the formula in fp64, our own trainer's and TRL's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="pip install 'mrpo[trl]'")

from trl import GRPOTrainer
from trl_models import examples
from trl_trainers import vision_trainer

from mrpo.backbones import load_processor
from mrpo.batching import Row, collate
from mrpo.config import Config
from mrpo.integrations.trl import MRPOTrainer
from mrpo.policy_module import PolicyModule

GRPO = Config(algorithm="grpo")


def batch_of(trainer: GRPOTrainer) -> dict[str, Any]:
    """One generated and scored batch, on which the loss is computed; the weights are then moved a little.

    So the log-probabilities of the batch are old ones, and some ratios leave the clip range.
    """
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return inputs


def loss_and_gradients(trainer: GRPOTrainer, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_close(found: tuple[float, dict[str, torch.Tensor]], truth: tuple[float, dict[str, torch.Tensor]]) -> None:
    """To 1e-5; gradients that are zero in exact arithmetic (a bias that shifts every key alike) hold noise."""
    assert found[0] == pytest.approx(truth[0], rel=1e-5, abs=1e-7)
    assert found[1].keys() == truth[1].keys()
    scale = max(gradient.norm().item() for gradient in truth[1].values())
    assert scale > 1e-3
    for name, gradient in truth[1].items():
        error = (found[1][name].double() - gradient.double()).norm().item()
        assert error <= 1e-5 * gradient.norm().item() + 1e-6 * scale, name


def exact_loss(
    trainer: MRPOTrainer, inputs: dict[str, Any], weigh: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The objective written out in fp64 from full logits, one padded batch, without any operator of ours."""
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).double()
    model.forward = type(model).forward.__get__(model)
    model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    extra = {n: inputs[n] for n in ("image_grid_thw", "mm_token_type_ids") if n in inputs}
    if "pixel_values" in inputs:
        extra["pixel_values"] = inputs["pixel_values"].double()
    logits = model(input_ids=ids, attention_mask=mask, **extra).logits[:, :-1]
    length = inputs["completion_ids"].shape[1]
    logprobs = logits[:, -length:].log_softmax(-1).gather(2, ids[:, -length:, None])[..., 0]
    old = inputs.get("old_per_token_logps")
    ratio = (logprobs - (logprobs.detach() if old is None else old.double())).exp()
    bounded = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
    advantages = inputs["advantages"].double()
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    losses = losses * inputs.get("importance_sampling_ratio", torch.ones(())).double()
    if trainer.beta:
        gap = inputs["ref_per_token_logps"].double() - logprobs
        losses = losses + trainer.beta * (gap.exp() - gap - 1)
    used = inputs["completion_mask"].double()
    loss = (losses * used * weigh(used)).sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_equal_the_formula_in_fp64(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, loss_type="grpo", num_iterations=2, beta=0.04, epsilon=0.02, epsilon_high=0.05)
    inputs = batch_of(trainer)
    assert inputs["advantages"].shape == inputs["completion_ids"].shape
    found = loss_and_gradients(trainer, inputs)
    truth = exact_loss(trainer, inputs, lambda used: 1 / (used.sum(1, keepdim=True) * len(used)))
    assert_close(found, truth)
    metrics = trainer._metrics["train"]
    assert 0 < metrics["clip_ratio/region_mean"][-1] < 1


def test_loss_and_gradients_equal_mrpos_own_trainer(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, loss_type="grpo", num_iterations=2, epsilon=0.02)
    inputs = batch_of(trainer)
    found = loss_and_gradients(trainer, inputs)

    config = Config.model_validate({"loss": {"epsilon_low": 0.02, "epsilon_high": 0.02}})
    processor = load_processor(config)
    prompts = [processor.encode_prompt(example) for example in examples(8)]
    pictures = inputs["pixel_values"].view(8, -1, inputs["pixel_values"].shape[-1])
    rows = []
    for i in range(8):
        ids = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        (prompt,) = (  # TRL's prompt is ours, token by token and pixel by pixel
            p for p in prompts if torch.equal(p.input_ids, ids) and torch.equal(p.images["pixel_values"], pictures[i])
        )
        length = int(inputs["completion_mask"][i].sum())
        rows.append(
            Row(
                prompt,
                tuple(inputs["completion_ids"][i, :length].tolist()),
                advantages=inputs["advantages"][i, :length],
                weights=torch.full((length,), 1 / (8 * length)),
                old_logprobs=inputs["old_per_token_logps"][i, :length],
            )
        )
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
    model.forward = type(model).forward.__get__(model)
    model.zero_grad()
    own = PolicyModule(model, processor.family, config.loss, temperature=1.0)
    loss, *_ = own(collate(rows, processor, torch.device("cpu"), torch.float32))
    loss.backward()
    assert_close(found, (loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_grpo_equals_trls_own_loss_of_every_type(tmp_path: Path, loss_type: str) -> None:
    trainer = vision_trainer(
        tmp_path,
        config=GRPO,
        loss_type=loss_type,
        num_iterations=2,
        beta=0.1,
        epsilon=0.02,
        temperature=0.8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    inputs = batch_of(trainer)
    assert inputs["advantages"].shape == (4,)
    found = loss_and_gradients(trainer, inputs)
    trainer._fused_loss = False
    assert_close(found, loss_and_gradients(trainer, inputs))


def test_importance_weights_of_the_sampler_and_tool_masks_equal_trls(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, num_iterations=2, beta=0.04, epsilon=0.02)
    inputs = batch_of(trainer)
    generator = torch.Generator().manual_seed(1)
    shape = inputs["completion_ids"].shape
    inputs["importance_sampling_ratio"] = 3 * torch.rand(shape, generator=generator)
    inputs["tool_mask"] = (torch.rand(shape, generator=generator) > 0.2).long()
    trainer.use_vllm = True  # TRL applies the ratio only then
    found = loss_and_gradients(trainer, inputs)
    trainer._fused_loss = False
    assert_close(found, loss_and_gradients(trainer, inputs))


def metrics_of_both_losses(trainer: MRPOTrainer, inputs: dict[str, Any]) -> list[dict[str, float]]:
    """What our loss and then TRL's own leave in TRL's metrics of the loss, for one batch."""
    found = []
    for trainer._fused_loss in (True, False):
        loss_and_gradients(trainer, inputs)
        metrics = trainer._metrics["train"]
        found.append({n: v[-1] for n, v in metrics.items() if n == "entropy" or n.startswith("clip_ratio/")})
    return found


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_metrics_equal_trls_where_advantages_are_zero(tmp_path: Path, share: float) -> None:
    """Such tokens cannot move the loss, but TRL counts their entropies."""
    trainer = vision_trainer(tmp_path, loss_type="grpo", num_iterations=2, epsilon=0.02, temperature=0.8)
    inputs = batch_of(trainer)
    inputs["advantages"][: int(share * len(inputs["advantages"]))] = 0.0
    ours, trls = metrics_of_both_losses(trainer, inputs)
    assert trls["entropy"] > 0.01
    assert ours == pytest.approx(trls, rel=0, abs=1e-5)


def test_evaluation_with_one_generation_has_an_entropy(tmp_path: Path) -> None:
    """Where a group has one completion, every advantage is zero."""
    trainer = vision_trainer(tmp_path, config=GRPO, num_generations_eval=1)
    assert trainer.evaluate(trainer.train_dataset)["eval_entropy"] > 0.01


def test_metrics_equal_trls_where_importance_weights_are_zero(tmp_path: Path) -> None:
    """TRL counts clipped ratios before it applies the weights of the sampler."""
    trainer = vision_trainer(tmp_path, loss_type="grpo", num_iterations=2, epsilon=0.02)
    inputs = batch_of(trainer)
    generator = torch.Generator().manual_seed(1)
    inputs["importance_sampling_ratio"] = torch.rand(inputs["completion_ids"].shape, generator=generator).round()
    trainer.use_vllm = True
    ours, trls = metrics_of_both_losses(trainer, inputs)
    assert trls["clip_ratio/region_mean"] > 0
    assert ours == pytest.approx(trls, rel=0, abs=1e-5)


def test_the_head_stays_trls_outside_the_loss(tmp_path: Path) -> None:
    """Generation and TRL's own calls with gradients see the forward that was there."""
    trainer = vision_trainer(tmp_path)
    model: nn.Module = trainer.model
    ids = torch.tensor([[1, 2, 3, 4]])
    outputs = model(input_ids=ids)
    assert outputs.logits.shape == (1, 4, 576)
    scored_here = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert scored_here.log_probs.requires_grad
    with torch.no_grad():
        ours = model(input_ids=ids, labels=ids, fused_lm_head=True)
    expected = outputs.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours.log_probs, expected, rtol=1e-5, atol=1e-5)
