"""The reward for a sensible number of reasoning steps."""

from __future__ import annotations


def length_reward(num_steps: int, k_min: int, k_max: int) -> float:
    """0 for k_min <= num_steps <= k_max; below -(k_min - num_steps) / k_min, above -(num_steps - k_max) / k_max."""
    if num_steps < k_min:
        return (num_steps - k_min) / k_min
    if num_steps > k_max:
        return (k_max - num_steps) / k_max
    return 0.0
