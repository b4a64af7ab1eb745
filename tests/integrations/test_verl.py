"""MRPO's advantages for verl: by hand, then through verl's own registry, trainer function and reward manager."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest
import torch
from scored_items import scored

from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.integrations.verl import mrpo_advantages, step_record

E = math.e


def record(*steps: tuple[int, int, bool], correct: bool = False, process: float | None = 0.0) -> str:
    return json.dumps({"correct": correct, "process": process, "steps": steps})


def rewards_at_the_end(scores: list[float], length: int) -> torch.Tensor:
    rewards = torch.zeros(len(scores), length)
    rewards[:, -1] = torch.tensor(scores)
    return rewards


def test_wrong_answers_are_shaped_and_right_ones_are_not() -> None:
    mask = torch.ones(3, 6)
    mask[2, 5] = 0
    records = [
        record((1, 3, False), (3, 4, True), (4, 5, False)),
        record((1, 3, False), correct=True, process=0.5),
        record(process=None),
    ]
    found = mrpo_advantages(rewards_at_the_end([0.0, 2.0, 1.0], 6), mask, ["a"] * 3, records)
    # The third was not judged: it takes the mean of 0 and 0.5, so the scores are 0, 2 and 1.25.
    scores = torch.tensor([0.0, 2.0, 1.25], dtype=torch.float64)
    a, b, c = ((scores - scores.mean()) / (scores.std() + 1e-4)).tolist()
    assert a < 0
    expected = [[a, a * E, a * E, -a, a, a], [b] * 6, [c, c, c, c, c, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_groups_are_compared_alone_and_in_any_order() -> None:
    rewards = rewards_at_the_end([1.0, 5.0, 3.0, 5.0], 2)
    found = mrpo_advantages(rewards, torch.ones(4, 2), ["a", "b", "a", "b"], [record()] * 4, normalize_by_std=False)
    torch.testing.assert_close(found[:, 0], torch.tensor([-1.0, 0.0, 1.0, 0.0]))


def test_a_record_says_what_was_judged() -> None:
    config = Config.model_validate({"reward": {"process_weight": 2.0}})
    item = json.loads(step_record(scored([True, False], answer=0.7), config))
    assert item == {"correct": True, "process": 1.0, "steps": [[1, 3, True], [3, 5, False]]}
    assert json.loads(step_record(scored(None), config)) == {"correct": False, "process": None, "steps": []}


def data_proto(records: list[str] | None) -> Any:
    import numpy as np
    from verl import DataProto

    tensors = {"token_level_rewards": rewards_at_the_end([0.0, 2.0], 4), "response_mask": torch.ones(2, 4)}
    fields = {"uid": np.array(["a", "a"], dtype=object)}
    if records is not None:
        fields["mrpo_steps"] = np.array(records)
    return DataProto.from_dict(tensors=tensors, non_tensors=fields)


def test_verls_trainer_function_finds_the_verdicts() -> None:
    pytest.importorskip("verl", reason="pip install verl")
    from omegaconf import OmegaConf
    from verl.trainer.ppo import ray_trainer

    from mrpo.integrations.verl import register

    register()
    register()
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True})
    data = data_proto([record((0, 2, False), (2, 3, True)), record(correct=True)])
    found = ray_trainer.compute_advantage(data, adv_estimator="mrpo", config=config).batch["advantages"]
    a = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(found, torch.tensor([[-E * a, -E * a, a, -a], [a, a, a, a]]))
    plain = ray_trainer.compute_advantage(data, adv_estimator="grpo", config=config).batch["advantages"]
    assert plain[0].tolist() == [pytest.approx(-a, rel=1e-3)] * 4
    with pytest.raises(UserError, match=r"mrpo_steps.*use_v1=False"):
        ray_trainer.compute_advantage(data_proto(None), adv_estimator="mrpo", config=config)


def test_verl_loads_the_plugin() -> None:
    pytest.importorskip("verl", reason="pip install verl")
    code = "from verl.trainer.ppo.core_algos import get_adv_estimator_fn; print(get_adv_estimator_fn('mrpo').__name__)"
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "mrpo.integrations.verl_plugin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "estimate"


def test_the_reward_manager_scores_a_response_by_its_own_tokens() -> None:
    pytest.importorskip("verl", reason="pip install verl")
    import numpy as np
    from transformers import PreTrainedTokenizerFast
    from verl import DataProto
    from verl.utils.ray_utils import get_event_loop

    from mrpo.data.phantom import PhantomDataset
    from mrpo.integrations.verl_rewards import StepRewardManager
    from mrpo.judge.phantom import PhantomJudge

    class Rewards(StepRewardManager):
        judge = PhantomJudge()
        think_tag = "thinking"

    folder = files("mrpo") / "assets" / "phantom"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    example = PhantomDataset("train", size=1)[0]
    text = f"<thinking>{example.rationale}</thinking><answer>{example.answer}</answer><|im_end|>"
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    padding = 5
    row = {
        "reward_model": {"ground_truth": example.answer},
        "extra_info": {"question": example.question, "rationale": example.rationale, "metadata": example.metadata},
    }
    data = DataProto.from_dict(
        tensors={
            "responses": torch.tensor([[*token_ids, *[0] * padding]]),
            "attention_mask": torch.tensor([[1] * (3 + len(token_ids)) + [0] * padding]),
        },
        non_tensors={name: np.array([value], dtype=object) for name, value in row.items()},
    )
    manager = Rewards(config=None, tokenizer=tokenizer, compute_score=None)
    result = get_event_loop().run_until_complete(manager.run_single(data))
    info = result["reward_extra_info"]
    assert (info["answer_reward"], info["process_reward"]) == (1.0, 1.0)
    assert result["reward_score"] == pytest.approx(2.0 + info["length_reward"])
    steps = json.loads(info["mrpo_steps"])["steps"]
    texts = [tokenizer.decode(token_ids[start:end]).strip() for start, end, _ in steps]
    assert " ".join(texts) == example.rationale
    assert all(valid for *_, valid in steps)
