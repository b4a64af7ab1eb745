"""liger-kernel's RMSNorm, SwiGLU and RoPE in the language model of one model; classes stay as they are.

Each joins what PyTorch runs as several element-wise kernels, and keeps less for the backward pass. The numbers are
those of transformers' own layers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch

from mrpo.config import ModelConfig
from mrpo.errors import UserError

# How attention layers of transformers name what turns queries and keys, and liger's of the same arguments.
_ROTATIONS = {"apply_rotary_pos_emb": "liger_rope", "apply_multimodal_rotary_pos_emb": "liger_qwen2vl_mrope"}


def liger_is_installed() -> bool:
    """Whether the kernels can be had: pip install 'mrpo[liger]'."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def require_liger(config: ModelConfig, *, on_gpu: bool) -> None:
    """Checks that the kernels can run if `config` insists on them.

    Raises:
        UserError: liger-kernel is not installed, or there is no GPU.
    """
    if config.liger == "on":
        if not liger_is_installed():
            raise UserError("model.liger=on needs the liger-kernel package: pip install 'mrpo[liger]'")
        if not on_gpu:
            raise UserError("model.liger=on needs a GPU; set model.liger=auto")


def apply_liger(model: Any) -> int:
    """Exchanges the forward functions of the language model's norms, MLPs and attention layers; returns how many."""
    count = 0
    for module in model.model.language_model.modules():
        forward = _replacement(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            count += 1
    return count


def _replacement(module: torch.nn.Module) -> Callable[..., Any] | None:
    if type(module).__name__.endswith("RMSNorm"):
        return _rms_norm
    if hasattr(module, "gate_proj") and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return _swiglu
    if hasattr(module, "q_proj"):
        return _turned(type(module).forward)
    return None


def _rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


def _turned(forward: Any) -> FunctionType | None:
    """A copy of an attention layer's forward function that finds liger's rotation under the name of transformers'."""
    from liger_kernel.transformers import functional

    found = {name: getattr(functional, ours) for name, ours in _ROTATIONS.items() if name in forward.__code__.co_names}
    if not found:
        return None
    scope = {**forward.__globals__, **found}
    return FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
