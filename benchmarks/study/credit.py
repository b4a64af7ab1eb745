"""Whether token advantages agree with what a step really does, without training anything.

A completion is continued from the end of each of its steps, several times. The mean outcome of these continuations
minus that from the step before is the step's true effect, on right answers or on the reward, up to sampling noise. The
agreement of a scheme is the cosine between its advantages and the effects over all tokens (those outside steps too): if
the gradients of tokens were orthogonal and of one length, it would be the cosine between the scheme's update and the
true policy gradient. Noise in the effects lowers every scheme's cosine alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study.measuring import Loaded
from study.plan import Arm

from mrpo import algorithms
from mrpo.backbones import Processor
from mrpo.config import Config
from mrpo.estimates import Estimate, Floats, summarize_draws
from mrpo.records import Completion, EncodedPrompt, Example, Group, ScoredCompletion, Verdict
from mrpo.rollout import SamplingParams
from mrpo.scoring import columns, make_groups, score_table
from mrpo.seeding import derive_seed
from mrpo.shaping import token_advantages

_AT_ONCE = 64  # prefixes continued in one call
EFFECTS = ("answer", "reward")


@dataclass(frozen=True)
class Part:
    """A step of a completion, or (`step` -1) the tokens outside its steps: how many tokens, where it stands, the true
    effects, and the advantage that each scheme gives its tokens. `place` is "first failure", "later failure", "valid
    before failure", "valid after failure" or "outside"."""

    prompt: int
    step: int
    tokens: int
    place: str
    effects: tuple[float, float]
    advantages: tuple[float, ...]


