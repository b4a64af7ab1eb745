"""How much memory a process of a run takes, by arithmetic that can be checked by hand.

Weights, gradients and optimizer states are counted exactly, as DeepSpeed 0.18 and later keep them; activations, logits
and the KV cache are upper bounds from the sizes of the batch. `DeepSpeedConfig.extra` is not looked at.

Mixed-precision training states: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3.1. Activations: see
`mrpo.backbones.activations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mrpo.backbones.activations import Tower, kept_values, text_layer_values, vision_layer_values
from mrpo.backbones.liger import liger_is_installed
from mrpo.config import Config
from mrpo.doctor.check import gib
from mrpo.kernels.linear import plan_chunks

GATHERED = 10**9  # parameters that DeepSpeed's ZeRO-3 holds whole at a time (stage3_max_live_parameters)
BUCKET = 5 * 10**8  # gradients that it reduces at a time (reduce_bucket_size)


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know of a model. `kv_width` is key-value heads x head size of the language model."""

    parameters: int
    trainable: int
    text: Tower
    vision: Tower | None
    kv_width: int
    vocab: int


def size_of(model: Any) -> ModelSize:
    """Of a vision-language model of transformers, on any device."""
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Under ZeRO-3 a parameter's own tensor is empty.
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return ModelSize(
        parameters=sum(count for count, _ in counts),
        trainable=sum(count for count, is_trained in counts if is_trained),
        text=Tower(text.num_hidden_layers, text.hidden_size, text.intermediate_size),
        vision=None
        if vision is None
        else Tower(
            getattr(vision, "depth", None) or vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            # The language model names its matrices alike.
            any(name.endswith("gate_proj") and ".language_model." not in name for name, _ in model.named_modules()),
        ),
        kv_width=text.num_key_value_heads * head_dim,
        vocab=text.vocab_size,
    )


@dataclass(frozen=True)
class PromptSize:
    """The longest prompt in tokens and the most image patches of one prompt; `source` says where they come from."""

    tokens: int
    patches: int
    source: str


@dataclass(frozen=True)
class Term:
    """A line of the sum: what it is, how it is worked out, bytes."""

    name: str
    arithmetic: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}: {self.arithmetic} = {gib(self.size)}"


@dataclass(frozen=True)
class Estimate:
    """Bytes per process: what is always there, what each phase adds, and what lies in main memory instead."""

    standing: tuple[Term, ...]
    rollout: tuple[Term, ...]
    update: tuple[Term, ...]
    export: tuple[Term, ...]
    host: tuple[Term, ...]

    @property
    def phases(self) -> dict[str, tuple[Term, ...]]:
        """What comes one after the other, each beside the standing part."""
        return {"a rollout": self.rollout, "an update": self.update, "the export": self.export}

    @property
    def fixed(self) -> int:
        """What no smaller batch can save: the standing part, and whole weights or an engine beside it."""
        fixed = (total(term for term in terms if term.name in _FIXED) for terms in self.phases.values())
        return total(self.standing) + max(fixed)

    @property
    def peak(self) -> int:
        """The most that is held at once on the device."""
        return total(self.standing) + max(map(total, self.phases.values()))


_WHOLE, _ENGINE = "whole weights", "vLLM engine"
_FIXED = (_WHOLE, _ENGINE)
_CPU_ENGINE_CACHE = 2**30  # keys and values of a vLLM engine beside a trainer on a CPU


def total(terms: Iterable[Term]) -> int:
    """The bytes of all `terms`."""
    return sum(term.size for term in terms)


def estimate(
    config: Config, model: ModelSize, prompt: PromptSize, num_processes: int, *, on_gpu: bool = False, card: int = 0
) -> Estimate:
    """The memory of one of `num_processes` processes that train `model` by `config`.

    Args:
        card: bytes of the whole GPU, of which a vLLM engine beside the trainer takes its share.

    With update.checkpointing=auto, which on a GPU does what memory asks for, it is the least that it can be.
    """
    on_device, on_host = _states(config, model, num_processes)
    engine = _engine(config, model, card) if _holds_engine(config) else ()
    sleeps = on_gpu and config.rollout.sleep_level > 0
    return Estimate(
        standing=on_device if sleeps else (*on_device, *engine),
        rollout=(*(engine if sleeps else ()), *_rollout(config, model, prompt)),
        update=_update(config, model, prompt, num_processes, on_gpu),
        export=_whole(config, model) if config.checkpoint.export else (),
        host=on_host,
    )


def _engine(config: Config, model: ModelSize, card: int) -> tuple[Term, ...]:
    """A vLLM engine in the trainer's process: of a GPU a share, for all that it holds."""
    if not card:
        weights, width = model.parameters, _width(config)
        arithmetic = f"{_count(weights)} x {width} B, and {gib(_CPU_ENGINE_CACHE)} of keys and values"
        return (Term(_ENGINE, arithmetic, weights * width + _CPU_ENGINE_CACHE),)
    share = engine_share(config)
    return (Term(_ENGINE, f"rollout.gpu_memory={share:g} x {gib(card)}", round(share * card)),)


