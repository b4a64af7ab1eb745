"""Greedy evaluation of the current policy on held-out questions, shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from mrpo.backbones import Processor
from mrpo.config import Config
from mrpo.in_thread import in_thread
from mrpo.quantities import fully_valid, is_in_stage
from mrpo.records import Completion, EncodedPrompt, EvaluatedSample, Example, ScoredCompletion, Verdict
from mrpo.rollout import RolloutEngine, SamplingParams
from mrpo.runtime import Runtime
from mrpo.samples import sample_record
from mrpo.scoring import PendingScore, Scorer, check_judged


@dataclass(frozen=True)
class Evaluation:
    """The outcome on every question, in the order of the data set, and a few completions to read."""

    samples: list[EvaluatedSample]
    shown: list[dict[str, Any]]


def evaluate(
    examples: Sequence[Example],
    *,
    config: Config,
    runtime: Runtime,
    processor: Processor,
    engine: RolloutEngine,
    scorer: Scorer,
    progress: Callable[[int], None],
) -> Evaluation:
    """One greedy completion per question. Every process must call this; all get the whole outcome.

    A completion goes to the judge the moment its generation ends. `progress` is told how many questions of all
    processes were answered since the last call.

    Raises:
        UserError: more completions stayed unjudged than `judge.max_unjudged` allows: figures over the few that are left
            would pass for those of all.
    """
    mine = [examples[i] for i in range(runtime.rank, len(examples), runtime.world_size)]
    params = SamplingParams(num_completions=1, max_tokens=config.rollout.max_tokens, temperature=0.0)
    pending: dict[int, PendingScore] = {}

    def judge(start: int, prompt: int, _: int, completion: Completion) -> None:
        pending[start + prompt] = scorer.submit(mine[start + prompt], completion)

    def encode(start: int) -> list[EncodedPrompt]:
        return [processor.encode_prompt(example) for example in mine[start:][: config.rollout.batch_size]]

    # Every process takes part in every round, with nothing to do in its last one perhaps: weights may be gathered. No
    # round waits for the verdicts of another, and its prompts are made while the one before it is answered.
    per_round = config.rollout.batch_size * runtime.world_size
    coming = in_thread(partial(encode, 0))
    for first in range(0, len(examples), per_round):
        start, prompts = first // runtime.world_size, coming.result()
        coming = in_thread(partial(encode, start + config.rollout.batch_size))
        engine.generate(prompts, params, partial(judge, start))
        progress(min(per_round, len(examples) - first))
    scored = scorer.collect([pending[place] for place in range(len(mine))])
    outcomes = list(zip(mine, scored, strict=True))
    parts = runtime.gather_objects([_evaluated(example, item, config) for example, item in outcomes])
    samples = [parts[i % runtime.world_size][i // runtime.world_size] for i in range(len(examples))]
    unjudged = num_unjudged(samples) / max(1, len(samples))
    check_judged(unjudged, scored, "an evaluation's completions", config.judge, runtime)
    return Evaluation(samples, [sample_record(*outcome) for outcome in outcomes[: config.log.samples]])


def num_unjudged(samples: Sequence[EvaluatedSample]) -> int:
    """How many completions have no verdict."""
    return sum(sample.validity is None for sample in samples)


def validation_metrics(samples: Sequence[EvaluatedSample]) -> dict[str, float]:
    """validation/NAME: of all questions accuracy, unjudged; of those judged reward, early (failures), fully_valid."""
    quantities = {"early": is_in_stage("early"), "fully_valid": fully_valid}
    metrics = {
        "accuracy": [float(s.correct) for s in samples],
        "unjudged": [float(s.validity is None) for s in samples],
        "reward": [s.reward for s in samples if s.validity is not None],
    }
    metrics |= {
        name: [value for sample in samples if (value := quantity(sample)) is not None]
        for name, quantity in quantities.items()
    }
    return {f"validation/{name}": fmean(values) for name, values in metrics.items() if values}


def _evaluated(example: Example, item: ScoredCompletion, config: Config) -> EvaluatedSample:
    rewards, weights = item.rewards, config.reward
    return EvaluatedSample(
        question_id=example.id,
        correct=rewards.answer_parts["symbolic"] == 1.0,
        validity=item.verdict.validity if isinstance(item.verdict, Verdict) else None,
        reward=weights.answer_weight * rewards.answer
        + weights.process_weight * (rewards.process or 0.0)
        + weights.length_weight * rewards.length,
        greedy=True,
    )
