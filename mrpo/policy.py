"""The trained model under DeepSpeed: log-probabilities, the clipped loss, optimizer steps, whole weights on demand.

Head and loss run inside the module's own forward, so that ZeRO-3 gathers the head's weight where it is used. The
caller gives each token's weight so that the sum over all tokens of all processes is the loss; DeepSpeed averages
gradients over processes, hence the factor `world_size`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from mrpo.backbones import Processor, write_prompt_style
from mrpo.batching import DenseBatch, Row, collate
from mrpo.config import Config, LossConfig
from mrpo.errors import UserError
from mrpo.kernels import fused_linear_policy_loss, linear_logprobs
from mrpo.runtime import Runtime


class PolicyHead(nn.Linear):
    """A language-model head that can return log-probabilities or the loss instead of logits, which it never holds.

    ZeRO-3 gathers a module's weight around that module's own forward pass, so the fused operators run here. Outputs are
    tuples, in which its hooks find the tensors.
    """

    def forward(self, hidden: torch.Tensor, operator: HeadOperator | None = None) -> Any:
        return super().forward(hidden) if operator is None else operator(hidden, self.weight, self.bias)


# (hidden [N, H], weight [V, H], bias [V] or None) -> tensors
HeadOperator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor | None, ...]]


class PolicyModule(nn.Module):
    """A Hugging Face vision-language model with its head applied to completion tokens only."""

    def __init__(self, model: Any, config: LossConfig, temperature: float) -> None:
        super().__init__()
        if type(model.lm_head) not in (nn.Linear, PolicyHead):
            raise UserError(f"the policy's head must be a plain Linear, not a {type(model.lm_head).__name__}")
        model.lm_head.__class__ = PolicyHead
        self.model = model
        self._config = config
        self._temperature = temperature

    def forward(self, batch: DenseBatch, only_logprobs: bool = False) -> tuple[torch.Tensor | None, ...]:
        """The summed loss of the batch's N tokens, [], then logprobs, clipped, KL and entropy, [N], detached.

        With `only_logprobs`, just the log-probabilities of all N tokens.
        """
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        operator = self._logprobs if only_logprobs else self._loss
        return self.model.lm_head(hidden[batch.predicting], partial(operator, batch))

    def _logprobs(
        self, batch: DenseBatch, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return linear_logprobs(hidden, weight, batch.targets, bias=bias, temperature=self._temperature)

    def _loss(
        self, batch: DenseBatch, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        result = fused_linear_policy_loss(
            hidden,
            weight,
            batch.targets,
            bias=bias,
            advantages=batch.advantages,
            weights=batch.weights,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            epsilon_low=self._config.epsilon_low,
            epsilon_high=self._config.epsilon_high,
            beta=self._config.beta if batch.ref_logprobs is not None else 0.0,
            temperature=self._temperature,
            with_entropy=True,
        )
        return result.loss, result.logprobs, result.clipped, result.kl, result.entropy


@dataclass(frozen=True)
class UpdateStats:
    """Sums over this process's tokens in one update, and the gradient norm of all.

    `sums` is float64 of loss, nll (both weighted), kl, clipped low, clipped high, entropy, and the number of tokens
    that these were computed for: those that the loss depends on.
    """

    sums: torch.Tensor
    grad_norm: float


STAT_NAMES = ("loss", "nll", "kl", "clip/low", "clip/high", "entropy", "tokens")


class Policy:
    """The model, its DeepSpeed engine and, if the loss has a KL term, the frozen reference."""

    def __init__(self, model: Any, processor: Processor, config: Config, runtime: Runtime) -> None:
        self._config = config
        self._runtime = runtime
        self.processor = processor
        module = PolicyModule(model, config.loss, config.rollout.temperature)
        needs_reference = config.algorithm != "sft" and config.loss.beta > 0
        self._reference = self._make_reference(module) if needs_reference else None
        parameters = [p for p in module.parameters() if p.requires_grad]
        optim = config.optim
        optimizer = torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay
        )
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=parameters, config=deepspeed_config(config)
        )

    @property
    def model(self) -> Any:
        """The Hugging Face model that is trained."""
        return self.engine.module.model

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """A context in which every parameter is whole on every process, and forward passes need not keep step."""
        if self._config.deepspeed.zero_stage < 3:
            yield
            return
        parameters = list(self.engine.module.parameters())
        offload = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(parameters):
            # ZeRO-3's hooks would fetch and release the gathered parameters layer by layer, in step with the other
            # processes, whose completions are of other lengths.
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            offload._remove_module_hooks()
            try:
                yield
            finally:
                offload.forward_hooks, offload.backward_hooks = [], []
                offload.setup_zero_stage3_hooks()

    def with_logprobs(self, rows: Sequence[Row], *, old: bool) -> list[Row]:
        """`rows` with the reference's log-probabilities if there is one and, if asked, the policy's as the old ones."""
        if old:
            logprobs = self._logprobs(self.engine, rows)
            rows = [replace(row, old_logprobs=values) for row, values in zip(rows, logprobs, strict=True)]
        if self._reference is not None:
            logprobs = self._logprobs(self._reference, rows)
            rows = [replace(row, ref_logprobs=values) for row, values in zip(rows, logprobs, strict=True)]
        return list(rows)

    def update(self, rows: Sequence[Row], lr: float) -> UpdateStats:
        """One optimizer step on `rows`, in micro-batches. Every process must bring the same number of rows.

        Raises:
            NonFiniteLossError: a micro-batch's loss is not finite on any process; no weight has changed.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        chunks = self._micro_batches(rows)
        sums = torch.zeros(len(STAT_NAMES), dtype=torch.float64)
        for i, chunk in enumerate(chunks):
            self.engine.set_gradient_accumulation_boundary(i == len(chunks) - 1)
            loss, *values = self.engine(self._collate(chunk))
            self._require_finite(loss, chunk)
            sums += self._stat_sums(loss, values, chunk)
            self.engine.backward(loss * self._runtime.world_size)
        own_norm = self._plain_grad_norm()
        self.engine.step()
        return UpdateStats(sums, float(self.engine.get_global_grad_norm() if own_norm is None else own_norm))

    def export(self, folder: str) -> None:
        """Writes model, tokenizer and image processor in Hugging Face format. Every process must call this."""
        with self.whole_weights():
            if self._runtime.is_main:
                self.model.save_pretrained(folder)
                self.processor.tokenizer.save_pretrained(folder)
                self.processor.image_processor.save_pretrained(folder)
                write_prompt_style(Path(folder), self.processor)
        self._runtime.barrier()

    def _make_reference(self, module: PolicyModule) -> Any:
        """A frozen copy of the start policy, sharded like the policy under ZeRO-3."""
        frozen = copy.deepcopy(module).requires_grad_(False).eval()
        if self._config.deepspeed.zero_stage < 3:
            return frozen.to(self._runtime.device)
        engine, *_ = deepspeed.initialize(model=frozen, config=reference_config(self._config))
        return engine

    def _logprobs(self, module: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
        """(T,) log-probabilities of each row's completion tokens under `module`, without gradients."""
        logprobs: list[torch.Tensor] = []
        with torch.no_grad():
            for chunk in self._micro_batches(rows):
                bare = [replace(row, old_logprobs=None, ref_logprobs=None) for row in chunk]
                found, *_ = module(self._collate(bare), only_logprobs=True)
                logprobs += found.cpu().split([len(row.token_ids) for row in chunk])
        return logprobs

    def _plain_grad_norm(self) -> torch.Tensor | None:
        """The gradient norm before clipping where DeepSpeed keeps none: its plain fp32 engine (ZeRO 0)."""
        if self._config.deepspeed.zero_stage > 0 or self._config.model.dtype != "float32":
            return None
        return get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    def _stat_sums(self, loss: torch.Tensor, values: Sequence[torch.Tensor], chunk: Sequence[Row]) -> torch.Tensor:
        """`UpdateStats.sums` of one micro-batch. What the clip cut is low or high by the sign of the advantage."""
        logprobs, clipped, kl, entropy = (value.cpu() for value in values)
        weights = torch.cat([row.weights for row in chunk]).double()
        advantages = torch.cat([row.advantages for row in chunk])
        # The other tokens were dropped before the head.
        computed = (weights > 0) & ((advantages != 0) | (chunk[0].ref_logprobs is not None))
        sums = {
            "loss": loss.detach().cpu(),
            "nll": -(logprobs.double() * weights).sum(),
            "kl": kl.double().sum(),
            "clip/low": (clipped & (advantages < 0)).sum(),
            "clip/high": (clipped & (advantages > 0)).sum(),
            "entropy": entropy.double().sum(),
            "tokens": computed.sum(),
        }
        return torch.stack([sums[name].double() for name in STAT_NAMES])

    def _micro_batches(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        size = self._config.optim.micro_batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _collate(self, rows: Sequence[Row]) -> DenseBatch:
        return collate(rows, self.processor, self._runtime.device, getattr(torch, self._config.model.dtype))

    def _require_finite(self, loss: torch.Tensor, chunk: Sequence[Row]) -> None:
        if self._runtime.any(not bool(torch.isfinite(loss.detach()))):
            raise NonFiniteLossError(list(chunk))


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite. `rows` are the inputs of this process's micro-batch."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__("the loss is not finite")
        self.rows = rows


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from the typed one.

    Micro-batches are counted by the trainer, which sets accumulation boundaries itself, so DeepSpeed's own
    accumulation stays at 1.
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
    keys = ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")
    return {**{key: policy[key] for key in keys}, "zero_optimization": zero}


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
