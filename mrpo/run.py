"""A training run from its arguments to its last table: everything is checked before weights are loaded."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from mrpo.arguments import add_config
from mrpo.backbones import Processor, check_model, load_model, load_processor
from mrpo.checkpoint import CheckpointStore, check_resumable
from mrpo.config import Config, JudgeConfig, RewardConfig
from mrpo.data import load_dataset
from mrpo.data.order import batch_indices, steps_for
from mrpo.data.targets import explained
from mrpo.errors import UserError
from mrpo.evaluated import read_evaluated, write_evaluated
from mrpo.evaluation import Evaluation, evaluate, num_unjudged, validation_metrics
from mrpo.help import config_help
from mrpo.judge import Judge, make_judge
from mrpo.judge.stats import merge_stats
from mrpo.policy import Policy
from mrpo.records import EvaluatedSample, Example
from mrpo.report import draw_curves, draw_failures, draw_timeline
from mrpo.report.sample import render_sample
from mrpo.report.table import before_after_table
from mrpo.rewards import AnswerReward
from mrpo.rollout import check_engine, make_engine
from mrpo.rollout.prompts import check_prompt_lengths
from mrpo.run_folder import VERDICTS, check_folder, prepared_folder
from mrpo.runtime import Runtime
from mrpo.scoring import Scorer
from mrpo.settings import load_config
from mrpo.telemetry import RunLog, require_packages
from mrpo.trainer import Trainer

CHECKPOINTS = "checkpoints"  # folder
ALONE_AFTER = 10.0  # seconds
# Of the judge's metrics, those that add up to what a run has spent.
_COSTS = ("judge/requests", "judge/tokens_in", "judge/tokens_out", "judge/cost_usd")
EXIT_USER_ERROR = 2
EXIT_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Inputs:
    """What a run needs besides weights; all of it was checked. Questions that no evaluation asks for are not there."""

    processor: Processor
    judge: Judge
    answer_reward: AnswerReward
    train_set: Sequence[Example]
    eval_set: Sequence[Example]
    validation_set: Sequence[Example]
    max_images: int  # in a prompt
    total_steps: int
    unexplained: int = 0  # training questions that sft leaves out


def main(arguments: Sequence[str]) -> None:
    """Runs and ends the process: status 0 when done, 2 for bad input, 143 when SIGTERM led to a checkpoint."""
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        check_folder(config, resume=options.resume, overwrite=options.overwrite)
        inputs = load_inputs(config)
        if options.resume:
            check_resumable(config.output_dir / CHECKPOINTS, config.optim, inputs.total_steps, _world_size())
        runtime = Runtime.start(config.seed)
        status = train(config, inputs, runtime, resume=options.resume, overwrite=options.overwrite)
    except UserError as error:
        # What every process meets is told by the main one, and the launcher then ends the others; one that lives on
        # has met something of its own.
        rank = int(os.environ.get("RANK", "0"))
        time.sleep(ALONE_AFTER if rank else 0.0)
        print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        # Other processes may wait in a collective; the launcher ends them when this one is gone.
        os._exit(EXIT_USER_ERROR)
    runtime.finish(status)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line: options, and `key=value` overrides anywhere among them."""
    parser = argparse.ArgumentParser(
        prog="deepspeed mrpo/train.py",
        description="Train a vision-language model to reason with MRPO, GRPO, GDPO or SFT.",
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, "YAML file; the command line wins over it")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in output_dir")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration fields, listed below")
    return parser.parse_intermixed_args(arguments)


def load_inputs(config: Config) -> Inputs:
    """Loads and checks everything but the weights.

    Raises:
        UserError: names what is wrong with the model folder, the data, the judge or the batch.
    """
    world_size = _world_size()
    per_prompt = 1 if config.algorithm == "sft" else config.rollout.group_size
    prompts_per_step = config.optim.batch_size // per_prompt
    if prompts_per_step % world_size:
        raise UserError(
            f"optim.batch_size={config.optim.batch_size} makes {prompts_per_step} prompts a step, which "
            f"{world_size} processes cannot share evenly; use a multiple of {per_prompt * world_size}"
        )
    processor = load_processor(config)
    check_model(config.model)
    check_engine(config, world_size)
    require_packages(config.log)
    train_set, unexplained = _load_train_set(config)
    eval_set = load_dataset(config.data, "test") if config.eval.at_start or config.eval.at_end else ()
    validation_set = load_dataset(config.data, "validation") if config.eval.every else ()
    dataset = train_set[0].metadata.get("dataset", config.data.name)
    judge = make_judge(config.judge if config.generates else JudgeConfig(), dataset, config.output_dir / VERDICTS)
    answer_reward = AnswerReward(config.reward if config.generates else RewardConfig())
    for example in (train_set[0], *eval_set[:1]):
        processor.encode_prompt(example)
    steps = config.optim.steps or steps_for(len(train_set), prompts_per_step, config.optim.epochs)
    trained = [i for step in range(steps) for i in batch_indices(len(train_set), prompts_per_step, step, config.seed)]
    sizes = check_prompt_lengths(train_set, processor, trained)
    for examples in (eval_set, validation_set):
        sizes |= check_prompt_lengths(examples, processor)
    return Inputs(
        processor, judge, answer_reward, train_set, eval_set, validation_set, sizes.max_images, steps, unexplained
    )


