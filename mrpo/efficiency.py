"""Options of the update that change its speed and memory but not its mathematics, set on a loaded model.

liger-kernel's layers, compiled layers, recomputed activations. What `auto` means is decided here, from the device and
its free memory, alike on all processes: under ZeRO-3 they gather weights in step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mrpo.backbones.attention import serves_segments
from mrpo.backbones.liger import apply_liger, require_liger
from mrpo.config import Config
from mrpo.doctor.memory import (
    PromptSize,
    checkpointed_layers,
    checkpoints_all,
    compiles,
    compiles_vision,
    estimate,
    size_of,
    total,
    uses_liger,
)
from mrpo.runtime import Runtime

# Share of the free memory that the estimate may fill: within 2 % of a prototype's peaks; memory gets fragmented.
FILL = 0.9


@dataclass(frozen=True)
class Efficiency:
    """What was set: liger's layers, compiled layers, and how many layers recompute their activations."""

    liger: bool
    compiled: bool
    checkpointed: int
    layers: int
    vision_checkpointed: bool

    def __str__(self) -> str:
        number = "all" if self.checkpointed == self.layers else self.checkpointed or "none"
        parts = [f"{number} of {self.layers} layers recompute their activations"]
        parts += ["so does the vision tower"] if self.vision_checkpointed else []
        parts += ["layers are compiled"] if self.compiled else []
        parts += ["liger-kernel's RMSNorm, SwiGLU and RoPE"] if self.liger else []
        return ", ".join(parts)


def make_efficient(model: Any, config: Config, runtime: Runtime) -> Efficiency:
    """Sets on `model` what `config.update` and `config.model.liger` ask for, and puts it into training mode.

    To be called before DeepSpeed takes the model and before it is copied: copies are made efficient with it. Every
    process must call this.

    Raises:
        UserError: liger-kernel is asked for and not installed, or runs on no GPU.
    """
    model.train()  # layers recompute nothing in evaluation mode; the families have no dropout
    on_gpu, layers = runtime.device.type == "cuda", model.model.language_model.layers
    compiled = compiles(config, on_gpu=on_gpu)
    require_liger(config.model, on_gpu=on_gpu)
    liger = uses_liger(config, on_gpu=on_gpu, compiled=compiled)
    if liger:
        apply_liger(model)
    if compiled:
        compile_layers(model, vision=compiles_vision(config, on_gpu=on_gpu) and serves_segments())
    if config.update.checkpointing == "auto" and on_gpu:
        free = min(runtime.gather_objects(free_memory(model, runtime.device)))
        card = min(runtime.gather_objects(torch.cuda.mem_get_info(runtime.device)[1]))  # all must choose the same
        config = _with_checkpointing(config, choose_checkpointing(config, model, runtime.world_size, free, card))
    count = checkpointed_layers(config, len(layers), on_gpu=False)
    vision = checkpoints_all(config, on_gpu=False) and any(p.requires_grad for p in _vision_parameters(model))
    checkpoint_layers(model, count, vision=vision)
    return Efficiency(liger, compiled, count, len(layers), vision)


def compile_layers(model: Any, *, vision: bool) -> None:
    """Compiles the layers of the language model, and if asked of the vision tower: once for all, and for all lengths.

    Calls with a cache of keys and values, that is generation, run as before: each step would be another shape.
    """
    for layer in (*model.model.language_model.layers, *(vision_layers(model) if vision else ())):
        layer.forward = MethodType(_compiled_forward, layer)


def vision_layers(model: Any) -> list[torch.nn.Module]:
    """The layers of the vision tower."""
    text = set(model.model.language_model.modules())
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m not in text]


def _compiled_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Bound to the layer, not to a compiled copy of it: a deep copy of the model must run its own weights.
    cached = kwargs.get("past_key_values") is not None
    layer_class: Any = type(self)
    forward = layer_class.forward if cached else _compiled_class(layer_class)
    return forward(self, *args, **kwargs)


@cache
def _compiled_class(layer_class: Any) -> Any:
    return torch.compile(layer_class.forward, dynamic=True)


def checkpoint_layers(model: Any, count: int, *, vision: bool) -> None:
    """Makes the first `count` layers of the language model, and if asked the vision tower, recompute their activations.

    The first ones: when they recompute, the layers behind them have been freed.
    """
    ours = list(model.model.language_model.layers)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            number = ours.index(module) if module in ours else None
            module.gradient_checkpointing = vision if number is None else number < count
            # Not by gradient_checkpointing_enable: it makes the inputs of frozen towers require gradients.
            setattr(module, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))  # noqa: B010


def choose_checkpointing(config: Config, model: Any, num_processes: int, free: int, card: int) -> int | Literal["all"]:
    """The least number of layers with which weights, optimizer and the largest pass fit into `free` bytes, or all.

    So does what a vLLM engine that never sleeps will take of the `card` bytes of the whole GPU.
    """
    size = size_of(model)
    prompt = PromptSize(
        config.prompt.max_tokens, config.prompt.max_tokens * _patches_per_token(model), "prompt.max_tokens"
    )
    for count in range(size.text.layers + 1):
        need = estimate(_with_checkpointing(config, count), size, prompt, num_processes, on_gpu=True, card=card)
        if total(need.standing) + total(need.update) <= FILL * free:
            return count
    return "all"


def free_memory(model: Any, device: torch.device) -> int:
    """Bytes of `device` that training may take, those under the model's weights included."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused + sum(p.nbytes for p in model.parameters() if p.device == device)


def _with_checkpointing(config: Config, value: int | Literal["all"]) -> Config:
    return config.model_copy(update={"update": config.update.model_copy(update={"checkpointing": value})})


def _vision_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.model.named_parameters() if not name.startswith("language_model.")]


def _patches_per_token(model: Any) -> int:
    """How many patches of the vision tower become one image token."""
    merge = getattr(model.config.vision_config, "spatial_merge_size", None)
    return (merge or round(1 / model.config.downsample_ratio)) ** 2
