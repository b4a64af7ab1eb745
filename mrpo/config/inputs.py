"""The sections of what a run starts from: policy, questions, prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mrpo.config.section import LocalPath, NonNegative, PathOrId, Positive, Section, Share


class ModelConfig(Section):
    """The policy."""

    path: PathOrId = Field(
        "phantom", description="Folder or hub id of the start policy; `phantom` is the shipped tiny one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of parameters; under bfloat16 DeepSpeed keeps fp32 master weights"
    )
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
    root: LocalPath | None = Field(
        None, description="Folder of the data set's files; `prepared`, `generic`: folder of the images, if another"
    )
    file: LocalPath | None = Field(
        None, description="`prepared`: JSONL file; `generic`: JSON, JSONL or Parquet file, data set folder or hub id"
    )
    eval_file: LocalPath | None = Field(
        None, description="`prepared`, `generic`: where evaluation questions come from; null: data.file, too"
    )
    gold: LocalPath | None = Field(
        None, description="Folder of MedThink's gold rationales (vqa_rad, slake, path_vqa); null: none"
    )
    seed: int = Field(0, description="Seed of generated data (phantom)")
    train_size: Positive | None = Field(None, description="Use only the first N training questions; default: all")
    eval_size: Positive | None = Field(512, description="Held-out questions per evaluation; null: all")
    corruption: Share = Field(
        0.0, description="sft on phantom: probability that each habit of misreading strikes a rationale"
    )
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