def _world_size() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _load_train_set(config: Config) -> tuple[Sequence[Example], int]:
    """The training questions, and how many were left out because sft has no gold rationale to imitate."""
    examples = load_dataset(config.data, "train")
    if config.algorithm != "sft":
        return examples, 0
    kept = explained(examples)
    if not kept:
        raise UserError(
            f"algorithm=sft imitates gold rationales, and data.name={config.data.name} has none in its {len(examples)} "
            "training questions; add them (MedThink's with data.gold), or choose another algorithm"
        )
    return kept, len(examples) - len(kept)


def train(config: Config, inputs: Inputs, runtime: Runtime, *, resume: bool, overwrite: bool) -> int:
    """The whole run; returns the exit status."""
    with prepared_folder(config, runtime, resume=resume, overwrite=overwrite):
        return _train(config, inputs, runtime, resume=resume)


def _train(config: Config, inputs: Inputs, runtime: Runtime, *, resume: bool) -> int:
    stop = _StopOnSigterm()
    processor = inputs.processor
    policy = Policy(load_model(config.model), processor, config, runtime)
    store = CheckpointStore(config.output_dir / CHECKPOINTS, config.checkpoint, runtime)
    state = store.load_latest(policy.engine) if resume else None
    if state and config.update.packing == "auto":  # other rows might choose otherwise, and round otherwise
        policy.packing = state.packing
    start_step = state.step if state else 0
    with (
        closing(make_engine(config, processor, policy, runtime, max_images=inputs.max_images)) as engine,
        closing(Scorer(config, inputs.judge, processor.tokenizer, processor.think_tag, inputs.answer_reward)) as scorer,
        RunLog(
            config.output_dir,
            config.log,
            total_steps=inputs.total_steps,
            is_main=runtime.is_main,
            resume_step=start_step if resume else None,
            title=f"{config.algorithm} · {config.model.path} · {config.data.name}",
        ) as log,
    ):

        def measure(name: str, examples: Sequence[Example]) -> Evaluation:
            if config.algorithm == "sft":  # which does not bring its weights to the engine after every step
                engine.sync(policy.weights)
            with log.stage(f"evaluating ({name})", len(examples)) as stage:
                found = evaluate(
                    examples,
                    config=config,
                    runtime=runtime,
                    processor=processor,
                    engine=engine,
                    scorer=scorer,
                    progress=stage.advance,
                )
            if unjudged := num_unjudged(found.samples):
                log.message(
                    f"evaluation ({name}): {unjudged:,} of {len(found.samples):,} completions stayed unjudged; only "
                    "accuracy counts them"
                )
            return found

        def validate() -> dict[str, float]:
            found = validation_metrics(measure("validation", inputs.validation_set).samples)
            stats = merge_stats(runtime.gather_objects(scorer.judge_stats()))
            return found | {f"validation/{name}": stats[name] for name in _COSTS if name in stats}

        if inputs.unexplained:
            log.message(f"{inputs.unexplained} training questions have no gold rationale: sft leaves them out")
        before = _evaluate_start(config, runtime, partial(measure, "before", inputs.eval_set), start_step)
        scorer.judge_stats()  # the first step's are its own
        trainer = Trainer(
            config=config,
            runtime=runtime,
            policy=policy,
            engine=engine,
            scorer=scorer,
            train_set=inputs.train_set,
            checkpoints=store,
            log=log,
            total_steps=inputs.total_steps,
            evaluate=validate,
            stop_requested=lambda: stop.requested,
        )
        # Asked again at the end, as the last evaluation may take longer than whoever sent the signal waits.
        if not trainer.run(start_step) or runtime.any(stop.requested):
            log.message("SIGTERM: saved; the same command with --resume continues")
            return EXIT_TERMINATED
        after = measure("after", inputs.eval_set) if config.eval.at_end else None
        if runtime.is_main:
            _report(config, log, before, after)
    return 0


class _StopOnSigterm:
    """Remembers a SIGTERM, so that the step under way can end and be saved."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def _evaluate_start(
    config: Config, runtime: Runtime, measure: Callable[[], Evaluation], start_step: int
) -> list[EvaluatedSample] | None:
    """The evaluation of the start policy; a continued run reads what it wrote, as the start policy is gone."""
    path = config.output_dir / "evaluation-before.json"
    if start_step > 0:
        return read_evaluated(path) if path.is_file() else None
    if not config.eval.at_start:
        return None
    samples = measure().samples
    if runtime.is_main:
        write_evaluated(path, samples)
    return samples


def _report(config: Config, log: RunLog, before: list[EvaluatedSample] | None, after: Evaluation | None) -> None:
    """Files and tables that end a run."""
    folder = config.output_dir
    if after is not None:
        write_evaluated(folder / "evaluation-after.json", after.samples)
        for sample in after.shown:
            log.message(render_sample(sample))
    if before is not None and after is not None:
        table = before_after_table(before, after.samples)
        table.write(folder)
        log.message(table.to_rich())
    if config.log.plots:
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")
        draw_timeline(folder / "metrics.jsonl", folder / "timeline.png")
        evaluations = {"before": before, "after": after.samples if after else None}
        present = {name: samples for name, samples in evaluations.items() if samples}
        if present:
            draw_failures(present, folder / "failures.png")
    log.message(f"wrote {folder}")
