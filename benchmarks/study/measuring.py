"""What the study keeps of a policy: every answer to held-out questions, judged without error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import Config
from mrpo.judge.phantom import PhantomJudge
from mrpo.records import Example, ScoredCompletion, Verdict
from mrpo.rollout import SamplingParams
from mrpo.rollout.hf import HFEngine
from mrpo.scoring import Scorer, make_groups
from mrpo.seeding import derive_seed


@dataclass(frozen=True)
class Sample:
    """One judged completion. `validity` has a digit a step, 1 for valid; `faults` the judge's word on invalid ones."""

    question_id: str
    kind: str
    greedy: bool
    correct: bool
    steps: str
    reward: float
    faults: str

    @property
    def validity(self) -> tuple[bool, ...]:
        return tuple(digit == "1" for digit in self.steps)


# What the judge says of an invalid step -> the letter that stands for it in `Sample.faults`.
FAULTS = {
    "not a statement": "n",
    "repeats": "r",
    "false": "f",
    "true, but": "o",
    "contradicts": "c",
    "skips": "s",
}


@dataclass(frozen=True)
class Loaded:
    """A policy that answers questions and is scored without error."""

    config: Config
    processor: Processor
    engine: HFEngine
    scorer: Scorer


def load(config: Config, *, batch: int = 256) -> Loaded:
    """The policy of `config.model.path`; `batch` completions are made at once."""
    processor = load_processor(config)
    policy = load_model(config.model)
    policy.eval()
    engine = HFEngine(policy, processor, batch_size=batch, weights=torch.no_grad)
    return Loaded(config, processor, engine, Scorer(config, PhantomJudge(), processor.tokenizer, processor.think_tag))


def measure(
    config: Config, model: Path, sets: Mapping[str, tuple[Sequence[Example], int]], *, batch: int = 256
) -> dict[str, list[Sample]]:
    """The policy in `model` on each set: one greedy completion a question, and as many sampled ones as the set says.

    A batch takes as long as its longest completion: neighbours should be alike.
    """
    rollout = config.rollout
    of = load(config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})}), batch=batch)
    results: dict[str, list[Sample]] = {name: [] for name in sets}
    for name, (questions, sampled) in sets.items():
        for first in range(0, len(questions), batch):
            examples = questions[first : first + batch]
            prompts = [of.processor.encode_prompt(example) for example in examples]
            seeds = tuple(derive_seed("measure", example.id) for example in examples)
            for count, temperature in ((1, 0.0), (sampled, rollout.temperature)):
                if count:
                    params = SamplingParams(count, rollout.max_tokens, temperature, seeds)
                    scored = of.scorer.score(make_groups(examples, prompts, of.engine.generate(prompts, params)))
                    owners = [example for example in examples for _ in range(count)]
                    results[name] += _samples(owners, scored, greedy=temperature == 0.0)
    return results


def _samples(examples: Sequence[Example], scored: Sequence[ScoredCompletion], *, greedy: bool) -> list[Sample]:
    return [_sample(example, item, greedy) for example, item in zip(examples, scored, strict=True)]


def _sample(example: Example, item: ScoredCompletion, greedy: bool) -> Sample:
    verdict = item.verdict
    assert isinstance(verdict, Verdict)
    rewards = item.rewards
    faults = (next(v for k, v in FAULTS.items() if s.reason.startswith(k)) for s in verdict.steps if not s.valid)
    return Sample(
        question_id=example.id,
        kind=example.metadata["question"]["kind"],
        greedy=greedy,
        correct=rewards.answer_parts["symbolic"] == 1.0,
        steps="".join("01"[valid] for valid in verdict.validity),
        reward=round(rewards.answer + (rewards.process or 0.0) + rewards.length, 5),
        faults="".join(faults),
    )


def write_samples(path: Path, results: Mapping[str, Sequence[Sample]]) -> None:
    """The whole file or none, one list a sample."""
    table = {name: [list(asdict(sample).values()) for sample in samples] for name, samples in results.items()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, separators=(",", ":")), encoding="utf-8")
    partial.rename(path)


def read_samples(path: Path) -> dict[str, list[Sample]]:
    """What `write_samples` wrote."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return {name: [Sample(*row) for row in rows] for name, rows in table.items()}
