"""The training loop. A step reads like the method: rollout, steps and rewards, advantages, shaping, update."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from mrpo.batching import Row
from mrpo.checkpoint import CheckpointStore, TrainerState
from mrpo.config import Config
from mrpo.data.targets import sft_target
from mrpo.errors import UserError
from mrpo.judge.stats import merge_stats
from mrpo.judged_rows import JudgedRows
from mrpo.policy import NonFiniteLossError, Part, Policy
from mrpo.records import Example, Group, ScoredCompletion
from mrpo.rollout import RolloutEngine
from mrpo.runtime import Runtime
from mrpo.samples import sample_record, save_images
from mrpo.sampling import Sampled, Sampler, token_weights
from mrpo.schedule import learning_rate
from mrpo.scoring import Scorer, UnjudgedError
from mrpo.seeding import derive_seed
from mrpo.step_metrics import score_metrics, update_metrics
from mrpo.stopwatch import Stopwatch
from mrpo.telemetry import RunLog
from mrpo.update_stats import UpdateStats


@dataclass
class Trainer:
    """Everything a step needs. `log` is the run's log on the main process, a silent one elsewhere.

    `evaluate` gives metrics of the current policy on validation questions, for `eval.every`.
    """

    config: Config
    runtime: Runtime
    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    train_set: Sequence[Example]
    checkpoints: CheckpointStore
    log: RunLog
    total_steps: int
    evaluate: Callable[[], dict[str, float]] = dict
    stop_requested: Callable[[], bool] = lambda: False
    _stopwatch: Stopwatch = field(default_factory=Stopwatch)
    # Completions of the next steps, whose verdicts are under way: `rollout.ahead` of them.
    _waiting: deque[Sampled] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._sampler = Sampler(
            self.config, self.runtime, self.policy, self.engine, self.scorer, self.train_set, self._stopwatch
        )

    def run(self, start_step: int) -> bool:
        """Trains from `start_step` (finished steps) to `total_steps`, then exports the policy.

        False if it was asked to stop: then a checkpoint of the last finished step is there, and no export.

        Raises:
            UserError: the loss is not finite, or the judge left too much unjudged; in the second case a checkpoint of
                the last finished step is there, too.
        """
        train_step = self._sft_step if self.config.algorithm == "sft" else self._rl_step
        self._restore(start_step)
        state: TrainerState | None = None  # of the last finished step, while it is not saved
        for step in range(start_step, self.total_steps):
            # Nothing may depend on how many random numbers earlier steps drew.
            torch.manual_seed(derive_seed("step", self.config.seed, step, self.runtime.rank))
            try:
                with self._stopwatch.measure("step"):
                    metrics = train_step(step)
            except UnjudgedError:
                if state is not None:
                    self._save(state)
                raise
            state = TrainerState(
                step + 1, metrics.get("reward", -metrics["loss"]), self.runtime.world_size, self.policy.packing
            )
            seconds = self._stopwatch.take()
            if "completion/tokens_total" in metrics:
                metrics["tokens_per_s"] = metrics.pop("completion/tokens_total") / seconds["step"]
            metrics |= {f"time/{name}": value for name, value in seconds.items()}
            stop = self._is_to_stop()
            # An evaluation may take longer than whoever asks to stop is willing to wait.
            if self._due(self.config.eval.every, step + 1) and not stop:
                try:
                    metrics |= self.evaluate()
                except UnjudgedError:
                    self.log.log_step(step + 1, metrics)
                    self._save(state)
                    raise
                stop = self._is_to_stop()
            self.log.log_step(step + 1, metrics)
            is_last = step + 1 == self.total_steps  # which is saved below, and once: processes must agree that it is
            if stop or (self._due(self.config.checkpoint.every, step + 1) and not is_last):
                self._save(state)
                state = None
            if stop:
                return False
        # The policy first: a full disk that has no room for a checkpoint may have room for it.
        if self.config.checkpoint.export:
            self.engine.sleep()
            self.policy.export(self.config.output_dir / "policy")
        if state is not None:
            self._save(state)
        return True

    def _is_to_stop(self) -> bool:
        """Whether any process was asked to stop. Every process must call this."""
        return self.runtime.any(self.stop_requested())

    def _rl_step(self, step: int) -> dict[str, float]:
        """One step of MRPO, GRPO or GDPO."""
        newest = min(step + self.config.rollout.ahead, self.total_steps - 1)
        self._waiting.extend(self._sampler.sample(later) for later in range(step + len(self._waiting), newest + 1))
        if newest + 1 < self.total_steps:
            self._sampler.prepare(newest + 1)
        sampled = self._waiting.popleft()
        judged = JudgedRows(self.config, self.runtime, self.scorer, self._stopwatch, sampled)
        lr = learning_rate(self.config.optim, step, self.total_steps)
        try:
            stats = self._update(judged.parts(), judged.rows, lr, step)
        except UnjudgedError:
            self._waiting.appendleft(sampled)  # to be judged when the run goes on
            raise
        self._log_samples(step, sampled.groups, judged.scored, judged.rows)
        metrics = update_metrics(stats, lr, self.runtime)
        del metrics["nll"]  # of the tokens with an advantage alone
        judge = merge_stats(self.runtime.gather_objects(self.scorer.judge_stats()))
        return score_metrics(judged.table, self.config) | metrics | judge

    def _sft_step(self, step: int) -> dict[str, float]:
        """One step of supervised fine-tuning: the loss of the target's tokens, advantage 1 and ratio 1."""
        examples = self._sampler.examples(step, self.config.optim.batch_size)
        prompts = [self.policy.processor.encode_prompt(example) for example in examples]
        targets = [self.policy.processor.encode_target(*sft_target(example)) for example in examples]
        weights = token_weights(self.config, self.runtime, [len(t) for t in targets], [True] * len(targets))
        rows = [Row(p, t, torch.ones(len(t)), w) for p, t, w in zip(prompts, targets, weights, strict=True)]
        lr = learning_rate(self.config.optim, step, self.total_steps)
        metrics = update_metrics(self._update([(rows, True)], rows, lr, step), lr, self.runtime)
        del metrics["kl"], metrics["clip/low"], metrics["clip/high"]  # nothing is clipped, and there is no reference
        return metrics | {"loss": metrics.pop("nll")}

    def _update(self, parts: Iterable[Part], rows: list[Row], lr: float, step: int) -> UpdateStats:
        """The optimizer steps, the first on `parts` of `rows` as they come; then the engine has the new weights."""
        self.engine.sleep()  # where the step sampled nothing, an evaluation or the last weights have woken it
        try:
            with self._stopwatch.measure("update", apart_from=("rewards", "judge_wait")):
                for _ in range(self.config.loss.updates_per_rollout):
                    stats = self.policy.update_in_parts(parts, lr)
                    parts = [(rows, True)]
                    for message in stats.messages:
                        self.log.message(message)
        except NonFiniteLossError as error:
            paths = {r: self.config.output_dir / f"nonfinite-step{step + 1}-rank{r}.pt" for r in error.ranks}
            if self.runtime.rank in paths:
                torch.save([row.tensors() for row in error.rows], paths[self.runtime.rank])
            self.runtime.barrier()  # whoever tells it ends the run
            where = paths[error.ranks[0]]
            raise UserError(f"step {step + 1}: the loss is not finite; the step's inputs are in {where}") from error
        if self.config.algorithm != "sft":
            with self._stopwatch.measure("sync"):
                self.engine.sync(self.policy.weights)
        return stats

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _save(self, state: TrainerState) -> None:
        waiting = {
            f"{place}.{name}": values
            for place, sampled in enumerate(self._waiting)
            for name, values in sampled.tensors().items()
        }
        self.checkpoints.save(self.policy.engine, state, waiting)

    def _restore(self, start_step: int) -> None:
        """Completions sampled ahead of a checkpoint belong to the run: its weights cannot sample them again."""
        if start_step == 0 or start_step == self.total_steps:
            return
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for key, values in self.checkpoints.load_tensors(start_step).items():
            place, _, name = key.partition(".")
            saved.setdefault(int(place), {})[name] = values
        self._waiting.extend(self._sampler.restore(start_step + place, saved[place]) for place in sorted(saved))

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
