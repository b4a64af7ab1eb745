"""What DeepSpeed is told, derived from the typed configuration."""

from __future__ import annotations

from typing import Any

from mrpo.config import Config


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from the typed one.

    Passes are counted by the policy, which sets accumulation boundaries itself, so DeepSpeed's own accumulation stays
    at 1.
    """
    stage = config.deepspeed.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.optim.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        # Client optimizers are fine with every stage; offloading would otherwise insist on DeepSpeed's compiled one.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    return _merge(derived, config.deepspeed.extra)


def reference_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration of the frozen reference: ZeRO-3 without an optimizer."""
    policy = deepspeed_config(config)
    zero = {k: v for k, v in policy["zero_optimization"].items() if k != "offload_optimizer"}
    if config.loss.reference_offload:
        zero["offload_param"] = {"device": "cpu"}
    keys = ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")
    return {**{key: policy[key] for key in keys}, "zero_optimization": zero}


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
