"""mrpo: train vision-language models to reason step by step with reinforcement learning.

MRPO (Medical Reasoning-aware Policy Optimization, arXiv 2606.31825) judges every reasoning step and, when the
final answer is wrong, punishes the tokens of an invalid step exponentially more the earlier the step stands.
"""

__version__ = "0.1.0"
