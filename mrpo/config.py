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
    freeze_vision: bool = Field(False, description="Do not train the vision tower and its projector")
    lora_rank: NonNegative = Field(
        0, description="Train low-rank adapters of this rank instead of the weights (needs the peft package); 0: none"
    )
    lora_alpha: float = Field(32.0, gt=0.0, description="Adapters are scaled by lora_alpha / lora_rank")
    lora_targets: tuple[str, ...] | None = Field(
        None, description="Names of the linear layers that get adapters, as [q_proj, v_proj]; null: all but the head"
    )
    lora_vision: bool = Field(False, description="Adapters in the vision tower and its projector, too")
    liger: Literal["auto", "on", "off"] = Field(
        "auto",
        description="liger-kernel's RMSNorm, SwiGLU and RoPE in the language model; auto: on a GPU where the package "
        "is installed and layers are not compiled",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model folder")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.freeze_vision and self.lora_vision:
            raise ValueError("lora_vision=true would train the vision tower: set freeze_vision=false")
        return self


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
    phantom_look: Literal["plain", "hard", "shifted"] = Field(
        "plain", description="Phantom pictures: easy ones, faint and noisy ones, or those of an unseen device and body"
    )
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

    engine: Literal["hf", "vllm", "vllm_server"] = Field(
        "hf", description="`hf`: the trained model itself; `vllm`: in the trainer's processes; `vllm_server`: elsewhere"
    )
    group_size: int = Field(8, ge=1, description="Completions per prompt, G")
    temperature: float = Field(1.0, gt=0.0, description="Sampling temperature")
    max_tokens: Positive = Field(128, description="Longest completion (paper: 512)")
    batch_size: Positive = Field(128, description="Completions generated at once per process")
    mask_truncated: bool = Field(False, description="Leave completions cut at the length limit out of the loss")
    ahead: Literal[0, 1] = Field(
        0, description="1: sample the next step's completions before this step's update, while its verdicts arrive"
    )
    tensor_parallel: Positive = Field(1, description="vllm: processes that share one engine and its prompts")
    gpu_memory: float = Field(0.4, gt=0.0, le=1.0, description="vllm: share of the GPU's memory that the engine takes")
    sleep_level: Literal[0, 1, 2] = Field(
        2, description="vllm on a GPU, during updates: 0 keeps all memory; 1 moves weights to the host; 2 drops them"
    )
    enforce_eager: bool = Field(False, description="vllm: start in seconds instead of compiling, and generate slower")
    engine_options: dict[str, Any] = Field(default_factory=dict, description="vllm: further arguments of vllm.LLM")
    servers: list[str] = Field(default_factory=list, description="vllm_server: URLs, as [http://host:8000]")
    server_timeout: float = Field(600.0, gt=0.0, description="vllm_server: seconds without a word from a server")
    sync_folder: Path | None = Field(
        None, description="vllm_server: folder that trainer and servers share, for new weights; null: sent over HTTP"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        if (self.engine == "vllm_server") != bool(self.servers):
            needs = "needs" if self.engine == "vllm_server" else "takes no"
            raise ValueError(f"engine={self.engine} {needs} servers, and servers={self.servers}")
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(f"tensor_parallel={self.tensor_parallel} needs engine=vllm, not {self.engine}")
        if self.engine != "hf" and self.temperature > 2:
            raise ValueError(f"vLLM samples at temperatures up to 2, not temperature={self.temperature:g}")
        return self


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


# Fields of JudgeConfig that say how the judge is reached, which changes no verdict.
JUDGE_TRANSPORT = {
    "api_key_env", "image_ids", "concurrency", "timeout", "retries", "deadline", "breaker_failures", "breaker_pause",
    "price_input", "price_cached", "price_output", "cache", "max_unjudged",
}  # fmt: skip


class JudgeConfig(Section):
    """Who judges the steps."""

    kind: Literal["embedded", "openai"] = Field(
        "embedded", description="`embedded`: exact on phantom, a lexical stand-in elsewhere; `openai`: an endpoint"
    )
    model: str = Field("gpt-5-mini", description="Model name at the endpoint")
    base_url: str | None = Field(None, description="Endpoint; default: the openai package's own")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of every request, as {reasoning_effort: low, max_tokens: 512}"
    )
    image_detail: Literal["auto", "low", "high"] = Field("auto", description="Detail asked for of images at OpenAI")
    max_image_pixels: Positive | None = Field(
        None, description="Larger images are scaled down first; null: as they are"
    )
    image_ids: bool = Field(
        False, description="vLLM endpoints: name images by their digest, and send each image's bytes only once"
    )
    count_in_schema: bool = Field(
        False, description="Put the number of steps into the JSON schema, if the endpoint can: it cannot miscount then"
    )
    concurrency: Positive = Field(32, description="Requests under way at once per process")
    timeout: float = Field(60.0, gt=0.0, description="Seconds before one try of a request is given up")
    retries: NonNegative = Field(4, description="Further tries of a failed request")
    deadline: float = Field(600.0, gt=0.0, description="Seconds for one verdict with all its tries, waits and repair")
    breaker_failures: NonNegative = Field(
        8, description="Failed requests in a row after which the endpoint counts as down; 0: never"
    )
    breaker_pause: float = Field(30.0, ge=0.0, description="Seconds until an endpoint that is down is tried again")
    price_input: float | None = Field(None, ge=0.0, description="USD per million prompt tokens; null: not counted")
    price_cached: float | None = Field(
        None, ge=0.0, description="USD per million prompt tokens that the endpoint had cached; null: as price_input"
    )
    price_output: float | None = Field(None, ge=0.0, description="USD per million answer tokens; null: not counted")
    cache: Path | None = Field(None, description="Folder that keeps an endpoint's verdicts; null: OUTPUT_DIR/judge")
    max_unjudged: Share = Field(0.5, description="Stop the run when a step's unjudged share exceeds this")
    min_overlap: Share = Field(0.3, description="Embedded stand-in: share of a step's words that must be in the gold")
    encoder: Path | None = Field(
        None, description="Embedded stand-in: folder of a sentence encoder that compares meanings, too; null: none"
    )
    min_similarity: float = Field(
        0.5, ge=-1.0, le=1.0, description="Embedded stand-in: cosine above which the encoder finds a step in the gold"
    )

    @model_validator(mode="after")
    def _consistent(self) -> JudgeConfig:
        if self.deadline < self.timeout:
            raise ValueError(f"deadline={self.deadline:g} must not be below timeout={self.timeout:g}")
        if self.encoder is not None and self.kind != "embedded":
            raise ValueError(f"encoder belongs to kind=embedded, not {self.kind}")
        return self


class AdvantageConfig(Section):
    """From rewards to per-token advantages."""

    credit: Literal["shaped", "telescoped"] = Field(
        "shaped",
        description="How MRPO's verdicts reach tokens: the paper's shaping (tau, penalty); or a step earns how it "
        "changes the group's mean advantage over completions with the same verdicts so far (docs/study.md)",
    )
    tau: Share = Field(0.6, description="An answer reward above this counts as correct: no shaping")
    penalty: Literal["exponential", "linear", "none", "reversed"] = Field(
        "exponential", description="Weight of an invalid step against its place: e to 1, 2 to 1, always 1, or 1 to e"
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
    reference_offload: bool = Field(False, description="Keep the reference policy in host memory between its uses")
    updates_per_rollout: Positive = Field(1, description="Optimizer steps on each batch of rollouts")
    sampler_correction: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Weigh tokens by p_policy / p_sampler, truncated; auto: if the engine tells its log-probabilities",
    )
    importance_cap: float = Field(2.0, gt=0.0, description="Largest weight of the sampler correction")
    normalization: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="Mean over each completion's tokens then completions; mean over all tokens; sum / max_tokens",
    )


