"""How much memory a process of a run takes, by arithmetic that can be checked by hand.

Weights, gradients and optimizer states are counted exactly, as DeepSpeed 0.18 and later keep them; activations, logits
and the KV cache are upper bounds from the sizes of the batch. `DeepSpeedConfig.extra` is not looked at.

Mixed-precision training states: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3.1. Activations: a decoder
layer with a gated MLP and fused attention keeps about 8 hidden + 4 intermediate values per token for its backward pass
(norms and their inputs, queries, keys and values, the attention's output; gate, up, their product and activation).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mrpo.config import Config
from mrpo.doctor.check import gib

GATHERED = 10**9  # parameters that DeepSpeed's ZeRO-3 holds whole at a time (stage3_max_live_parameters)
BUCKET = 5 * 10**8  # gradients that it reduces at a time (reduce_bucket_size)


@dataclass(frozen=True)
class Tower:
    """Layers of one transformer: their number, width, and the width of their MLP."""

    layers: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class ModelSize:
    """What the estimate needs to know of a model. `kv_width` is key-value heads x head size of the language model."""

    parameters: int
    trainable: int
    text: Tower
    vision: Tower | None
    kv_width: int
    vocab: int


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
    """Bytes per process: what is always there, what the larger phase adds, and what lies in main memory instead."""

    standing: tuple[Term, ...]
    rollout: tuple[Term, ...]
    update: tuple[Term, ...]
    host: tuple[Term, ...]

    @property
    def fixed(self) -> int:
        """What no smaller batch can save: the standing part, and the weights that a rollout gathers under ZeRO-3."""
        return total(self.standing) + total(term for term in self.rollout if term.name == _WHOLE)

    @property
    def peak(self) -> int:
        """The most that is held at once on the device."""
        return total(self.standing) + max(total(self.rollout), total(self.update))


_WHOLE = "whole weights"


def total(terms: Iterable[Term]) -> int:
    """The bytes of all `terms`."""
    return sum(term.size for term in terms)


def estimate(config: Config, model: ModelSize, prompt: PromptSize, num_processes: int) -> Estimate:
    """The memory of one of `num_processes` processes that train `model` by `config`."""
    on_device, on_host = _states(config, model, num_processes)
    return Estimate(
        standing=on_device,
        rollout=_rollout(config, model, prompt),
        update=_update(config, model, prompt),
        host=on_host,
    )


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
    if config.algorithm != "sft" and config.loss.beta > 0:
        weights.append(share("reference", model.parameters, width, 3, f"loss.beta={config.loss.beta}"))
    gradients = share("gradients", model.trainable, width, 2)
    states = [share("AdamW", model.trainable, per_weight, 1, moments)]
    if half:
        states.append(share("fp32 gradients", model.trainable, 4, 1, "of the optimizer's step"))
    device: list[Term] = []
    host: list[Term] = []
    for terms, offloaded in ((weights, config.deepspeed.offload_parameters), ([gradients], False), (states, offload)):
        (host if offloaded else device).extend(terms)
    return tuple(device), tuple(host)


def _rollout(config: Config, model: ModelSize, prompt: PromptSize) -> tuple[Term, ...]:
    """What generation adds: the KV cache, and under ZeRO-3 the weights in whole."""
    if config.algorithm == "sft" and not (config.eval.at_start or config.eval.at_end or config.eval.every):
        return ()
    width = _width(config)
    # A group is never split, whatever the batch size.
    rows = max(config.rollout.batch_size, config.rollout.group_size)
    length = prompt.tokens + config.rollout.max_tokens
    per_token = 2 * model.text.layers * model.kv_width * width
    cache = Term("KV cache", f"{rows} rows x {length:,} tokens x {per_token:,} B", rows * length * per_token)
    if config.deepspeed.zero_stage < 3:
        return (cache,)
    whole = Term(_WHOLE, f"{_count(model.parameters)} x {width} B, gathered for rollouts", model.parameters * width)
    return (whole, cache)


def _update(config: Config, model: ModelSize, prompt: PromptSize) -> tuple[Term, ...]:
    """What a forward and backward pass of one micro-batch adds."""
    width, rows = _width(config), config.optim.micro_batch_size
    tokens = rows * (prompt.tokens + config.rollout.max_tokens)
    terms = [_activations("activations", model.text, tokens, config, trained=True)]
    if model.vision is not None and prompt.patches:
        trained = not config.model.freeze_vision
        terms.append(_activations("vision activations", model.vision, rows * prompt.patches, config, trained=trained))
    targets, per_logit = rows * config.rollout.max_tokens, 2 * width + 8
    arithmetic = f"{targets:,} tokens x {model.vocab:,} words x {per_logit} B (with gradient and fp32 copies)"
    terms.append(Term("logits", arithmetic, targets * model.vocab * per_logit))
    if config.deepspeed.zero_stage > 0:
        bucket = min(BUCKET, model.trainable)
        terms.append(Term("gradient bucket", f"{_count(bucket)} x {width} B", bucket * width))
    if config.deepspeed.zero_stage == 3:
        live = min(GATHERED, model.parameters)
        terms.append(Term("gathered layers", f"{_count(live)} x {width} B", live * width))
    return tuple(terms)


def _activations(name: str, tower: Tower, tokens: int, config: Config, *, trained: bool) -> Term:
    """What one tower keeps: every layer's values, or with checkpointing each layer's input and one layer's values."""
    width, inside = _width(config), 8 * tower.hidden + 4 * tower.intermediate
    if not trained:
        values, note = inside, "one layer, frozen"
    elif config.model.gradient_checkpointing:
        values, note = tower.layers * tower.hidden + inside, f"{tower.layers} inputs and one layer"
    else:
        values, note = tower.layers * inside, f"{tower.layers} layers"
    return Term(name, f"{tokens:,} tokens x {values:,} values x {width} B ({note})", tokens * values * width)


def loading(config: Config, model: ModelSize) -> int:
    """Bytes of main memory that one process takes while it loads the policy and copies the reference from it."""
    copies = 2 if config.algorithm != "sft" and config.loss.beta > 0 else 1
    return copies * model.parameters * _width(config)


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