def _holds_engine(config: Config) -> bool:
    """Whether a vLLM engine is in the trainer's process."""
    return config.generates and config.rollout.engine == "vllm"


def engine_share(config: Config) -> float:
    """The share of a GPU that a vLLM engine in the trainer's process takes; 0 without one."""
    if not _holds_engine(config):
        return 0.0
    return float(config.rollout.engine_options.get("gpu_memory_utilization", config.rollout.gpu_memory))


def least_engine(config: Config, model: ModelSize) -> int:
    """Bytes of its part of the weights, which such an engine cannot do without."""
    if not _holds_engine(config):
        return 0
    return model.parameters * _width(config) // config.rollout.tensor_parallel


def _states(config: Config, model: ModelSize, num_processes: int) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Weights, gradients, optimizer and reference: the terms on the device, and those offloaded to main memory."""
    stage, width = config.deepspeed.zero_stage, _width(config)
    half, offload = width == 2, config.deepspeed.offload_optimizer
    # ZeRO 1 and 2 keep a float32 copy of float32 weights too; ZeRO 0 and 3 do so only for bfloat16 or when offloading.
    master = half or stage in (1, 2) or offload
    per_weight = 12 if master else 8
    moments = "fp32 weights and two moments" if master else "two moments"

    def share(name: str, count: int, bytes_each: int, from_stage: int, note: str = "") -> Term:
        parts = num_processes if stage >= from_stage else 1
        text = f"{_count(count)} x {bytes_each} B" + (f" / {parts} processes" if parts > 1 else "")
        return Term(name, text + (f" ({note})" if note else ""), -(-count * bytes_each // parts))

    weights = [share("parameters", model.parameters, width, 3)]
    reference = []
    if _copies_reference(config):
        reference.append(share("reference", model.parameters, width, 3, f"loss.beta={config.loss.beta}"))
    gradients = share("gradients", model.trainable, width, 2)
    states = [share("AdamW", model.trainable, per_weight, 1, moments)]
    if half:
        states.append(share("fp32 gradients", model.trainable, 4, 1, "of the optimizer's step"))
    device: list[Term] = []
    host: list[Term] = []
    offloads = config.deepspeed.offload_parameters
    for terms, offloaded in (
        (weights, offloads),
        (reference, offloads or config.loss.reference_offload),
        ([gradients], False),
        (states, offload),
    ):
        (host if offloaded else device).extend(terms)
    return tuple(device), tuple(host)


def _rollout(config: Config, model: ModelSize, prompt: PromptSize) -> tuple[Term, ...]:
    """What generation by the trained model itself adds: the KV cache, and under ZeRO-3 the weights in whole."""
    if config.rollout.engine != "hf" or not config.generates:
        return ()
    width = _width(config)
    # A group is never split, whatever the batch size.
    rows = max(config.rollout.batch_size, config.rollout.group_size)
    length = prompt.tokens + config.rollout.max_tokens
    per_token = 2 * model.text.layers * model.kv_width * width
    cache = Term("KV cache", f"{rows} rows x {length:,} tokens x {per_token:,} B", rows * length * per_token)
    return (*_whole(config, model), cache)


def _whole(config: Config, model: ModelSize) -> tuple[Term, ...]:
    """What gathering all weights adds under ZeRO-3."""
    if config.deepspeed.zero_stage < 3:
        return ()
    width = _width(config)
    return (Term(_WHOLE, f"{_count(model.parameters)} x {width} B, gathered", model.parameters * width),)


def _update(config: Config, model: ModelSize, prompt: PromptSize, num_processes: int, on_gpu: bool) -> tuple[Term, ...]:
    """What a forward and backward pass adds."""
    width, size = _width(config), pass_size(config, prompt, num_processes)
    compiled = compiles(config, on_gpu=on_gpu)
    inside = text_layer_values(model.text, lean=compiled or uses_liger(config, on_gpu=on_gpu, compiled=compiled))
    count = checkpointed_layers(config, model.text.layers, on_gpu=on_gpu)
    terms = [_activations("activations", model.text, inside, size.tokens, count, width)]
    if model.vision is not None and size.patches:
        inside = vision_layer_values(model.vision, compiled=compiles_vision(config, on_gpu=on_gpu))
        if config.model.freeze_vision or (config.model.lora_rank and not config.model.lora_vision):
            arithmetic = f"{size.patches:,} patches x {inside:,} values x {width} B (one layer, frozen)"
            terms.append(Term("vision activations", arithmetic, size.patches * inside * width))
        else:
            count = model.vision.layers if checkpoints_all(config, on_gpu=on_gpu) else 0
            terms.append(_activations("vision activations", model.vision, inside, size.patches, count, width))
    # Their gradient takes their place; on the CPU they are computed with in fp32.
    trained, dtype = not config.model.lora_rank, getattr(torch, config.model.dtype)
    rows, sum_dtype = plan_chunks(size.targets, model.text.hidden, dtype, trained=trained)
    rows, per_logit = min(rows, size.targets), width if on_gpu or width == 4 else width + 4
    arithmetic = f"{rows:,} tokens at a time x {model.vocab:,} words x {per_logit} B"
    terms.append(Term("logits", arithmetic, rows * model.vocab * per_logit))
    if trained:
        each = width if sum_dtype == dtype else width + sum_dtype.itemsize
        arithmetic = f"{model.vocab:,} words x {model.text.hidden:,} x {each} B"
        terms.append(Term("head gradient", arithmetic, model.vocab * model.text.hidden * each))
    if config.deepspeed.zero_stage > 0:
        bucket = min(BUCKET, model.trainable)
        terms.append(Term("gradient bucket", f"{_count(bucket)} x {width} B", bucket * width))
    if config.deepspeed.zero_stage == 3:
        live = min(GATHERED, model.parameters)
        terms.append(Term("gathered layers", f"{_count(live)} x {width} B", live * width))
    return tuple(terms)


def compiles(config: Config, *, on_gpu: bool) -> bool:
    """Whether layers are compiled. `auto` leaves ZeRO-3 out: its hooks would break every layer into pieces."""
    return config.update.compile == "on" or (
        config.update.compile == "auto" and on_gpu and config.deepspeed.zero_stage < 3
    )


def compiles_vision(config: Config, *, on_gpu: bool) -> bool:
    """Whether layers of the vision tower are, too: only where it takes all images at once, or each size would be."""
    return on_gpu and compiles(config, on_gpu=on_gpu) and config.update.packing != "dense"


def uses_liger(config: Config, *, on_gpu: bool, compiled: bool) -> bool:
    """Whether liger-kernel's layers are used. The compiler joins the same operations, and more of them."""
    return config.model.liger == "on" or (
        config.model.liger == "auto" and on_gpu and not compiled and liger_is_installed()
    )


