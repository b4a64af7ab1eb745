"""The reward for valid reasoning steps."""

from __future__ import annotations

from mrpo.records import Unjudged, Verdict


def process_reward(verdict: Verdict | Unjudged, num_steps: int) -> float | None:
    """The share of valid steps in [0, 1]: 0 without any step, which needs no judge, and None when unjudged.

    Raises:
        ValueError: the verdict is not about `num_steps` steps.
    """
    if num_steps == 0:
        return 0.0
    if isinstance(verdict, Unjudged):
        return None
    if len(verdict.steps) != num_steps:
        raise ValueError(f"the verdict is about {len(verdict.steps)} steps, the completion has {num_steps}")
    return sum(verdict.validity) / num_steps
