"""The first half of a step: completions of its questions, on their way to the judge, and their log-probabilities.

Every completion goes to the judge the moment its generation ends; while the verdicts arrive, the weights that sampled
it say its log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from mrpo.batching import Row
from mrpo.config import Config
from mrpo.data.order import batch_indices
from mrpo.in_thread import in_thread
from mrpo.policy import Policy
from mrpo.records import Completion, EncodedPrompt, Example, Group
from mrpo.rollout import RolloutEngine, SamplingParams
from mrpo.runtime import Runtime
from mrpo.scoring import PendingScore, Scorer, make_groups
from mrpo.seeding import derive_seed
from mrpo.stopwatch import Stopwatch


@dataclass(frozen=True)
class Sampled:
    """This process's completions of one step. Verdicts may still be under way; the rows' advantages are 0 until then.

    groups: the questions with G completions each; pending, rows: one per completion, group by group.
    """

    groups: list[Group]
    pending: list[PendingScore]
    rows: list[Row]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the questions do not tell, to be saved without pickled classes."""
        saved = {}
        for i, (completion, row) in enumerate(zip(_completions(self.groups), self.rows, strict=True)):
            saved[f"{i}.token_ids"] = torch.tensor(completion.token_ids)
            saved[f"{i}.truncated"] = torch.tensor(completion.finish_reason == "length")
            if completion.logprobs is not None:
                saved[f"{i}.logprobs"] = torch.tensor(completion.logprobs, dtype=torch.float64)
            parts = {"old_logprobs": row.old_logprobs, "ref_logprobs": row.ref_logprobs}
            saved |= {f"{i}.{name}": values for name, values in parts.items() if values is not None}
        return saved


@dataclass(frozen=True)
class Sampler:
    """Samples the completions of a step with the policy's current weights."""

    config: Config
    runtime: Runtime
    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    train_set: Sequence[Example]
    stopwatch: Stopwatch
    _prepared: dict[int, Future[list[EncodedPrompt]]] = field(default_factory=dict)  # by step

    def examples(self, step: int, batch_size: int) -> list[Example]:
        """This process's contiguous part of the step's batch."""
        indices = batch_indices(len(self.train_set), batch_size, step, self.config.seed)
        size = batch_size // self.runtime.world_size
        return [self.train_set[i] for i in indices[self.runtime.rank * size :][:size]]

    def prepare(self, step: int) -> None:
        """Begins to make the prompts of `step`, whose images take a CPU a while, behind what is done until then."""
        self._prepared[step] = in_thread(lambda: self._prompts(self._step_examples(step)))

    def sample(self, step: int) -> Sampled:
        """Generates, hands each completion to the judge as it ends, computes old and reference log-probabilities."""
        examples = self._step_examples(step)
        with self.stopwatch.measure("rollout"):
            prepared = self._prepared.pop(step, None)
            prompts = self._prompts(examples) if prepared is None else prepared.result()
            pending: dict[tuple[int, int], PendingScore] = {}

            def judge(prompt: int, place: int, completion: Completion) -> None:
                pending[prompt, place] = self.scorer.submit(examples[prompt], completion)

            groups = make_groups(examples, prompts, self.engine.generate(prompts, self._params(step), judge))
            self.engine.sleep()
        with self.stopwatch.measure("logprobs"):
            # The old log-probabilities are those of the weights that sampled, which the update will change.
            old = self.config.loss.updates_per_rollout > 1 or self.config.rollout.ahead > 0
            rows = self.policy.with_logprobs(self._rows(groups), old=old)
        return Sampled(groups, [pending[key] for key in sorted(pending)], rows)

    def restore(self, step: int, saved: Mapping[str, torch.Tensor]) -> Sampled:
        """What `Sampled.tensors` saved of `step`; what was judged before is asked of the judge's cache."""
        examples = self._step_examples(step)
        prompts = self._prompts(examples)
        size = self.config.rollout.group_size
        completions = [self._completion(saved, i) for i in range(len(examples) * size)]
        groups = make_groups(examples, prompts, [completions[i : i + size] for i in range(0, len(completions), size)])
        rows = [
            replace(row, old_logprobs=saved.get(f"{i}.old_logprobs"), ref_logprobs=saved.get(f"{i}.ref_logprobs"))
            for i, row in enumerate(self._rows(groups))
        ]
        pending = [self.scorer.submit(group.example, c) for group in groups for c in group.completions]
        return Sampled(groups, pending, rows)

    def _completion(self, saved: Mapping[str, torch.Tensor], place: int) -> Completion:
        token_ids = tuple(saved[f"{place}.token_ids"].tolist())
        logprobs = saved.get(f"{place}.logprobs")
        return Completion(
            token_ids,
            self.policy.processor.decode(token_ids),
            "length" if saved[f"{place}.truncated"] else "stop",
            None if logprobs is None else tuple(logprobs.tolist()),
        )

    def _prompts(self, examples: Sequence[Example]) -> list[EncodedPrompt]:
        return [self.policy.processor.encode_prompt(example) for example in examples]

    def _step_examples(self, step: int) -> list[Example]:
        return self.examples(step, self.config.optim.batch_size // self.config.rollout.group_size)

    def _params(self, step: int) -> SamplingParams:
        rollout = self.config.rollout
        count = self.config.optim.batch_size // rollout.group_size // self.runtime.world_size
        # By place in the global batch: a small data set may stand in it twice.
        places = range(self.runtime.rank * count, (self.runtime.rank + 1) * count)
        return SamplingParams(
            num_completions=rollout.group_size,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            seeds=tuple(derive_seed("rollout", self.config.seed, step, place) for place in places),
        )

    def _rows(self, groups: Sequence[Group]) -> list[Row]:
        """The loss inputs of every completion, but for its advantages."""
        completions = _completions(groups)
        prompts: list[EncodedPrompt] = [group.prompt for group in groups for _ in group.completions]
        kept = [not (self.config.rollout.mask_truncated and c.finish_reason == "length") for c in completions]
        lengths = [len(completion.token_ids) for completion in completions]
        weights = token_weights(self.config, self.runtime, lengths, kept)
        return [
            Row(
                prompt,
                completion.token_ids,
                torch.zeros(len(completion.token_ids)),
                weight,
                sampler_logprobs=None if completion.logprobs is None else torch.tensor(completion.logprobs),
            )
            for prompt, completion, weight in zip(prompts, completions, weights, strict=True)
        ]


def token_weights(config: Config, runtime: Runtime, lengths: Sequence[int], kept: Sequence[bool]) -> list[torch.Tensor]:
    """(T,) weight of each completion's tokens, so that the weighted sum over all processes is the loss."""
    counts = [n if keep else 0 for n, keep in zip(lengths, kept, strict=True)]
    totals = runtime.sum(torch.tensor([float(sum(kept)), float(sum(counts)), float(len(kept))]))
    num_kept, num_tokens, num_all = (max(1.0, value) for value in totals.tolist())
    weights = {
        "sequence": [1.0 / (max(1, n) * num_kept) for n in lengths],
        "token": [1.0 / num_tokens] * len(lengths),
        "constant": [1.0 / (num_all * config.rollout.max_tokens)] * len(lengths),
    }[config.loss.normalization]
    return [torch.full((n,), w if keep else 0.0) for n, w, keep in zip(lengths, weights, kept, strict=True)]


def _completions(groups: Sequence[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]