@dataclass(frozen=True)
class PassSize:
    """The tokens, image patches and completion tokens of the largest forward and backward pass of a process.

    Its completions are as long as they may be. Where they are shorter, a packed row has room for more prompts, and for
    their patches.
    """

    tokens: int
    patches: int
    targets: int


def pass_size(config: Config, prompt: PromptSize, num_processes: int) -> PassSize:
    """Of a dense micro-batch or a packed row; where the run may choose, of the larger."""
    completion, rows = config.rollout.max_tokens, config.optim.micro_batch_size
    dense = PassSize(rows * (prompt.tokens + completion), rows * prompt.patches, rows * completion)
    if config.update.packing == "dense":
        return dense
    per_prompt = 1 if config.algorithm == "sft" else config.rollout.group_size
    group = prompt.tokens + per_prompt * completion
    groups = max(1, prompts_per_step(config) // num_processes)
    tokens = min(config.update.token_budget, groups * group)
    prompts = max(1, min(groups, tokens // min(group, tokens)))
    packed = PassSize(tokens, prompts * prompt.patches, tokens - min(prompts * prompt.tokens, tokens - 1))
    return packed if config.update.packing == "shared_prefix" else max(packed, dense, key=lambda size: size.tokens)


def checkpointed_layers(config: Config, layers: int, *, on_gpu: bool) -> int:
    """How many of the language model's `layers` keep only their inputs; for `auto`, the most that it may choose."""
    match config.update.checkpointing:
        case "all":
            return layers
        case "none":
            return 0
        case "auto":
            return layers if on_gpu else 0
        case int(count):
            return min(count, layers)
        case share:
            return math.ceil(share * layers)


def checkpoints_all(config: Config, *, on_gpu: bool) -> bool:
    """Whether the vision tower recomputes its activations, too, or may do so."""
    return config.update.checkpointing == "all" or (on_gpu and config.update.checkpointing == "auto")


def _activations(name: str, tower: Tower, inside: int, tokens: int, checkpointed: int, width: int) -> Term:
    """What one tower keeps: every layer's values, or of checkpointed layers the inputs."""
    values, note = kept_values(tower, inside, checkpointed), f"{tower.layers - checkpointed} layers"
    if checkpointed:
        whole = max(tower.layers - checkpointed, 1)
        note = f"{checkpointed} inputs and {'one layer' if whole == 1 else f'{whole} layers'}"
    return Term(name, f"{tokens:,} tokens x {values:,} values x {width} B ({note})", tokens * values * width)


def loading(config: Config, model: ModelSize) -> int:
    """Bytes of main memory that one process takes while it loads the policy and copies the reference from it."""
    copies = 2 if _copies_reference(config) else 1
    return copies * model.parameters * _width(config)


def _copies_reference(config: Config) -> bool:
    """Whether a frozen copy of the policy is kept; under adapters the policy without them is the reference."""
    return config.algorithm != "sft" and config.loss.beta > 0 and config.model.lora_rank == 0


def prompts_per_step(config: Config) -> int:
    """Prompts of one step over all processes, which must be able to share them evenly."""
    return config.optim.batch_size // (1 if config.algorithm == "sft" else config.rollout.group_size)


def _width(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def _count(number: int) -> str:
    """A count of parameters, shortened: 8.77 G, 1.25 M."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"
