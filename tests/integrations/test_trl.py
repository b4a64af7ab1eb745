"""MRPO in TRL: real training on the CPU, and loss and gradients against the formula in fp64 and TRL's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="pip install 'mrpo[trl]'")

from trl import GRPOConfig, GRPOTrainer
from trl_models import CONFIG, examples, text_policy, vision_policy

from mrpo.backbones import load_processor
from mrpo.batching import Row, collate
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.integrations.rewards import example_of
from mrpo.integrations.trl import MRPOTrainer, mrpo_reward_funcs, to_dataset
from mrpo.judge.phantom import PhantomJudge
from mrpo.policy_module import PolicyModule
from mrpo.records import JudgeRequest, Unjudged, Verdict

GRPO = Config(algorithm="grpo")


class ForgetfulJudge(PhantomJudge):
    """The phantom judge, silent about every third completion."""

    def __init__(self) -> None:
        self.asked = 0

    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        self.asked += 1
        return Unjudged("silent") if self.asked % 3 == 2 else super().judge_one(request)


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 96,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_bias_correction_kl": False,
        "logging_steps": 1,
    }
    return GRPOConfig(**(settings | changes))


def vision_trainer(folder: Path, judge: Any = None, *, config: Config = CONFIG, **changes: Any) -> MRPOTrainer:
    model, processor = vision_policy()
    fused = changes.pop("fused_loss", True)
    return MRPOTrainer(
        model,
        judge or PhantomJudge(),
        arguments(folder, **changes),
        config=config,
        fused_loss=fused,
        train_dataset=to_dataset(examples(8)),
        processing_class=processor,
    )


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


def test_training_a_vision_language_policy_moves_its_weights(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, max_steps=3, beta=0.04, num_iterations=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("visual" in name for name in moved)
    assert any("lm_head" in name for name in moved)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs)
    assert logs[1]["kl"] > 0  # the second iteration on the same completions
    assert {"rewards/process_reward/mean", "steps/valid_steps", "steps/early"} <= logs[0].keys()


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


def test_advantages_follow_the_steps(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer._generate_and_score_completions(batch)
    rewards = torch.tensor(
        [
            sum(value or 0.0 for value in vars(item.rewards).values() if isinstance(value, float))
            for item in scored(trainer)
        ]
    ).view(2, 4)
    plain = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    shaped_some = False
    for item, advantage, row in zip(scored(trainer), plain.tolist(), outputs["advantages"], strict=True):
        length = len(item.completion.token_ids)
        expected = [advantage] * length
        if item.rewards.answer <= 0.6:
            count = len(item.steps)
            for k, (step, valid) in enumerate(zip(item.steps, item.verdict.validity, strict=True)):
                factor = 1.0 if valid else -math.exp(1 - (k / (count - 1) if count > 1 else 1))
                expected[step.start : step.end] = [factor * abs(advantage)] * (step.end - step.start)
                shaped_some |= not valid and advantage != 0
        torch.testing.assert_close(row[:length], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        assert (row[length:] == 0).all()
    assert shaped_some


def scored(trainer: MRPOTrainer) -> list[Any]:
    return trainer._steps.scored


def test_an_unjudged_completion_does_not_lower_the_others(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, ForgetfulJudge())
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer._generate_and_score_completions(batch)
    rewards = torch.tensor(
        [
            [r.answer, math.nan if r.process is None else r.process, r.length]
            for r in (item.rewards for item in scored(trainer))
        ]
    ).view(2, 4, 3)
    filled = rewards.clone()
    for group in filled:
        group[group[:, 1].isnan(), 1] = group[:, 1].nanmean()
    total = filled.sum(2)
    plain = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)
    silent = [i for i, item in enumerate(scored(trainer)) if isinstance(item.verdict, Unjudged)]
    assert silent == [1, 4, 7]
    for i in silent:
        length = len(scored(trainer)[i].completion.token_ids)
        torch.testing.assert_close(
            outputs["advantages"][i, :length], plain.flatten()[i].expand(length), rtol=1e-4, atol=1e-5
        )


def test_a_text_policy_with_an_adapter_trains(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = text_policy()
    questions = to_dataset(examples(8)).remove_columns(["images"])
    trainer = MRPOTrainer(
        model,
        PhantomJudge(),
        arguments(tmp_path, max_completion_length=12, beta=0.04, max_steps=2),
        train_dataset=questions,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_reward_functions_work_in_trls_own_trainer_and_ask_the_judge_once(tmp_path: Path) -> None:
    class CountingJudge(PhantomJudge):
        asked = 0

        def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
            self.asked += 1
            return super().judge_one(request)

    judge = CountingJudge()
    model, processor = vision_policy()
    trainer = GRPOTrainer(
        model,
        mrpo_reward_funcs(judge, processor.tokenizer, think_tag="thinking"),
        arguments(tmp_path, max_steps=2),
        train_dataset=to_dataset(examples(8)),
        processing_class=processor,
    )
    trainer.train()
    assert judge.asked == 2 * 8
    logs = trainer.state.log_history[0]
    parts = [logs[f"rewards/{name}_reward/mean"] for name in ("answer", "process", "length")]
    assert logs["reward"] == pytest.approx(sum(parts), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"use_bias_correction_kl": True, "beta": 0.04}, "use_bias_correction_kl=True with beta=0.04"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
        ({"entropy_coef": 0.01}, "entropy bonus"),
        ({"off_policy_mask_threshold": 0.5}, "one advantage a completion"),
        ({"loss_type": "vespo", "fused_loss": False}, "one advantage a completion"),
        ({"config": Config(algorithm="gdpo")}, "algorithm=gdpo"),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        vision_trainer(tmp_path, **changes)


def test_a_head_that_is_not_linear_or_scales_its_logits_is_named(tmp_path: Path) -> None:
    model, tokenizer = text_policy()
    model.config.logit_scale = 0.5
    with pytest.raises(UserError, match=r"logit_scale=0\.5 of the model"):
        MRPOTrainer(
            model,
            PhantomJudge(),
            arguments(tmp_path),
            train_dataset=to_dataset(examples(8)).remove_columns(["images"]),
            processing_class=tokenizer,
        )


def test_losses_that_only_trl_knows_train_with_shaped_advantages(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, fused_loss=False, loss_type="sapo", max_steps=1)
    before = copy.deepcopy(trainer.model.lm_head.weight)
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_rows_become_examples() -> None:
    phantom = examples(1)[0]
    example = example_of(to_dataset([phantom])[0])
    assert (example.question, example.answer, example.rationale) == (
        phantom.question,
        phantom.answer,
        phantom.rationale,
    )
    assert example.metadata == phantom.metadata
    assert example.load_images()[0].tobytes() == phantom.load_images()[0].tobytes()
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which organ?"}]}]
    bare = example_of({"prompt": prompt, "solution": 3})
    assert (bare.question, bare.answer, bare.rationale, bare.images) == ("Which organ?", "3", None, ())
    with pytest.raises(UserError, match="column answer"):
        example_of({"prompt": "Which organ?"})


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


def test_telescoped_credits_keep_the_sum_of_each_group(tmp_path: Path) -> None:
    """Spread over steps, the advantages of a group still add up to zero once for each judged completion."""
    config = Config.model_validate({"advantage": {"credit": "telescoped"}})
    trainer = vision_trainer(tmp_path, config=config)
    trainer.model.train()
    outputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    for group in range(2):
        total = 0.0
        for row, item in list(zip(outputs["advantages"], scored(trainer), strict=True))[4 * group :][:4]:
            assert not isinstance(item.verdict, Unjudged)
            total += sum(row[step.start].item() for step in item.steps) + row[0].item()  # the tag stands outside
        assert total == pytest.approx(0.0, abs=1e-4)
