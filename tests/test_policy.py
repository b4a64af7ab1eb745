"""The policy's loss and gradient against full logits and autograd in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.batching import Row, collate
from mrpo.config import Config, LossConfig
from mrpo.data.phantom import PhantomDataset
from mrpo.deepspeed_config import deepspeed_config, reference_config
from mrpo.policy import loss_temperature
from mrpo.policy_module import PolicyModule
from mrpo.settings import load_config

LOSS = LossConfig(epsilon_low=0.1, epsilon_high=0.3, beta=0.05)


@pytest.fixture(scope="module")
def config(tiny_policy: Path) -> Config:
    return Config.model_validate({"model": {"path": str(tiny_policy)}})


@pytest.fixture(scope="module")
def processor(config: Config) -> Processor:
    return load_processor(config)


def make_rows(processor: Processor, seed: int) -> list[Row]:
    """Ragged rows whose old log-probabilities put ratios on both sides of both clip bounds."""
    generator = torch.Generator().manual_seed(seed)
    dataset = PhantomDataset("train", size=6, seed=seed)
    rows = []
    for i, example in enumerate(dataset):
        tokens = processor.encode_target(example.rationale or "", example.answer)[: 9 + 5 * i]
        size = (len(tokens),)
        old = -6.2 + torch.randn(size, generator=generator)
        rows.append(
            Row(
                processor.encode_prompt(example),
                tokens,
                advantages=torch.randn(size, generator=generator),
                weights=torch.full(size, 1 / (len(tokens) * len(dataset))),
                old_logprobs=old,
                ref_logprobs=old + 0.3 * torch.randn(size, generator=generator),
            )
        )
    return rows


def reference_loss(model: Any, rows: list[Row], processor: Processor) -> torch.Tensor:
    """The objective written out: one unpadded row at a time, full logits, fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.cat([row.prompt.input_ids, torch.tensor(row.token_ids)])[None]
        types = torch.cat([row.prompt.token_type_ids, torch.zeros(len(row.token_ids), dtype=torch.long)])[None]
        pixels = row.prompt.images["pixel_values"].double()
        grid = row.prompt.images["image_grid_thw"]
        logits = model(input_ids=ids, mm_token_type_ids=types, pixel_values=pixels, image_grid_thw=grid).logits[0]
        start = len(row.prompt.input_ids)
        logprobs = logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        assert row.old_logprobs is not None
        assert row.ref_logprobs is not None
        ratio = (logprobs - row.old_logprobs.double()).exp()
        bounded = ratio.clamp(1 - LOSS.epsilon_low, 1 + LOSS.epsilon_high)
        advantages = row.advantages.double()
        surrogate = torch.minimum(ratio * advantages, bounded * advantages)
        gap = row.ref_logprobs.double() - logprobs
        total = total + ((-surrogate + LOSS.beta * (gap.exp() - gap - 1)) * row.weights.double()).sum()
    return total


def test_sft_imitates_at_temperature_1_whatever_is_sampled_at() -> None:
    for algorithm, expected in (("sft", 1.0), ("mrpo", 0.5)):
        assert loss_temperature(load_config(None, [f"algorithm={algorithm}", "rollout.temperature=0.5"])) == expected


def test_loss_and_gradient_equal_full_logits_in_fp64(config: Config, processor: Processor) -> None:
    model = load_model(config.model)
    exact = copy.deepcopy(model).double()
    rows = make_rows(processor, seed=4)
    expected = reference_loss(exact, rows, processor)
    expected.backward()

    module = PolicyModule(model, processor.family, LOSS, temperature=1.0)
    loss, _, clipped, *_ = module(collate(rows, processor, torch.device("cpu"), torch.float32))
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < int(clipped.sum()) < len(clipped)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert other.grad is not None, name
        error = (parameter.grad.double() - other.grad).norm()
        # Some gradients are zero in exact arithmetic (a bias that shifts every key alike): noise is all they hold.
        assert error <= 1e-5 * other.grad.norm() + 1e-9, name


def test_micro_batches_add_up(config: Config, processor: Processor) -> None:
    rows = make_rows(processor, seed=5)
    gradients = []
    for size in (6, 4, 1):
        module = PolicyModule(load_model(config.model), processor.family, LOSS, temperature=1.0)
        for i in range(0, len(rows), size):
            module(collate(rows[i : i + size], processor, torch.device("cpu"), torch.float32))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=2e-6 * gradients[0].abs().max().item())


def test_deepspeed_config_follows_the_typed_one_and_takes_extras() -> None:
    config = Config.model_validate(
        {
            "model": {"dtype": "bfloat16"},
            "optim": {"micro_batch_size": 3, "max_grad_norm": 0.5},
            "deepspeed": {
                "zero_stage": 3,
                "offload_optimizer": True,
                "extra": {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True},
            },
        }
    )
    made = deepspeed_config(config)
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    assert made["bf16"] == {"enabled": True}
    assert made["gradient_clipping"] == 0.5
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert made["wall_clock_breakdown"] is True


def test_the_reference_has_no_optimizer_and_may_live_in_host_memory() -> None:
    config = Config.model_validate(
        {"loss": {"reference_offload": True}, "deepspeed": {"zero_stage": 3, "offload_optimizer": True}}
    )
    made = reference_config(config)
    assert made["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert "gradient_clipping" not in made
