"""The sections of what a step learns with: loss, gradient, optimizer, DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from mrpo.config.section import NonNegative, Positive, Section

Packing: TypeAlias = Literal["auto", "shared_prefix", "dense"]


class LossConfig(Section):
    """The clipped policy loss."""

    epsilon_low: float = Field(0.2, gt=0.0, lt=1.0, description="Lower clip of the importance ratio, 1 - epsilon_low")
    epsilon_high: float = Field(0.2, gt=0.0, description="Upper clip of the importance ratio, 1 + epsilon_high")
    beta: float = Field(0.0, ge=0.0, description="Weight of the k3 KL to the start policy (paper's code: 0.04)")
    reference_offload: bool = Field(False, description="Keep the reference policy in host memory between its uses")
    updates_per_rollout: Positive = Field(1, description="Optimizer steps on each batch of rollouts")
    sampler_correction: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Weigh tokens by p_old / p_sampler, truncated; auto: if the engine tells its log-probabilities",
    )
    importance_cap: float = Field(2.0, gt=0.0, description="Largest weight of the sampler correction")
    normalization: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="Mean over each completion's tokens then completions; mean over all tokens; sum / max_tokens",
    )


class UpdateConfig(Section):
    """How an optimizer step computes its gradient. The gradient is the same, up to rounding."""

    packing: Packing = Field(
        "auto",
        description="shared_prefix: a prompt once, its completions behind it; dense: a prompt for every completion, in "
        "micro-batches of optim.micro_batch_size; auto: the first if it saves 5 % of the FLOPs",
    )
    streamed: bool = Field(
        True,
        description="mrpo, grpo: begin with the prompts that an endpoint has judged while it judges the others; "
        "gradients are then summed in the order of verdicts, which the last bits show; false: in that of prompts",
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
        description="torch.compile the language model's layers, and on a GPU the vision tower's (unless packing is "
        "dense); auto: on a GPU, not under ZeRO 3. On a CPU every new row length compiles again",
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
