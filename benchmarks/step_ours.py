"""A whole step our way: the trainer as `mrpo/run.py` puts it together, without evaluation, checkpoints and logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from harness import synchronize
from model_folders import LONGEST_PROMPT, examples
from step_setting import AHEAD, FROZEN, GRPO, LORA_RANK, MICRO_BATCH, MRPO, Setting
from step_way import CountingScorer, Sampled, compared_names, compared_part, plain_name, same_adapters

from mrpo import judged_rows, shaping
from mrpo.backbones import load_model, load_processor
from mrpo.batching import Row
from mrpo.config import Config
from mrpo.judge import make_judge
from mrpo.pass_runner import discard_gradients
from mrpo.policy import Policy
from mrpo.rollout import make_engine
from mrpo.runtime import Runtime
from mrpo.telemetry import RunLog
from mrpo.trainer import Trainer

# As rollout.gpu_memory: the engine's share, beside weights that the trainer holds as well.
GPU_MEMORY = 0.35
# The longest sequence of any case.
LONGEST_SEQUENCE = LONGEST_PROMPT + 640
# For all cases what those of the suite `rollout` have: vLLM compiles anew for each limit, and for an engine that cannot
# sleep, whether it is asked to or not.
ENGINE_ON_GPU = {"max_num_seqs": 256, "max_model_len": LONGEST_SEQUENCE, "enable_sleep_mode": True}


def make_config(setting: Setting, *, ahead: bool, algorithm: str, folder: Path) -> Config:
    """The configuration of the whole run; on a GPU with vLLM in the process."""
    on_gpu = torch.cuda.is_available()
    tree: dict[str, Any] = {
        "algorithm": algorithm.lower(),
        "output_dir": str(folder),
        "model": {
            "path": setting.model,
            "dtype": "bfloat16" if on_gpu else "float32",
            "lora_rank": LORA_RANK * setting.lora,
        },
        "rollout": {
            "engine": "vllm" if on_gpu else "hf",
            "group_size": setting.group,
            "max_tokens": setting.length,
            "batch_size": max(1, setting.samples // setting.processes),
            "ahead": int(ahead),
            "gpu_memory": GPU_MEMORY,
            # As TRL's engine: with adapters alone both models and the update fit beside one that stays awake.
            "sleep_level": 0 if setting.lora else 2,
            "engine_options": ENGINE_ON_GPU if on_gpu else {},
        },
        "optim": {
            "batch_size": setting.samples,
            "micro_batch_size": MICRO_BATCH,
            "lr": FROZEN,
            "warmup_steps": 0,
        },
        "log": {"samples": 0},
    }
    if setting.judge:
        judge = {"kind": "openai", "base_url": f"{setting.judge}/v1", "model": "judge"}
        tree["judge"] = judge | {"concurrency": setting.samples}
    if on_gpu and not setting.lora:
        # Optimizer state in fp32 would take 105 GB of a GPU with 141.
        lean = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        tree["deepspeed"] = {"zero_stage": 1, "extra": {"bf16": lean}}
        # The estimate counts fp32 states, for which all layers would have to recompute their activations.
        tree["update"] = {"checkpointing": 18}
    return Config.model_validate(tree)


class OurWay:
    """`prepare` builds the trainer of a setting; the other methods run it."""

    def __init__(self, name: str, runtime: Runtime) -> None:
        self._ahead, self._runtime = name == AHEAD, runtime
        self._trainer: Trainer | None = None
        self._configs: dict[str, Config] = {}
        self._next = 0

    def prepare(self, setting: Setting, folder: Path) -> None:
        self.close()
        self._configs = {
            algorithm: make_config(setting, ahead=self._ahead, algorithm=algorithm, folder=folder)
            for algorithm in (GRPO, MRPO)
        }
        config = self._configs[MRPO]
        processor = load_processor(config)
        model = load_model(config.model)
        same_adapters(model)
        policy = Policy(model, processor, config, self._runtime)
        judge = make_judge(config.judge, "phantom")
        self._trainer = Trainer(
            config=config,
            runtime=self._runtime,
            policy=policy,
            engine=make_engine(config, processor, policy, self._runtime),
            scorer=CountingScorer(config, judge, processor.tokenizer, processor.think_tag),
            train_set=examples(Path(setting.model), setting.prompts, setting.image_tokens),
            checkpoints=cast(Any, None),
            log=RunLog(folder, config.log, total_steps=1, is_main=False),
            total_steps=1 << 30,
        )
        self._next = 0
        # The one thing in which MRPO and GRPO differ.
        shape, stopwatch = shaping.token_advantages, self._trainer._stopwatch

        def timed(*arguments: Any) -> list[torch.Tensor]:
            with stopwatch.measure("shaping"):
                return shape(*arguments)

        vars(judged_rows)["token_advantages"] = timed

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None
        return self._trainer

    def step(self, algorithm: str, index: int | None) -> dict[str, float]:
        trainer = self.trainer
        trainer.config = self._configs[algorithm]
        if index is not None:  # the algorithms take one step in turns: none may find its prompts made
            trainer._sampler._prepared.clear()
        index = self._next if index is None else index
        self._next = index + 1
        torch.manual_seed(index)
        with trainer._stopwatch.measure("step"):
            metrics = trainer._rl_step(index)
            synchronize()
        seconds = trainer._stopwatch.take()
        tokens = metrics["completion/tokens_total"] / self._runtime.world_size
        assert isinstance(trainer.scorer, CountingScorer)
        found = {"seconds": seconds.pop("step"), "tokens": tokens, "judged": trainer.scorer.take()}
        return found | {f"{name.removesuffix('_wait')} s": value for name, value in seconds.items()}

    def gradients(self, sampled: Sequence[Sampled]) -> Mapping[str, torch.Tensor]:
        """What the optimizer would see; it is not asked."""
        from deepspeed.utils import safe_get_full_grad

        trainer = self.trainer
        trainer.engine.sleep()  # as in the updates of a step
        policy, found = trainer.policy, {}
        parameters = {plain_name(name): p for name, p in policy.model.named_parameters() if p.requires_grad}
        names = compared_names(parameters)
        step = policy.engine.step

        def look() -> None:
            for name in names:
                gradient = safe_get_full_grad(parameters[name])
                found[name] = compared_part(gradient.view(parameters[name].shape))
            discard_gradients(policy.engine)

        policy.engine.step = look
        # DeepSpeed knows no norm of a step that was not taken.
        norm, policy.engine.get_global_grad_norm = policy.engine.get_global_grad_norm, lambda: 0.0
        try:
            policy.update(self._rows(sampled), FROZEN)
        finally:
            policy.engine.step, policy.engine.get_global_grad_norm = step, norm
        trainer.engine.sync(policy.weights)
        return found

    def _rows(self, sampled: Sequence[Sampled]) -> list[Row]:
        processor = self.trainer.policy.processor
        prompts = {example.id: processor.encode_prompt(example) for example in self.trainer.train_set}
        return [
            Row(
                prompts[one.example],
                one.token_ids,
                torch.full((len(one.token_ids),), one.advantage),
                torch.full((len(one.token_ids),), 1.0 / (len(one.token_ids) * len(sampled))),
            )
            for one in sampled
        ]

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.scorer.close()
            self._trainer.engine.close()
            self._trainer.policy.engine.destroy()
            self._trainer = None
