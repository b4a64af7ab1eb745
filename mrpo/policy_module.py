"""The module that DeepSpeed wraps: a vision-language model with its head applied to completion tokens only.

Head and loss run inside the module's own forward, so that ZeRO-3 gathers the head's weight where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from mrpo.backbones import Family
from mrpo.backbones.packed import packed_hidden
from mrpo.batching import DenseBatch, PackedBatch, Tokens
from mrpo.config import LossConfig
from mrpo.errors import UserError
from mrpo.kernels import fused_linear_policy_loss, linear_logprobs
from mrpo.kernels.prefix_attention import AttentionName


class PolicyHead(nn.Linear):
    """A language-model head that can return log-probabilities or the loss instead of logits, which it never holds.

    ZeRO-3 gathers a module's weight around that module's own forward pass, so the fused operators run here. Outputs are
    tuples, in which its hooks find the tensors.
    """

    def forward(self, hidden: torch.Tensor, operator: HeadOperator | None = None) -> Any:
        return super().forward(hidden) if operator is None else operator(hidden, self.weight, self.bias)


# (hidden [N, H], weight [V, H], bias [V] or None) -> tensors
HeadOperator: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor | None, ...]]


class PolicyModule(nn.Module):
    """A Hugging Face vision-language model whose forward gives the loss or the log-probabilities of a batch.

    `attention` computes packed rows; default: what the device does fastest.
    """

    def __init__(
        self, model: Any, family: Family, config: LossConfig, temperature: float, attention: AttentionName | None = None
    ) -> None:
        super().__init__()
        if type(model.lm_head) not in (nn.Linear, PolicyHead):
            raise UserError(f"the policy's head must be a plain Linear, not a {type(model.lm_head).__name__}")
        model.lm_head.__class__ = PolicyHead
        self.model = model
        self._family = family
        self._config = config
        self._temperature = temperature
        self._attention = attention

    def forward(self, batch: DenseBatch | PackedBatch, only_logprobs: bool = False) -> tuple[torch.Tensor | None, ...]:
        """The summed loss of the batch's N tokens, [], then logprobs, clipped, KL and entropy, [N], detached.

        With `only_logprobs`, just the log-probabilities of all N tokens.
        """
        if isinstance(batch, PackedBatch):
            hidden = packed_hidden(self._family, self.model.model, batch.row, self._attention)
        else:
            hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        operator = self._logprobs if only_logprobs else self._loss
        return self.model.lm_head(hidden[batch.predicting], partial(operator, batch))

    def _logprobs(
        self, batch: Tokens, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return linear_logprobs(hidden, weight, batch.targets, bias=bias, temperature=self._temperature)

    def _loss(
        self, batch: Tokens, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        corrected = self._config.sampler_correction != "off"
        result = fused_linear_policy_loss(
            hidden,
            weight,
            batch.targets,
            bias=bias,
            advantages=batch.advantages,
            weights=batch.weights,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            sampler_logprobs=batch.sampler_logprobs if corrected else None,
            epsilon_low=self._config.epsilon_low,
            epsilon_high=self._config.epsilon_high,
            beta=self._config.beta if batch.ref_logprobs is not None else 0.0,
            temperature=self._temperature,
            importance_cap=self._config.importance_cap,
            with_entropy=True,
        )
        return result.loss, result.logprobs, result.clipped, result.kl, result.entropy
