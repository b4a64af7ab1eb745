"""The typed configuration of a run: every field with its meaning, default and limits.

The same keys work in a YAML file and on the command line (`section.key=value`). Everything is checked before a model
is loaded; `load_config` turns what is wrong into a `UserError` that names the key, the value and what would be right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Common rules: unknown keys are errors, values are not coerced silently, a config is never edited."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy."""

    path: str = Field("phantom", description="Folder or hub id of the start policy; `phantom` is the shipped tiny one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Parameter dtype under training")
    think_tag: str | None = Field(
        None, pattern=r"^[A-Za-z_]+$", description="Name of the reasoning tag; default: what the model family uses"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass")
    freeze_vision: bool = Field(False, description="Do not train the vision tower and its projector")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model folder")


class DataConfig(Section):
    """Questions to train and evaluate on."""

    name: Literal[
        "phantom",
        "vqa_rad",
        "slake",
        "path_vqa",
        "pmc_vqa",
        "vqa_med",
        "quilt_vqa",
        "rad_vqa",
        "mimic_vqa",
        "prepared",
        "generic",
    ] = Field("phantom", description="Data set; `prepared`: what `mrpo data prepare` wrote; `generic`: your own rows")
    root: Path | None = Field(
        None, description="Folder of the data set's files; `prepared`, `generic`: folder of the images, if another"
    )
    file: Path | None = Field(
        None, description="`prepared`: JSONL file; `generic`: JSON, JSONL or Parquet file, data set folder or hub id"
    )
    eval_file: Path | None = Field(
        None, description="`prepared`, `generic`: where evaluation questions come from; null: data.file, too"
    )
    gold: Path | None = Field(
        None, description="Folder of MedThink's gold rationales (vqa_rad, slake, path_vqa); null: none"
    )
    seed: int = Field(0, description="Seed of generated data (phantom)")
    train_size: Positive | None = Field(None, description="Use only the first N training questions; default: all")
    eval_size: Positive | None = Field(512, description="Held-out questions per evaluation; null: all")
    corruption: Share = Field(0.0, description="Share of phantom rationales told of a misread scene (sft)")
    on_error: Literal["raise", "skip"] = Field("raise", description="What to do with a broken row or image")
    max_image_pixels: Positive = Field(802_816, description="Larger images are scaled down, keeping their shape")

    def problems(self) -> list[str]:
        """What the fields lack together, in the words of the whole configuration."""
        problems = []
        if self.name in ("prepared", "generic"):
            if self.file is None:
                problems.append(f"data.file must name the questions of data.name={self.name}")
        elif self.name != "phantom" and self.root is None:
            problems.append(f"data.root must name the folder of {self.name}'s files")
        if self.gold is not None and self.name not in ("vqa_rad", "slake", "path_vqa"):
            problems.append(f"data.gold={self.gold}: MedThink explains vqa_rad, slake and path_vqa, not {self.name}")
        return problems


class PromptConfig(Section):
    """How a question becomes a prompt."""

    instruction: str | None = Field(
        None, description="Text after the question; null: what the policy was trained with, or the method's"
    )
    max_tokens: Positive = Field(1024, description="Longest prompt, image tokens included; longer ones are refused")


class RolloutConfig(Section):
    """Sampling of completions."""

    engine: Literal["hf"] = Field("hf", description="Generation engine")
    group_size: int = Field(8, ge=1, description="Completions per prompt, G")
    temperature: float = Field(1.0, gt=0.0, description="Sampling temperature")
    max_tokens: Positive = Field(128, description="Longest completion (paper: 512)")
    batch_size: Positive = Field(128, description="Completions generated at once per process")
    mask_truncated: bool = Field(False, description="Leave completions cut at the length limit out of the loss")


class RewardConfig(Section):
    """The three rewards and how they are summed."""

    answer_weight: float = Field(1.0, ge=0.0, description="Weight of the answer reward")
    process_weight: float = Field(1.0, ge=0.0, description="Weight of the share of valid steps")
    length_weight: float = Field(1.0, ge=0.0, description="Weight of the step-count reward")
    min_steps: Positive = Field(4, description="K_min: fewer steps are penalised")
    max_steps: Positive = Field(10, description="K_max: more steps are penalised")
    rouge_weight: float = Field(0.25, ge=0.0, description="Weight of ROUGE-1 F1 in the lexical answer reward")
    bleu_weight: float = Field(0.25, ge=0.0, description="Weight of smoothed BLEU-1 in the lexical answer reward")
    bertscore_weight: float = Field(0.5, ge=0.0, description="Weight of BERTScore F1 in the lexical answer reward")
    bertscore_model: str | None = Field(
        None, description="Encoder folder or hub id for BERTScore; null drops the part and rescales the others to 1"
    )
    bertscore_layer: NonNegative = Field(12, description="Encoder layer whose states BERTScore compares")

    @model_validator(mode="after")
    def _consistent(self) -> RewardConfig:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps={self.min_steps} must not exceed max_steps={self.max_steps}")
        if self.rouge_weight + self.bleu_weight <= 0 and self.bertscore_model is None:
            raise ValueError("rouge_weight + bleu_weight must be above 0 when bertscore_model is null")
        return self


class JudgeConfig(Section):
    """Who judges the steps."""

    kind: Literal["embedded", "openai"] = Field(
        "embedded", description="`embedded`: exact on phantom, a lexical stand-in elsewhere; `openai`: an endpoint"
    )
    model: str = Field("gpt-5-mini", description="Model name at the endpoint")
    base_url: str | None = Field(None, description="Endpoint; default: the openai package's own")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key")
    concurrency: Positive = Field(32, description="Requests under way at once per process")
    timeout: float = Field(60.0, gt=0.0, description="Seconds before a request is given up")
    retries: NonNegative = Field(4, description="Further tries of a failed request")
    max_unjudged: Share = Field(0.5, description="Stop the run when a step's unjudged share exceeds this")
    min_overlap: Share = Field(0.3, description="Embedded stand-in: share of a step's words that must be in the gold")


class AdvantageConfig(Section):
    """From rewards to per-token advantages."""

    tau: Share = Field(0.6, description="An answer reward above this counts as correct: no shaping")
    penalty: Literal["exponential", "linear", "none"] = Field(
        "exponential", description="Weight of an invalid step against its place: e to 1, 2 to 1, or always 1"
    )
    round_weights: bool = Field(False, description="Round the penalty to two decimals, as the reference code does")
    normalize: Literal["group_std", "group_mean"] = Field(
        "group_std", description="(R - mean) / (std + 1e-4) in the group, or R - mean alone"
    )


class LossConfig(Section):
    """The clipped policy loss."""

    epsilon_low: float = Field(0.2, gt=0.0, lt=1.0, description="Lower clip of the importance ratio, 1 - epsilon_low")
    epsilon_high: float = Field(0.2, gt=0.0, description="Upper clip of the importance ratio, 1 + epsilon_high")
    beta: float = Field(0.0, ge=0.0, description="Weight of the k3 KL to the reference policy (paper's code: 0.04)")
    reference: Literal["start", "none"] = Field(
        "start", description="Reference policy of the KL: a frozen copy of the start policy, or none"
    )
    updates_per_rollout: Positive = Field(1, description="Optimizer steps on each batch of rollouts")
    normalization: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="Mean over each completion's tokens then completions; mean over all tokens; sum / max_tokens",
    )


