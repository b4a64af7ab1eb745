"""What flows between the operators: numbers of the loss, advantages of segments, inputs and outputs of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .checks import check_targets, check_tensor, require, values_are_checked


@dataclass(frozen=True)
class LossConfig:
    """The numbers of the clipped policy loss.

    epsilon_low, epsilon_high: clip range of the ratio. beta: weight of the KL. temperature: of the sampler.
    importance_cap: bound of the importance weight against the sampler; inf: no bound.

    Raises:
        ValueError: a number is out of its range; the message names it.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    temperature: float = 1.0
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        infinity = float("inf")
        require(0.0 <= self.epsilon_low < 1.0, f"epsilon_low must be in [0, 1), not {self.epsilon_low}")
        require(
            0.0 <= self.epsilon_high < infinity, f"epsilon_high must be finite and at least 0, not {self.epsilon_high}"
        )
        require(0.0 <= self.beta < infinity, f"beta must be finite and at least 0, not {self.beta}")
        require(0.0 < self.temperature < infinity, f"temperature must be finite and above 0, not {self.temperature}")
        require(self.importance_cap > 0.0, f"importance_cap must be above 0, not {self.importance_cap}")


@dataclass(frozen=True)
class SegmentedAdvantages:
    """Advantages that are constant over consecutive segments of the flat list of tokens.

    Segment s covers the tokens from ends[s-1] (0 for the first) up to, not including, ends[s]; it may be empty. The
    kernels find a token's segment by binary search, so that no advantage per token is ever stored. Indexing takes
    tokens out as it does with a tensor: `advantages[start:stop]`, `advantages[positions]`.

    ends: [S] int64, ascending, the last one the number of tokens. values: [S], any floating dtype.
    tokens: [n] int64, the position in the flat list of each row that is asked for; None: row n is token n.

    Raises:
        TypeError, ValueError: a tensor has another dtype, shape or device; the message names it.
    """

    ends: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("values", self.values, (self.values.numel(),), self.values.device)
        check_tensor("ends", self.ends, (self.values.numel(),), self.values.device, torch.int64)
        require(not self.values.requires_grad, "values must not require a gradient; detach them")
        if self.tokens is not None:
            check_tensor("tokens", self.tokens, (self.tokens.numel(),), self.values.device, torch.int64)

    def check(self, rows: int, device: torch.device) -> None:
        """Refuse segments that do not cover `rows` rows; the message names the argument."""
        require(self.ends.device == device, f"advantages must be on {device}, not on {self.ends.device}")
        require(rows == 0 or len(self.ends) > 0, f"advantages must have segments for {rows} tokens, not none")
        if self.tokens is not None:
            require(len(self.tokens) == rows, f"advantages must have {rows} tokens, not {len(self.tokens)}")
        if not values_are_checked(device) or len(self.ends) == 0:
            return
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        require(bool((lengths >= 0).all()), "the ends of advantages must ascend from 0")
        if self.tokens is None:
            require(int(self.ends[-1]) == rows, f"advantages must end at token {rows}, not {int(self.ends[-1])}")
        else:
            inside = (self.tokens >= 0) & (self.tokens < self.ends[-1])
            require(bool(inside.all()), "advantages have tokens outside their segments")

    def __getitem__(self, rows: slice | torch.Tensor) -> SegmentedAdvantages:
        if self.tokens is not None:
            return replace(self, tokens=self.tokens[rows])
        if isinstance(rows, torch.Tensor):
            require(rows.dtype == torch.int64, f"rows must be positions (int64), not {rows.dtype}")
            return replace(self, tokens=rows)
        require(rows.start is not None and rows.stop is not None, "a slice of segments needs a start and a stop")
        return replace(self, tokens=torch.arange(rows.start, rows.stop, rows.step or 1, device=self.ends.device))

    def per_token(self, rows: int) -> torch.Tensor:
        """[rows] The advantage of each row."""
        tokens = torch.arange(rows, device=self.ends.device) if self.tokens is None else self.tokens
        # The last segment has no end to look at: a search among the others cannot leave the list.
        return self.values[torch.searchsorted(self.ends[:-1], tokens, right=True)]


@dataclass(frozen=True)
class RowInputs:
    """What the loss of each of n rows of logits depends on, beside the logits.

    targets: [n] int64, in [0, V) wherever the weight is not 0. advantages: [n], or segments whose rows are these.
    weights: [n]; a row of weight 0 is skipped. old_logprobs, ref_logprobs, sampler_logprobs: [n] or None.
    """

    targets: torch.Tensor
    advantages: torch.Tensor | SegmentedAdvantages
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sampler_logprobs: torch.Tensor | None = None

    def check(self, rows: int, vocab: int, device: torch.device) -> None:
        """Refuse what does not fit `rows` tokens of a vocabulary; the message names the argument.

        Raises:
            TypeError, ValueError: a tensor has another dtype, shape, device or value, or requires a gradient.
        """
        floating = dict(vars(self))
        check_tensor("targets", floating.pop("targets"), (rows,), device, torch.int64)
        if isinstance(self.advantages, SegmentedAdvantages):
            self.advantages.check(rows, device)
            del floating["advantages"]
        for name, tensor in floating.items():
            if tensor is not None:
                check_tensor(name, tensor, (rows,), device)
                require(not tensor.requires_grad, f"{name} must not require a gradient; detach it")
        if values_are_checked(device):
            self._check_values(vocab)

    def _check_values(self, vocab: int) -> None:
        require(bool(self.weights.isfinite().all()), "weights must be finite")
        used = self.weights != 0
        check_targets(self.targets, vocab, used)
        for name in ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs"):
            value = getattr(self, name)
            per_token = value.per_token(len(used)) if isinstance(value, SegmentedAdvantages) else value
            if per_token is not None:
                require(not (per_token.isnan() & used).any(), f"{name} is NaN at a token whose weight is not 0")

    def __getitem__(self, rows: slice | torch.Tensor) -> RowInputs:
        taken: dict[str, Any] = {name: None if value is None else value[rows] for name, value in vars(self).items()}
        return RowInputs(**taken)

    def to(self, dtype: torch.dtype) -> RowInputs:
        """Contiguous, every floating tensor in `dtype`."""
        advantages = self.advantages
        if isinstance(advantages, SegmentedAdvantages):
            advantages = SegmentedAdvantages(
                advantages.ends.contiguous(),
                advantages.values.to(dtype).contiguous(),
                None if advantages.tokens is None else advantages.tokens.contiguous(),
            )
        else:
            advantages = advantages.to(dtype).contiguous()
        others = {name: getattr(self, name) for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs")}
        return RowInputs(
            targets=self.targets.contiguous(),
            advantages=advantages,
            weights=self.weights.to(dtype).contiguous(),
            **{name: None if tensor is None else tensor.to(dtype).contiguous() for name, tensor in others.items()},
        )


@dataclass(frozen=True)
class RowOutputs:
    """The loss of each of n rows and what is worth logging, fp32 (fp64 for fp64 logits); 0 in rows of weight 0.

    losses: [n] weight times token loss. logprobs: [n] of the targets, nats. clipped: [n] bool. kl: [n] k3 estimate,
    nats. entropy: [n] nats, or None. dlogits: [n, V] d sum(losses) / d logits in the dtype of the logits, or None.
    """

    losses: torch.Tensor
    logprobs: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor | None
    dlogits: torch.Tensor | None
