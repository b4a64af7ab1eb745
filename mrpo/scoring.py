"""Completions to scores: steps, verdicts, rewards, and the table of numbers that processes share.

The table has one row per completion and one column per name in `COLUMNS`; NaN stands for "undefined". Advantages and
metrics are computed from the table of the whole batch, so they do not depend on the number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mrpo.algorithms import fill_unjudged
from mrpo.config import Config, JudgeConfig, RewardConfig
from mrpo.errors import UserError
from mrpo.judge import Judge, gold_rationale
from mrpo.judge.stats import overlap
from mrpo.metrics import failure_accumulation_rate, failure_stage, first_failure_point
from mrpo.records import Completion, Example, Group, JudgeRequest, ScoredCompletion, Step, Unjudged, Verdict
from mrpo.rewards import AnswerReward, AnswerScore, Rewards, length_reward, process_reward
from mrpo.steps import extract_answer, find_steps

if TYPE_CHECKING:  # it loads DeepSpeed, which verl's users may not have
    from mrpo.runtime import Runtime

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


class UnjudgedError(UserError):
    """The judge told too little to go on. Every process meets it at the same place, with the weights as they were."""


@dataclass(frozen=True)
class ParsedCompletion:
    """A completion of `example`, taken apart into reasoning steps and the text of its answer (None: no answer tag)."""

    example: Example
    completion: Completion
    steps: tuple[Step, ...]
    answer: str | None


@dataclass(frozen=True)
class PendingScore:
    """A completion whose steps are with the judge."""

    parsed: ParsedCompletion
    verdict: Future[Verdict | Unjudged]


class Scorer:
    """Finds steps, asks the judge and computes the rewards.

    A completion is handed over with `submit` the moment it is there, in any thread, and `collect` waits for the
    verdicts when they are needed; what the caller does in between hides the judge.
    """

    def __init__(
        self,
        config: Config,
        judge: Judge,
        tokenizer: object,
        think_tag: str,
        answer_reward: AnswerReward | None = None,
    ) -> None:
        """`answer_reward`: that of `config.reward`, if it was made before.

        Raises:
            UserError: it cannot be made; see `AnswerReward`.
        """
        self._config = config
        self._judge = judge
        self._tokenizer = tokenizer
        self._think_tag = think_tag
        self._answer_reward = answer_reward or AnswerReward(config.reward)
        self._waited = 0.0
        self._has_gold: list[bool] = []  # of the completions collected

    def submit(self, example: Example, completion: Completion) -> PendingScore:
        """Takes the completion apart and begins to judge its steps."""
        steps = tuple(find_steps(completion.token_ids, self._tokenizer, think_tag=self._think_tag))
        answer = extract_answer(completion.text, think_tag=self._think_tag)
        return submit_parsed(ParsedCompletion(example, completion, steps, answer), self._judge)

    def judged_groups(self, groups: Sequence[Sequence[PendingScore]]) -> list[int]:
        """Which of `groups` have all their verdicts, in order; waits until there is one, unless there are no groups."""
        began = time.perf_counter()
        while True:
            awaited = [[item.verdict for item in group if not item.verdict.done()] for group in groups]
            judged = [i for i, verdicts in enumerate(awaited) if not verdicts]
            if judged or not groups:
                self._waited += time.perf_counter() - began
                return judged
            wait((verdict for verdicts in awaited for verdict in verdicts), return_when=FIRST_COMPLETED)

    def reward_answers(self, pending: Sequence[PendingScore]) -> list[AnswerScore]:
        """The answer rewards, in order, which need no verdict."""
        return reward_answers(pending, self._answer_reward)

    def collect(
        self, pending: Sequence[PendingScore], answers: Sequence[AnswerScore] | None = None
    ) -> list[ScoredCompletion]:
        """Waits for the verdicts and computes the rewards, in order.

        Args:
            answers: what `reward_answers` gave for `pending`; None: computed here, before the wait.

        Raises:
            UserError: verdicts cannot be kept.
        """
        self._has_gold += [gold_rationale(item.parsed.example) is not None for item in pending]
        if answers is None:
            answers = self.reward_answers(pending)
        scored, waited = collect_scores(pending, answers, self._config.reward)
        self._waited += waited
        return scored

    def score(self, groups: Sequence[Group]) -> list[ScoredCompletion]:
        """Every completion of `groups`, prompt by prompt."""
        return self.collect(
            [self.submit(group.example, completion) for group in groups for completion in group.completions]
        )

    def judge_stats(self) -> dict[str, float]:
        """Metrics of the judge since the last call, of this process; `merge_stats` puts those of all together.

        judge/wait_s: seconds that `collect` stood waiting; judge/without_gold: share of the completions whose question
        has no gold rationale, so that Answer Contribution alone makes their steps valid. Of a judge that is asked over
        a network also what `Tally.take` and `overlap` in `mrpo.judge.stats` name, judge/cost_usd and judge/cached.
        """
        metrics = self._judge.stats() | {"judge/wait_s": self._waited}
        if self._has_gold:
            metrics["judge/without_gold"] = 1.0 - sum(self._has_gold) / len(self._has_gold)
        self._waited, self._has_gold = 0.0, []
        return metrics | overlap(metrics)

    def close(self) -> None:
        """Closes the judge."""
        self._judge.close()


def submit_parsed(parsed: ParsedCompletion, judge: Judge) -> PendingScore:
    """Begins to judge a completion that was taken apart before."""
    request = JudgeRequest(parsed.example, tuple(step.text for step in parsed.steps), parsed.answer)
    return PendingScore(parsed, judge.submit(request))


def reward_answers(pending: Sequence[PendingScore], answer_reward: AnswerReward) -> list[AnswerScore]:
    """The answer rewards of completions, in order, judged or not."""
    parsed = [item.parsed for item in pending]
    return answer_reward([p.answer for p in parsed], [p.example.answer for p in parsed])


def collect_scores(
    pending: Sequence[PendingScore], answers: Sequence[AnswerScore], config: RewardConfig
) -> tuple[list[ScoredCompletion], float]:
    """The scored completions, in order, and the seconds that went by waiting for verdicts.

    `answers`: their answer rewards; see `reward_answers`.
    """
    parsed = [item.parsed for item in pending]
    began = time.perf_counter()
    verdicts = [item.verdict.result() for item in pending]
    waited = time.perf_counter() - began
    scored = []
    for item, verdict, (value, parts) in zip(parsed, verdicts, answers, strict=True):
        rewards = Rewards(
            answer=value,
            process=process_reward(verdict, len(item.steps)),
            length=length_reward(len(item.steps), config.min_steps, config.max_steps),
            answer_parts=parts,
        )
        scored.append(ScoredCompletion(item.completion, item.answer, item.steps, verdict, rewards))
    return scored, waited


def check_judged(
    share: float, scored: Sequence[ScoredCompletion], what: str, config: JudgeConfig, runtime: Runtime
) -> None:
    """Refuses completions of which the judge told too little. Every process must call this.

    Args:
        share: of the completions of all processes, how many have no verdict.
        scored: the completions of this process.
        what: whose completions they are, for the message.

    Raises:
        UnjudgedError: `share` is above `judge.max_unjudged`. Every process raises it.
    """
    if share > config.max_unjudged:
        reasons = [item.verdict.reason for item in scored if isinstance(item.verdict, Unjudged)]
        # The process that tells it may have had an answer to every request of its own.
        told = next(reason for reason in runtime.gather_objects(next(iter(reasons), None)) if reason)
        raise UnjudgedError(
            f"the judge left {share:.0%} of {what} unjudged, above judge.max_unjudged={config.max_unjudged:.0%}: "
            f"{told}; when the judge answers again, continue with --resume, which asks only for what is missing"
        )


def score_table(scored: Sequence[ScoredCompletion], tau: float) -> torch.Tensor:
    """(B, len(COLUMNS)) float64, one row per completion."""
    rows = [_row(item, tau) for item in scored]
    return torch.tensor([[row[name] for name in COLUMNS] for row in rows], dtype=torch.float64)


def total_reward(table: Mapping[str, torch.Tensor], config: Config) -> torch.Tensor:
    """(B,) weighted sum of the three rewards. An unjudged completion has its group's mean process reward in it.

    So it is in the advantages, too; see `fill_unjudged`.
    """
    weights = config.reward
    process = fill_unjudged(table["process"].view(-1, config.rollout.group_size)).flatten()
    return (
        weights.answer_weight * table["answer"]
        + weights.process_weight * process
        + weights.length_weight * table["length"]
    )


def mean_reward(table: Mapping[str, torch.Tensor], config: Config) -> float:
    """The weighted sum of the three rewards' means, that of the process reward over the judged completions alone.

    It is the sum of the logged parts, however many completions stay unjudged; 0 stands for the mean of none.
    """
    means = {name: table[name].nanmean().nan_to_num(nan=0.0).item() for name in ("answer", "process", "length")}
    weights = config.reward
    return (
        weights.answer_weight * means["answer"]
        + weights.process_weight * means["process"]
        + weights.length_weight * means["length"]
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