def study_credit(
    policy: Loaded,
    examples: Sequence[Example],
    arms: Sequence[Arm],
    configure: Callable[[Arm], Config],
    continuations: int,
) -> list[Part]:
    """The parts of G completions of each example, with the advantages of `arms`; each prefix is continued so often."""
    config, processor, engine, scorer = policy.config, policy.processor, policy.engine, policy.scorer
    size = config.rollout.group_size
    prompts = [processor.encode_prompt(example) for example in examples]
    seeds = tuple(derive_seed("credit", example.id) for example in examples)
    params = SamplingParams(size, config.rollout.max_tokens, config.rollout.temperature, seeds)
    scored = scorer.score(make_groups(examples, prompts, engine.generate(prompts, params)))
    prefixes = {(i // size, ids) for i, item in enumerate(scored) for ids in _prefixes(item)}
    ordered = sorted(prefixes, key=lambda prefix: (len(prefix[1]), prefix))
    values: dict[tuple[int, tuple[int, ...]], Floats] = {}
    for first in range(0, len(ordered), _AT_ONCE):
        chunk = ordered[first : first + _AT_ONCE]
        starts = [_extended(prompts[number], ids) for number, ids in chunk]
        found = engine.generate(starts, _params(config, chunk, continuations))
        groups = [
            Group(examples[n], prompts[n], tuple(_whole(processor, ids, c) for c in completions))
            for (n, ids), completions in zip(chunk, found, strict=True)
        ]
        outcomes = _outcomes(scorer.score(groups), config).reshape(len(chunk), continuations, -1).mean(1)
        values |= dict(zip(chunk, outcomes, strict=True))
    own = _outcomes(scored, config)
    tokens = [_token_advantages(configure(arm), scored) for arm in arms]
    parts = []
    for i, item in enumerate(scored):
        of_prefix = [values[i // size, ids] for ids in _prefixes(item)]
        effects = np.diff([*of_prefix, own[i]], axis=0)
        for step, place in [*enumerate(_places(item)), (-1, "outside")]:
            token, count = _tokens_of(item, step)
            given = tuple(float(of_arm[i][token]) for of_arm in tokens)
            parts.append(Part(i // size, step, count, place, tuple(effects[step].tolist()), given))
    return parts


def _prefixes(item: ScoredCompletion) -> Iterator[tuple[int, ...]]:
    """What stands before the first step, then at the end of each."""
    yield ()
    for step in item.steps:
        yield item.completion.token_ids[: step.end]


def _extended(prompt: EncodedPrompt, ids: tuple[int, ...]) -> EncodedPrompt:
    added = torch.tensor(ids, dtype=torch.long)
    return EncodedPrompt(
        torch.cat([prompt.input_ids, added]),
        torch.cat([prompt.token_type_ids, torch.zeros_like(added)]),
        prompt.images,
        prompt.text_ids,
        prompt.pictures,
    )


def _params(config: Config, prefixes: Sequence[tuple[int, tuple[int, ...]]], count: int) -> SamplingParams:
    seeds = tuple(derive_seed("continue", number, *ids) for number, ids in prefixes)
    return SamplingParams(count, config.rollout.max_tokens, config.rollout.temperature, seeds)


def _whole(processor: Processor, ids: tuple[int, ...], rest: Completion) -> Completion:
    whole = ids + rest.token_ids
    return Completion(whole, processor.decode(whole), rest.finish_reason)


def _outcomes(scored: Sequence[ScoredCompletion], config: Config) -> Floats:
    """(B, 2): right or wrong, and the reward."""
    weights, rewards = config.reward, [item.rewards for item in scored]
    right = [found.answer_parts["symbolic"] == 1.0 for found in rewards]
    total = [
        weights.answer_weight * found.answer
        + weights.process_weight * (found.process or 0.0)
        + weights.length_weight * found.length
        for found in rewards
    ]
    return np.stack([np.array(right, dtype=np.float64), np.array(total)], axis=1)


def _token_advantages(config: Config, scored: Sequence[ScoredCompletion]) -> list[torch.Tensor]:
    table = columns(score_table(scored, config.advantage.tau))
    rewards = (table[name].view(-1, config.rollout.group_size) for name in ("answer", "process", "length"))
    return token_advantages(config, scored, algorithms.advantages(config, *rewards).flatten())


def _places(item: ScoredCompletion) -> list[str]:
    assert isinstance(item.verdict, Verdict)
    places, intact = [], True
    for valid in item.verdict.validity:
        if valid:
            places.append("valid before failure" if intact else "valid after failure")
        else:
            places.append("first failure" if intact else "later failure")
            intact = False
    return places


def _tokens_of(item: ScoredCompletion, step: int) -> tuple[int, int]:
    """One token of a part (they have one advantage), and how many there are."""
    if step >= 0:
        return item.steps[step].start, item.steps[step].end - item.steps[step].start
    count = len(item.completion.token_ids)
    inside = sum(step.end - step.start for step in item.steps)
    return count - 1, count - inside


def agreement(parts: Sequence[Part], scheme: int, effect: int, *, resamples: int = 500) -> tuple[Estimate, Floats]:
    """The cosine of a scheme with an effect, with an interval over prompts, and its resamples (equal draws for all)."""
    tokens, prompts = np.array([p.tokens for p in parts], float), np.array([p.prompt for p in parts])
    advantages = np.array([p.advantages[scheme] for p in parts])
    effects = np.array([p.effects[effect] for p in parts])
    products = np.stack([tokens * advantages * effects, tokens * advantages**2, tokens * effects**2])
    sums = np.stack([np.bincount(prompts, row) for row in products])  # (3, P)
    generator = np.random.default_rng(0)
    count = sums.shape[1]
    picks = (generator.integers(count, size=count) for _ in range(resamples))
    drawn = np.array([_cosine(sums[:, pick].sum(1)) for pick in picks])
    return summarize_draws(np.array(_cosine(sums.sum(1))), drawn, 0.95), drawn


def _cosine(sums: Floats) -> float:
    dot, first, second = sums
    return float(dot / np.sqrt(first * second)) if first > 0 and second > 0 else 0.0


def write_parts(path: Path, schemes: Sequence[str], parts: Sequence[Part]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schemes": list(schemes), "parts": [list(vars(p).values()) for p in parts]}))
    partial.rename(path)


def read_parts(path: Path) -> tuple[list[str], list[Part]]:
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found["schemes"], [Part(a, b, c, d, tuple(e), tuple(f)) for a, b, c, d, e, f in found["parts"]]
