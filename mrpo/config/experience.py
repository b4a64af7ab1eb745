"""The sections of what a step gathers: completions, their rewards and verdicts, advantages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mrpo.config.section import LocalPath, NonNegative, PathOrId, Positive, Section, Share


class RolloutConfig(Section):
    """Sampling of completions."""

    engine: Literal["hf", "vllm", "vllm_server"] = Field(
        "hf", description="`hf`: the trained model itself; `vllm`: in the trainer's processes; `vllm_server`: elsewhere"
    )
    group_size: int = Field(8, ge=1, description="Completions per prompt, G")
    temperature: float = Field(1.0, gt=0.0, description="Sampling temperature")
    max_tokens: Positive = Field(128, description="Longest completion (paper: 512)")
    batch_size: Positive = Field(
        128, description="Completions generated at once per process; a server decides for itself"
    )
    mask_truncated: bool = Field(False, description="Leave completions cut at the length limit out of the loss")
    ahead: int = Field(
        0,
        ge=0,
        le=8,
        description="Steps sampled ahead: 0 is on policy; n learns from completions that are n updates old",
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
    sync_group: bool = Field(
        True,
        description="vllm_server: send new weights through a process group with the servers' workers (NCCL; gloo on "
        "CPUs), for which these must reach the first process; false: over HTTP",
    )
    sync_folder: LocalPath | None = Field(
        None, description="vllm_server: folder that trainer and servers share, for new weights instead; null: none"
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
    bertscore_model: PathOrId | None = Field(
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
    "breaker_patience", "price_input", "price_cached", "price_output", "cache", "max_unjudged",
}  # fmt: skip


class JudgeConfig(Section):
    """Who judges the steps."""

    kind: Literal["embedded", "openai"] = Field(
        "embedded", description="`embedded`: exact on phantom, a lexical stand-in elsewhere; `openai`: an endpoint"
    )
    model: str = Field("gpt-5-mini", description="Model name at the endpoint")
    base_url: str | None = Field(None, description="Endpoint; default: what OPENAI_BASE_URL says, else OpenAI")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of every request, as {reasoning_effort: low, max_completion_tokens: 2048}",
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
    breaker_patience: float = Field(
        600.0, ge=0.0, description="Seconds of an outage for which requests wait; then they go unjudged"
    )
    price_input: float | None = Field(None, ge=0.0, description="USD per million prompt tokens; null: not counted")
    price_cached: float | None = Field(
        None, ge=0.0, description="USD per million prompt tokens that the endpoint had cached; null: as price_input"
    )
    price_output: float | None = Field(None, ge=0.0, description="USD per million answer tokens; null: not counted")
    cache: LocalPath | None = Field(
        None, description="Folder that keeps an endpoint's verdicts; null: OUTPUT_DIR/judge (mrpo eval: OUT/cache)"
    )
    max_unjudged: Share = Field(
        0.5, description="Stop when more than this share of a step's or an evaluation's completions stays unjudged"
    )
    min_overlap: Share = Field(0.3, description="Embedded stand-in: share of a step's words that must be in the gold")
    encoder: LocalPath | None = Field(
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
        "group_std", description="mrpo, grpo: (R - mean) / (std + 1e-4) in the group, or R - mean alone"
    )
