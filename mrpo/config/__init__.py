"""The typed configuration of a run: every field with its meaning, default and limits.

The same keys work in a YAML file and on the command line (`section.key=value`). Everything is checked before a model
is loaded; `load_config` turns what is wrong into a `UserError` that names the key, the value and what would be right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mrpo.config.experience import JUDGE_TRANSPORT, AdvantageConfig, JudgeConfig, RewardConfig, RolloutConfig
from mrpo.config.inputs import DataConfig, ModelConfig, PromptConfig
from mrpo.config.learning import DeepSpeedConfig, LossConfig, OptimConfig, Packing, UpdateConfig
from mrpo.config.outputs import CheckpointConfig, EvalConfig, LogConfig
from mrpo.config.section import LocalPath, NonNegative, Positive, Section, Share

__all__ = [
    "JUDGE_TRANSPORT",
    "AdvantageConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EvalConfig",
    "JudgeConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "NonNegative",
    "OptimConfig",
    "Packing",
    "Positive",
    "PromptConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "Share",
    "UpdateConfig",
]


class Config(Section):
    """One run."""

    algorithm: Literal["mrpo", "grpo", "gdpo", "sft"] = Field("mrpo", description="Training algorithm")
    output_dir: LocalPath = Field(Path("runs/default"), description="Folder of everything the run writes")
    seed: int = Field(0, ge=0, description="Seed of data order, sampling and initial weights")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    update: UpdateConfig = UpdateConfig()
    optim: OptimConfig = OptimConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def generates(self) -> bool:
        """Whether the run generates completions, which a judge then judges: sft does so in evaluations alone."""
        return self.algorithm != "sft" or self.eval.at_start or self.eval.at_end or self.eval.every > 0

    @model_validator(mode="after")
    def _possible(self) -> Config:
        problems = []
        if self.algorithm != "sft":
            group_size, batch_size = self.rollout.group_size, self.optim.batch_size
            if group_size < 2:
                problems.append(f"rollout.group_size={group_size} leaves no group to compare with; use at least 2")
            if batch_size % group_size:
                problems.append(f"optim.batch_size={batch_size} must be a multiple of rollout.group_size={group_size}")
            if self.loss.sampler_correction == "on" and self.rollout.engine == "hf":
                problems.append(
                    "loss.sampler_correction=on needs the sampler's log-probabilities, which rollout.engine=hf does "
                    "not tell: set it to auto, or rollout.engine to vllm or vllm_server"
                )
        problems += self.data.problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self
