"""The operators of MRPO's loss. They know only PyTorch and can be used in anyone's trainer."""

from __future__ import annotations

from .policy_loss import PolicyLoss, policy_loss
from .step_advantages import step_advantages

__all__ = ["PolicyLoss", "policy_loss", "step_advantages"]
