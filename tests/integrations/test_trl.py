"""MRPO in TRL: real training on the CPU, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'mrpo[trl]'")

from trl import GRPOTrainer
from trl_models import examples, text_policy, vision_policy
from trl_trainers import arguments, vision_trainer

from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.integrations.rewards import example_of
from mrpo.integrations.trl import MRPOTrainer, mrpo_reward_funcs, to_dataset
from mrpo.judge.phantom import PhantomJudge
from mrpo.records import JudgeRequest, Unjudged, Verdict


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


def test_losses_that_only_trl_knows_train_with_shaped_advantages(tmp_path: Path) -> None:
    trainer = vision_trainer(tmp_path, fused_loss=False, loss_type="sapo", max_steps=1)
    before = copy.deepcopy(trainer.model.lm_head.weight)
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)


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