class OptimConfig(Section):
    """Optimizer, schedule and batch."""

    steps: Positive | None = Field(80, description="Rollout steps of the run; null: one pass over `epochs`")
    epochs: float = Field(1.0, gt=0.0, description="Passes over the training questions when steps is null")
    batch_size: Positive = Field(128, description="Completions (sft: examples) per step over all processes")
    micro_batch_size: Positive = Field(64, description="Completions per forward and backward pass of one process")
    lr: float = Field(1e-4, gt=0.0, description="Peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up")
    warmup_steps: NonNegative = Field(5, description="Steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW weight decay")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW beta1")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="AdamW beta2")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradient norm clip; 0 switches it off")


class DeepSpeedConfig(Section):
    """What goes to DeepSpeed; batch sizes and clipping are derived from `optim`."""

    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage")
    offload_optimizer: bool = Field(False, description="Keep optimizer state in host memory (ZeRO 1 to 3)")
    offload_parameters: bool = Field(False, description="Keep parameters in host memory (ZeRO 3)")
    extra: dict[str, Any] = Field(default_factory=dict, description="Further DeepSpeed keys, merged over the derived")

    @model_validator(mode="after")
    def _consistent(self) -> DeepSpeedConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage=3, not {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, not 0")
        return self


class EvalConfig(Section):
    """Greedy evaluation on held-out questions."""

    at_start: bool = Field(True, description="Evaluate before training")
    at_end: bool = Field(True, description="Evaluate after training")
    every: NonNegative = Field(0, description="Steps between evaluations on the validation split; 0: none")


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegative = Field(20, description="Steps between checkpoints; 0: only on SIGTERM")
    keep_last: Positive = Field(2, description="Newest checkpoints kept")
    keep_best: NonNegative = Field(1, description="Best checkpoints kept besides, by mean reward of their step")
    export: bool = Field(True, description="Write the final policy in Hugging Face format to OUTPUT_DIR/policy")


class LogConfig(Section):
    """What a run leaves behind besides checkpoints."""

    tensorboard: bool = Field(True, description="Write TensorBoard events to OUTPUT_DIR/tensorboard")
    wandb: bool = Field(False, description="Log to Weights & Biases (needs the wandb package)")
    wandb_project: str = Field("mrpo", description="Weights & Biases project")
    samples: NonNegative = Field(4, description="Judged completions written to OUTPUT_DIR/samples.jsonl per step")
    plots: bool = Field(True, description="Draw OUTPUT_DIR/curves.png and failures.png at the end")


class Config(Section):
    """One run."""

    algorithm: Literal["mrpo", "grpo", "gdpo", "sft"] = Field("mrpo", description="Training algorithm")
    output_dir: Path = Field(Path("runs/default"), description="Folder of everything the run writes")
    seed: int = Field(0, ge=0, description="Seed of data order, sampling and initial weights")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        problems = []
        if self.algorithm != "sft":
            group_size, batch_size = self.rollout.group_size, self.optim.batch_size
            if group_size < 2:
                problems.append(f"rollout.group_size={group_size} leaves no group to compare with; use at least 2")
            if batch_size % group_size:
                problems.append(f"optim.batch_size={batch_size} must be a multiple of rollout.group_size={group_size}")
            if self.loss.beta > 0 and self.loss.reference == "none":
                problems.append(f"loss.beta={self.loss.beta} needs a reference policy: set loss.reference=start")
        problems += self.data.problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self
