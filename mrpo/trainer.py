"""The training loop. A step reads like the method: rollout, steps and rewards, advantages, shaping, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mrpo import algorithms
from mrpo.batching import Row
from mrpo.checkpoint import CheckpointStore, TrainerState
from mrpo.config import Config
from mrpo.data.order import batch_indices
from mrpo.data.targets import sft_target
from mrpo.errors import UserError
from mrpo.kernels import step_advantages
from mrpo.policy import STAT_NAMES, NonFiniteLossError, Policy, UpdateStats
from mrpo.records import Example, Group, ScoredCompletion, Unjudged, Verdict
from mrpo.rollout import RolloutEngine, SamplingParams
from mrpo.runtime import Runtime
from mrpo.samples import sample_record, save_images
from mrpo.schedule import learning_rate
from mrpo.scoring import PARTS, Scorer, columns, make_groups, score_table, total_reward
from mrpo.seeding import derive_seed
from mrpo.steps import step_ids
from mrpo.telemetry import RunLog


@dataclass
class Trainer:
    """Everything a step needs. `log` is the run's log on the main process, a silent one elsewhere."""

    config: Config
    runtime: Runtime
    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    train_set: Sequence[Example]
    checkpoints: CheckpointStore
    log: RunLog
    total_steps: int
    stop_requested: Callable[[], bool] = lambda: False
    _times: dict[str, float] = field(default_factory=dict)

    def run(self, start_step: int) -> bool:
        """Trains from `start_step` (finished steps) to `total_steps`; False if it was asked to stop before the end."""
        train_step = self._sft_step if self.config.algorithm == "sft" else self._rl_step
        for step in range(start_step, self.total_steps):
            began = time.perf_counter()
            # Nothing may depend on how many random numbers earlier steps drew.
            torch.manual_seed(derive_seed("step", self.config.seed, step, self.runtime.rank))
            metrics = train_step(step)
            self._times["step"] = time.perf_counter() - began
            metrics |= {f"time/{name}": seconds for name, seconds in self._times.items()}
            if "completion/tokens_total" in metrics:
                metrics["tokens_per_s"] = metrics.pop("completion/tokens_total") / self._times["step"]
            self.log.log_step(step + 1, metrics)
            stop = self.runtime.any(self.stop_requested())
            if self._checkpoint_due(step + 1) or stop:
                score = metrics.get("reward", -metrics["loss"])
                self.checkpoints.save(self.policy.engine, TrainerState(step + 1, score, self.runtime.world_size))
            if stop and step + 1 < self.total_steps:
                return False
        return True

    def _rl_step(self, step: int) -> dict[str, float]:
        """One step of MRPO, GRPO or GDPO."""
        examples = self._my_share(step, self.config.optim.batch_size // self.config.rollout.group_size)
        with self._timed("rollout"):
            groups = self._rollout(examples, step)
        with self._timed("judge"):
            scored = self.scorer.score(groups)
            table = columns(self.runtime.gather_rows(score_table(scored, self.config.advantage.tau)))
        self._check_judged(table["unjudged"], scored)
        advantages = self._group_advantages(table)
        with self._timed("update"):
            rows = self._rows(groups, scored, self._mine(advantages))
            lr = learning_rate(self.config.optim, step, self.total_steps)
            stats = self._update(rows, lr, step)
        self._log_samples(step, groups, scored, rows)
        metrics = self._update_metrics(stats, lr)
        del metrics["nll"]  # of the tokens with an advantage alone
        return self._score_metrics(table) | metrics

    def _sft_step(self, step: int) -> dict[str, float]:
        """One step of supervised fine-tuning: the loss of the target's tokens, advantage 1 and ratio 1."""
        examples = self._my_share(step, self.config.optim.batch_size)
        with self._timed("update"):
            prompts = [self.policy.processor.encode_prompt(example) for example in examples]
            targets = [self.policy.processor.encode_target(*sft_target(example)) for example in examples]
            weights = self._token_weights([len(t) for t in targets], [True] * len(targets))
            rows = [Row(p, t, torch.ones(len(t)), w) for p, t, w in zip(prompts, targets, weights, strict=True)]
            lr = learning_rate(self.config.optim, step, self.total_steps)
            stats = self._update(rows, lr, step)
        metrics = self._update_metrics(stats, lr)
        return {"loss": metrics["nll"], **{k: metrics[k] for k in ("grad_norm", "lr", "entropy")}}

    def _my_share(self, step: int, batch_size: int) -> list[Example]:
        """This process's contiguous part of the step's batch."""
        indices = batch_indices(len(self.train_set), batch_size, step, self.config.seed)
        size = batch_size // self.runtime.world_size
        return [self.train_set[i] for i in indices[self.runtime.rank * size :][:size]]

    def _rollout(self, examples: Sequence[Example], step: int) -> list[Group]:
        prompts = [self.policy.processor.encode_prompt(example) for example in examples]
        rollout = self.config.rollout
        # By place in the global batch: a small data set may stand in it twice.
        first = self.runtime.rank * len(examples)
        params = SamplingParams(
            num_completions=rollout.group_size,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            seeds=tuple(derive_seed("rollout", self.config.seed, step, first + i) for i in range(len(examples))),
        )
        return make_groups(examples, prompts, self.engine.generate(prompts, params))

    def _group_advantages(self, table: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B,) advantages of the global batch."""
        shape = (-1, self.config.rollout.group_size)
        parts = (table[name].view(shape) for name in ("answer", "process", "length"))
        return algorithms.advantages(self.config, *parts).flatten()

    def _mine(self, values: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor over the global batch."""
        size = len(values) // self.runtime.world_size
        return values[self.runtime.rank * size :][:size]

    def _rows(self, groups: Sequence[Group], scored: Sequence[ScoredCompletion], advantages: torch.Tensor) -> list[Row]:
        """Loss inputs of every completion of this process."""
        shaped = self._shape(scored, advantages.float())
        kept = [not (self.config.rollout.mask_truncated and s.completion.finish_reason == "length") for s in scored]
        lengths = [len(s.completion.token_ids) for s in scored]
        weights = self._token_weights(lengths, kept)
        prompts = [group.prompt for group in groups for _ in group.completions]
        rows = [
            Row(prompt, item.completion.token_ids, row[:length], weight)
            for prompt, item, row, length, weight in zip(prompts, scored, shaped, lengths, weights, strict=True)
        ]
        return self.policy.with_logprobs(rows, old=self.config.loss.updates_per_rollout > 1)

    def _shape(self, scored: Sequence[ScoredCompletion], advantages: torch.Tensor) -> torch.Tensor:
        """(B, T) advantage of each token: the group's for GRPO and GDPO, shaped by the verdicts for MRPO."""
        length = max(len(item.completion.token_ids) for item in scored)
        if self.config.algorithm != "mrpo":
            return advantages[:, None].expand(-1, length)
        validity = [item.verdict.validity if isinstance(item.verdict, Verdict) else () for item in scored]
        width = max(1, *map(len, validity))
        return step_advantages(
            advantages,
            torch.tensor([item.rewards.answer > self.config.advantage.tau for item in scored]),
            torch.tensor([step_ids(item.steps, length) for item in scored]),
            torch.tensor([[*valid, *[False] * (width - len(valid))] for valid in validity]),
            torch.tensor([len(valid) for valid in validity]),
            penalty=self.config.advantage.penalty,
            round_weights=self.config.advantage.round_weights,
        )

    def _token_weights(self, lengths: Sequence[int], kept: Sequence[bool]) -> list[torch.Tensor]:
        """(T,) weight of each completion's tokens, so that the weighted sum over all processes is the loss."""
        counts = [n if keep else 0 for n, keep in zip(lengths, kept, strict=True)]
        totals = self.runtime.sum(torch.tensor([float(sum(kept)), float(sum(counts)), float(len(kept))]))
        num_kept, num_tokens, num_all = (max(1.0, value) for value in totals.tolist())
        weights = {
            "sequence": [1.0 / (max(1, n) * num_kept) for n in lengths],
            "token": [1.0 / num_tokens] * len(lengths),
            "constant": [1.0 / (num_all * self.config.rollout.max_tokens)] * len(lengths),
        }[self.config.loss.normalization]
        return [torch.full((n,), w if keep else 0.0) for n, w, keep in zip(lengths, weights, kept, strict=True)]

    def _update(self, rows: list[Row], lr: float, step: int) -> UpdateStats:
        try:
            for _ in range(self.config.loss.updates_per_rollout):
                stats = self.policy.update(rows, lr)
        except NonFiniteLossError as error:
            path = Path(self.config.output_dir) / f"nonfinite-step{step + 1}-rank{self.runtime.rank}.pt"
            torch.save([row.tensors() for row in error.rows], path)
            raise UserError(f"step {step + 1}: the loss is not finite; the step's inputs are in {path}") from error
        return stats

    def _check_judged(self, unjudged: torch.Tensor, scored: Sequence[ScoredCompletion]) -> None:
        share, limit = unjudged.mean().item(), self.config.judge.max_unjudged
        if share > limit:
            reasons = (item.verdict.reason for item in scored if isinstance(item.verdict, Unjudged))
            raise UserError(
                f"the judge left {share:.0%} of a step's completions unjudged, above judge.max_unjudged={limit:.0%}: "
                f"{next(reasons, 'on other processes')}"
            )

    def _checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def _score_metrics(self, table: Mapping[str, torch.Tensor]) -> dict[str, float]:
        reward = total_reward(table, self.config)
        group_std = reward.view(-1, self.config.rollout.group_size).std(dim=1).mean()
        means = {name: values.nanmean().item() for name, values in table.items()}
        names = {
            "reward/answer": "answer",
            "reward/process": "process",
            "reward/length": "length",
            "answer/correct": "correct",
            "failures/early": "early",
            "failures/mid": "mid",
            "failures/late": "late",
            "far": "far",
            "valid_steps": "valid_steps",
            "num_steps": "num_steps",
            "completion/tokens": "tokens",
            "completion/truncated": "truncated",
            "unjudged": "unjudged",
        }
        parts = {f"answer/{name}": means[name] for name in PARTS if not math.isnan(means[name])}
        totals = {"reward": reward.mean().item(), "reward/std": group_std.item()}
        totals["completion/tokens_total"] = table["tokens"].sum().item()
        return totals | {name: means[column] for name, column in names.items()} | parts

    def _update_metrics(self, stats: UpdateStats, lr: float) -> dict[str, float]:
        sums = dict(zip(STAT_NAMES, self.runtime.sum(stats.sums).tolist(), strict=True))
        tokens = max(1.0, sums.pop("tokens"))
        weighted = {name: sums.pop(name) for name in ("loss", "nll")}
        metrics = weighted | {name: value / tokens for name, value in sums.items()}
        metrics |= {"grad_norm": stats.grad_norm, "lr": lr}
        if torch.cuda.is_available():
            metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def _log_samples(
        self, step: int, groups: Sequence[Group], scored: Sequence[ScoredCompletion], rows: Sequence[Row]
    ) -> None:
        if not self.runtime.is_main:
            return
        examples = [group.example for group in groups for _ in group.completions]
        count = self.config.log.samples
        picked = range(0, len(scored), max(1, len(scored) // max(1, count)))[:count]
        records = [
            sample_record(examples[i], scored[i], rows[i].advantages, save_images(examples[i], self.config.output_dir))
            for i in picked
        ]
        self.log.log_samples(step + 1, records)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._times[name] = time.perf_counter() - began
