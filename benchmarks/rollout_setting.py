"""What rollouts are measured with: the names of the ways, and one setting, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass

OURS, HF, TRL, REFERENCE = "ours, vLLM", "ours, hf", "TRL's VLLMGeneration", "reference's way"
# Our vLLM engine again, each time in a process of its own. On a GPU it can sleep, at level 2 if not said otherwise.
SLEEP_1 = "ours, sleep level 1"
COLD, CACHED = "ours, first start", "ours, next start"
WITH_VLLM = (OURS, TRL, SLEEP_1, COLD, CACHED)

# Completions that the paper's code samples at once.
REFERENCE_MICRO_BATCH = 2
# The engine's share of a GPU's memory, beside weights that a trainer holds as well.
GPU_MEMORY = 0.35


@dataclass(frozen=True)
class Setting:
    """P prompts a round, G completions of T tokens each, images of so many tokens.

    max_samples, max_image_tokens, max_length: the most of any setting, which an engine is started for once.
    measured_prompts: the reference's way is measured on its first so many prompts, 0: all.
    """

    model: str
    prompts: int
    group: int
    image_tokens: int
    length: int
    max_samples: int
    max_image_tokens: int
    max_length: int
    measured_prompts: int = 0

    @property
    def samples(self) -> int:
        return self.prompts * self.group
