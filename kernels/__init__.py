"""The operators of MRPO's loss. They know only PyTorch and Triton and can be used in anyone's trainer."""

from __future__ import annotations

from .linear_logprobs import linear_logprobs
from .linear_policy_loss import fused_linear_policy_loss
from .policy_loss import PolicyLoss, policy_loss
from .records import SegmentedAdvantages
from .step_advantages import segment_advantages, step_advantages

__all__ = [
    "PolicyLoss",
    "SegmentedAdvantages",
    "fused_linear_policy_loss",
    "linear_logprobs",
    "policy_loss",
    "segment_advantages",
    "step_advantages",
]
