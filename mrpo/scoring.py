"""Completions to scores: steps, verdicts, rewards, and the table of numbers that processes share.

The table has one row per completion and one column per name in `COLUMNS`; NaN stands for "undefined". Advantages and
metrics are computed from the table of the whole batch, so they do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mrpo.config import Config, RewardConfig
from mrpo.judge import Judge
from mrpo.metrics import failure_accumulation_rate, failure_stage, first_failure_point
from mrpo.records import Completion, Example, Group, JudgeRequest, ScoredCompletion, Step, Verdict
from mrpo.rewards import AnswerReward, Rewards, length_reward, process_reward
from mrpo.steps import extract_answer, find_steps

PARTS = ("symbolic", "rouge1", "bleu1", "bertscore")
COLUMNS = (
    "answer",
    "process",
    "length",
    "correct",
    "num_steps",
    "valid_steps",
    "fully_valid",
    "early",
    "mid",
    "late",
    "far",
    "tokens",
    "truncated",
    "unjudged",
    *PARTS,
)
NAN = float("nan")


@dataclass(frozen=True)
class ParsedCompletion:
    """A completion of `example`, taken apart into reasoning steps and the text of its answer (None: no answer tag)."""

    example: Example
    completion: Completion
    steps: tuple[Step, ...]
    answer: str | None


class Scorer:
    """Finds steps, asks the judge and computes the rewards."""

    def __init__(self, config: Config, judge: Judge, tokenizer: object, think_tag: str) -> None:
        self._config = config
        self._judge = judge
        self._tokenizer = tokenizer
        self._think_tag = think_tag
        self._answer_reward = AnswerReward(config.reward)

    def score(self, groups: Sequence[Group]) -> list[ScoredCompletion]:
        """Every completion of `groups`, prompt by prompt."""
        parsed = [
            ParsedCompletion(
                group.example,
                completion,
                tuple(find_steps(completion.token_ids, self._tokenizer, think_tag=self._think_tag)),
                extract_answer(completion.text, think_tag=self._think_tag),
            )
            for group in groups
            for completion in group.completions
        ]
        return score_parsed(parsed, judge=self._judge, answer_reward=self._answer_reward, config=self._config.reward)


def score_parsed(
    parsed: Sequence[ParsedCompletion], *, judge: Judge, answer_reward: AnswerReward, config: RewardConfig
) -> list[ScoredCompletion]:
    """Asks the judge about the steps and computes the rewards of completions that were taken apart before."""
    verdicts = judge.judge([JudgeRequest(p.example, tuple(step.text for step in p.steps), p.answer) for p in parsed])
    answer_rewards = answer_reward([p.answer for p in parsed], [p.example.answer for p in parsed])
    scored = []
    for item, verdict, (value, parts) in zip(parsed, verdicts, answer_rewards, strict=True):
        rewards = Rewards(
            answer=value,
            process=process_reward(verdict, len(item.steps)),
            length=length_reward(len(item.steps), config.min_steps, config.max_steps),
            answer_parts=parts,
        )
        scored.append(ScoredCompletion(item.completion, item.answer, item.steps, verdict, rewards))
    return scored


def score_table(scored: Sequence[ScoredCompletion], tau: float) -> torch.Tensor:
    """(B, len(COLUMNS)) float64, one row per completion."""
    return torch.tensor([[_row(item, tau)[name] for name in COLUMNS] for item in scored], dtype=torch.float64)


def total_reward(table: Mapping[str, torch.Tensor], config: Config) -> torch.Tensor:
    """(B,) weighted sum of the three rewards; a process reward that is missing counts as nothing."""
    weights = config.reward
    process = table["process"].nan_to_num(nan=0.0)
    return (
        weights.answer_weight * table["answer"]
        + weights.process_weight * process
        + weights.length_weight * table["length"]
    )


def columns(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a score table by name, (B,) each."""
    return dict(zip(COLUMNS, table.unbind(dim=1), strict=True))


def _row(item: ScoredCompletion, tau: float) -> dict[str, float]:
    rewards = item.rewards
    row = dict.fromkeys(COLUMNS, NAN)
    row |= {
        "answer": rewards.answer,
        "process": NAN if rewards.process is None else rewards.process,
        "length": rewards.length,
        "correct": float(rewards.answer > tau),
        "num_steps": len(item.steps),
        "tokens": len(item.completion.token_ids),
        "truncated": float(item.completion.finish_reason == "length"),
        "unjudged": float(not isinstance(item.verdict, Verdict)),
    }
    row |= {name: rewards.answer_parts[name] for name in PARTS if name in rewards.answer_parts}
    if isinstance(item.verdict, Verdict):
        row |= _reasoning(item.verdict.validity)
    return row


def _reasoning(validity: Sequence[bool]) -> dict[str, float]:
    """How the judged steps of one completion fail."""
    point = first_failure_point(validity)
    rate = failure_accumulation_rate(validity)
    stage = None if point is None else failure_stage(point)
    return {
        "valid_steps": sum(validity) / len(validity) if validity else NAN,
        "fully_valid": float(bool(validity) and all(validity)),
        **{name: float(stage == name) for name in ("early", "mid", "late")},
        "far": NAN if rate is None else rate,
    }


def make_groups(
    examples: Sequence[Example], prompts: Sequence, completions: Sequence[Sequence[Completion]]
) -> list[Group]:
    """Examples, their prompts and their completions, zipped."""
    return [Group(e, p, tuple(c)) for e, p, c in zip(examples, prompts, completions, strict=True)]
