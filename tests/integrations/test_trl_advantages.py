"""Advantages of MRPO in TRL: those of the steps, of what stays unjudged, of telescoped credit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'mrpo[trl]'")

from trl_trainers import vision_trainer

from mrpo.config import Config
from mrpo.integrations.trl import MRPOTrainer
from mrpo.judge.phantom import PhantomJudge
from mrpo.records import JudgeRequest, Unjudged, Verdict


class ForgetfulJudge(PhantomJudge):
    """The phantom judge, silent about every third completion."""

    def __init__(self) -> None:
        self.asked = 0

    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        self.asked += 1
        return Unjudged("silent") if self.asked % 3 == 2 else super().judge_one(request)


def scored(trainer: MRPOTrainer) -> list[Any]:
    return trainer._steps.scored


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