class UpdateConfig(Section):
    """How an optimizer step computes its gradient. The gradient is the same, up to rounding."""

    packing: Literal["auto", "shared_prefix", "dense"] = Field(
        "auto",
        description="shared_prefix: a prompt once, its completions behind it; dense: a prompt for every completion, in "
        "micro-batches of optim.micro_batch_size; auto: the cheaper one by FLOPs",
    )
    token_budget: Positive = Field(
        8192, description="Tokens of a packed forward and backward pass of one process; larger groups are split"
    )
    pad_multiple: Positive | None = Field(
        None, description="Packed rows are padded to a multiple of this; null: 128 on a GPU, none on a CPU"
    )
    attention: Literal["auto", "flex", "flash", "sdpa"] = Field(
        "auto",
        description="Attention of packed rows: FlexAttention, two flash-attention calls joined, a dense mask; auto: "
        "what the device does fastest",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile every layer of the language model; auto: on a GPU, but not under ZeRO 3; on a CPU "
        "rows of other shapes compile anew",
    )
    checkpointing: Literal["auto", "none", "all"] | NonNegative | Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        "auto",
        description="Layers of the language model that recompute their activations in the backward pass, a number or a "
        "share; all: the vision tower's, too; auto: on a GPU as many as its memory asks for, elsewhere none",
    )


class OptimConfig(Section):
    """Optimizer, schedule and batch."""

    steps: Positive | None = Field(80, description="Rollout steps of the run; null: one pass over `epochs`")
    epochs: float = Field(1.0, gt=0.0, description="Passes over the training questions when steps is null")
    batch_size: Positive = Field(128, description="Completions (sft: examples) per step over all processes")
    micro_batch_size: Positive = Field(
        64, description="Completions per forward and backward pass of one process, where update.packing is dense"
    )
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
    update: UpdateConfig = UpdateConfig()
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
            if self.loss.sampler_correction == "on" and self.rollout.engine == "hf":
                problems.append(
                    "loss.sampler_correction=on needs the sampler's log-probabilities, which rollout.engine=hf does "
                    "not tell: set it to auto, or rollout.engine to vllm or vllm_server"
                )
        problems += self.data.problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self
